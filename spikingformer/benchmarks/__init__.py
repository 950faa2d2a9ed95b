"""Timing of models on the machine at hand."""

from .throughput import Measurement, calibrate, example_input, firing_rate, measure, sweep

__all__ = ["Measurement", "calibrate", "example_input", "firing_rate", "measure", "sweep"]
