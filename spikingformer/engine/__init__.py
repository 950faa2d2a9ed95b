"""Inference on spikes as bits: a model as a program, run in float32 or with int8 weights on an ordinary processor."""

from .program import Program, build_program
from .runner import FORMS, Engine

__all__ = ["FORMS", "Engine", "Program", "build_program"]
