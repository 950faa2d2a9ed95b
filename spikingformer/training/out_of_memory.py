"""When a GPU's memory does not hold a step: says which batch does, found by trying."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from spikingformer.data.loading import Step
    from spikingformer.training.loop import Trainer


class OutOfMemory(ValueError):
    """The device's memory does not hold one part of a step."""


def largest_fitting(model: nn.Module, inputs: torch.Tensor, autocast: object) -> int:
    """Most samples of `inputs` (B, ...) whose forward and backward fit, by halving B; 0: not even one.

    Gradients are cleared. BatchNorm's statistics change: the run is over when this is asked.
    """
    count = len(inputs)
    while count > 0:
        try:
            with autocast():  # type: ignore[operator]
                loss = model(inputs[:count]).float().sum()
            loss.backward()
            return count
        except torch.OutOfMemoryError:
            loss = None
            count //= 2
        finally:
            model.zero_grad(set_to_none=True)
            if inputs.device.type == "cuda":
                torch.cuda.empty_cache()
    return 0


def out_of_memory(trainer: Trainer, step: Step, error: torch.OutOfMemoryError) -> OutOfMemory:
    """The error to raise: what was tried, what goes on with --resume, what fits, and what keeps the batch."""
    recipe, size = trainer.recipe, trainer.world.size
    part = max(step.parts, key=lambda part: len(part.labels))
    tried, parts = len(part.labels), len(step.parts)
    trainer.optimizer.zero_grad(set_to_none=True)
    if trainer.device.type == "cuda":
        torch.cuda.empty_cache()
    trainer.set_time_steps(recipe.model.time_steps)  # an early epoch's T may be smaller
    fits = largest_fitting(trainer.model, part.inputs.to(trainer.dtype), trainer.autocast) if size == 1 else tried // 2
    reason = str(error).splitlines()[0][:160] if str(error) else "out of memory"
    if fits == 0:
        advice = (
            "Not even one sample fits: use a smaller model, data.image_size or model.time_steps, or precision=bf16."
        )
    else:
        how = "fits (tried just now)" if size == 1 else "may fit (not tried: other processes wait)"
        advice = (
            f"A part of {fits} {how}: accumulation_steps={-(-tried * parts // fits)} "
            f"keeps batch_size={recipe.batch_size}, "
            f"or take batch_size={fits * size * recipe.accumulation_steps}. "
            "precision=bf16 needs less as well."
        )
    resumes = (
        "grad_checkpointing=true keeps no spikes and gives the same numbers: add it and go on with --resume. "
        if trainer.device.type == "cuda" and not recipe.grad_checkpointing
        else ""
    )
    return OutOfMemory(
        f"{trainer.device}: out of memory with {tried} samples in one part of a step ({reason}). {resumes}{advice} "
        "Another batch, part, size or precision makes another run: give it another --output."
    )
