"""Timing of models on the machine at hand."""

from .throughput import Measurement, firing_rate, measure, sweep

__all__ = ["Measurement", "firing_rate", "measure", "sweep"]
