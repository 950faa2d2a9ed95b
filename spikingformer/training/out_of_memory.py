"""When a GPU's memory does not hold a step: says which batch does, found by trying."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from spikingformer.data.loading import Step
    from spikingformer.training.gradient_step import GradientStep
    from spikingformer.training.recipe import Recipe


class OutOfMemory(ValueError):
    """The device's memory does not hold a micro-batch: one part of a step."""


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


def out_of_memory(gradient: GradientStep, step: Step, reason: str) -> OutOfMemory:
    """The error to raise: what was tried, what fits, what keeps the batch and what a resumed run may change.

    gradient: its model must have all time steps, since an early epoch's may be fewer.
    reason: PyTorch's own words. The error they are from must be gone: its traceback holds on to activations.
    """
    recipe, size, device = gradient.recipe, gradient.world.size, gradient.device
    part = max(step.parts, key=lambda part: len(part.labels))
    tried, parts = len(part.labels), len(step.parts)
    gradient.optimizer.zero_grad(set_to_none=True)
    had_graphs = gradient.drop_graphs()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    fits = tried // 2
    if size == 1:
        fits = largest_fitting(gradient.model, part.inputs.to(gradient.dtype), gradient.autocast)
    resumes = (
        "grad_checkpointing=true keeps no spikes and gives the same numbers: add it and continue with --resume. "
        if device.type == "cuda" and not recipe.grad_checkpointing
        else ""
    )
    return OutOfMemory(
        f"{device}: out of memory with a micro-batch of {tried} samples ({reason[:160] or 'no reason given'}). "
        f"{resumes}{_advice(recipe, size, tried, parts, fits, had_graphs)}"
    )


def _advice(recipe: Recipe, processes: int, tried: int, parts: int, fits: int, had_graphs: bool) -> str:
    """What to change, where `fits` of `tried` samples do."""
    if fits == 0:
        return (
            "Not even one sample fits: use a smaller model, data.image_size or model.time_steps, or precision=bf16. "
            "That is another run: give it another --output."
        )
    if fits >= tried and had_graphs:
        return (
            f"All {tried} samples fit without the memory that CUDA graphs keep (tried just now): add cuda_graph=false "
            "and continue with --resume."
        )
    smaller = fits
    if fits >= tried:
        found = (
            f"All {tried} samples fit when tried again just now, so memory was short for a moment only: does another "
            "process use this device? Continue with --resume"
        )
        if tried == 1:
            return f"{found}."
        found, smaller = f"{found}, or take a smaller micro-batch", tried // 2
    elif processes == 1:
        found = f"A micro-batch of {fits} samples fits (tried just now)"
    else:
        found = f"A micro-batch of {fits} samples may fit (not tried: other processes wait)"
    return (
        f"{found}: accumulation_steps={-(-tried * parts // smaller)} keeps batch_size={recipe.batch_size}, "
        f"or use batch_size={smaller * processes * recipe.accumulation_steps}. precision=bf16 also needs less. "
        "A run with another micro-batch, batch or precision is another run: give it another --output."
    )
