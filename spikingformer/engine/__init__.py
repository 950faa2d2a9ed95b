"""Inference on spikes as bits: a model as a program, run in float32 or with int8 weights on an ordinary processor."""

from collections.abc import Callable

from torch import Tensor, nn

from spikingformer.models.whole import provide

from .program import Program, build_program
from .runner import FORMS, Engine

__all__ = ["FORMS", "Engine", "Program", "build_program"]


def _whole(model: nn.Module) -> Callable[[Tensor], Tensor]:
    engine = Engine(model)
    engine.drop_weights()
    return engine.forward_steps


provide(_whole)
