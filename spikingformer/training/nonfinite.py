"""NaN and infinity: found though spikes hide them from the loss, never saved, reported with what to try."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from spikingformer.training.distributed import World, sum_over_processes
from spikingformer.training.parallel import own_share


class NonFiniteLoss(ValueError):
    """The loss, or a tensor that would be saved, became NaN or infinite."""


def first_nonfinite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first floating-point tensor that holds NaN or infinity."""
    return next((n for n, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())), None)


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """The floating-point buffers that a checkpoint holds."""
    saved = model.state_dict().keys()
    return {name: t for name, t in model.named_buffers() if name in saved and t.is_floating_point()}


def nan_unless_finite(loss: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
    """The loss; NaN where statistics are not finite. Nothing waits for the device.

    A neuron makes no spike of NaN: a loss over spikes stays finite while BatchNorm's statistics and, next, all weights
    before the neuron are lost.
    """
    if not statistics:
        return loss
    return loss + 0 * torch.cat([t.flatten() for t in statistics.values()]).sum().to(loss.dtype)


def what_is_not_finite(loss: float, statistics: Mapping[str, Tensor]) -> str:
    """In words: a gradient, the loss, or statistics that made it NaN (see `nan_unless_finite`)."""
    if math.isfinite(loss):
        return "a gradient is not finite, though the loss is"
    name = first_nonfinite(statistics)
    hidden = "spikes can hide this from the loss; do the samples contain NaN?"
    return f"the loss is {loss}" if name is None else f"{name} is not finite ({hidden})"


def nonfinite_in_any_process(tensors: Mapping[str, Tensor], device: torch.device, world: World) -> str | None:
    """Name of a tensor that holds NaN or infinity in this process or in another; all processes call it."""
    name = first_nonfinite({name: own_share(t) for name, t in tensors.items()})
    found = sum_over_processes(torch.tensor(float(name is not None), device=device), world)
    return (name or "a tensor of another process") if float(found) else None


def gradients_are_finite(model: nn.Module, world: World) -> bool:
    """In every process; all of them call it."""
    finite = [own_share(p.grad).isfinite().all() for p in model.parameters() if p.grad is not None]
    return not float(sum_over_processes((~torch.stack(finite)).any().float(), world))


def explain(what: str, where: str, policy: str, step_backs: int, has_checkpoint: bool) -> str:
    """The message of a run that cannot continue. policy: the recipe's `nonfinite`."""
    backs = f" after going back {step_backs} times" if step_backs else ""
    kept = "The last checkpoint is intact: --resume continues from it. " if has_checkpoint else ""
    skip = "" if policy == "skip" else "nonfinite=skip (skips such steps and counts them) or "
    back = f"; {skip}nonfinite=step_back (goes back to the last checkpoint with half the learning rate)"
    return (
        f"{what} in {where}{backs}. {kept}Things to try: a lower optimizer.learning_rate or a longer "
        "schedule.warmup_epochs; optimizer.clip_norm=1; precision=bf16 or fp32 instead of fp16"
        f"{'' if policy == 'step_back' else back}."
    )
