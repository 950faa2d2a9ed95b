"""Inference on spikes as bits: a model as a program, run in float32 or with int8 weights on an ordinary processor."""

from collections.abc import Callable

from torch import Tensor, nn

from .program import Program, build_program
from .runner import FORMS, Engine

__all__ = ["FORMS", "Engine", "Program", "build_program", "whole_model"]


def whole_model(model: nn.Module) -> Callable[[Tensor], Tensor | None]:
    """What `spikingformer.models.whole` runs: input to logits after each step, float32; None while it is in use.

    Raises ValueError for a model that the engine cannot run.
    """
    engine = Engine(model)
    engine.drop_weights()
    return engine.forward_steps_if_free
