"""Accuracy and loss over a part, every sample counted once, over all processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from spikingformer.data.loading import EvaluationLoader
from spikingformer.training.distributed import World, in_step, sum_over_processes


@dataclass(frozen=True)
class Evaluation:
    """top1, top5: percent. loss: mean cross-entropy. per_class: (right, all) for each class.
    top1_after_step: percent after each time step, if asked for."""

    top1: float
    top5: float
    loss: float
    samples: int
    per_class: tuple[tuple[int, int], ...]
    top1_after_step: tuple[float, ...] = ()
    unreadable: int = 0
    confusion: tuple[tuple[int, ...], ...] = field(default=(), repr=False)

    def summary(self) -> dict[str, float]:
        return {"top1": self.top1, "top5": self.top5, "loss": self.loss}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; after it, also after an error, every module is in the mode that it had."""
    were_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in were_training:
            module.training = True


def evaluate(
    model: nn.Module,
    loader: EvaluationLoader,
    classes: int,
    *,
    world: World | None = None,
    every_step: bool = False,
    dtype: torch.dtype = torch.float32,
    idle: torch.Tensor | None = None,
) -> Evaluation:
    """Runs the model over the loader in eval mode (and puts its mode back).

    Args:
        classes: number of classes C of the logits (B, C); the loader's labels are below it, which loaders check.
        every_step: also count after each time step, from model.forward_steps(x) (T, B, C).
        dtype: of the inputs.
        idle: for a model whose processes hold shares: an input (1, ...) to run, uncounted, while others have batches.

    Raises:
        ValueError: no sample of the part can be read.
    """
    # a sharded model keeps buffers between calls, and training could not use those of inference mode
    with evaluating(model), torch.inference_mode() if idle is None else torch.no_grad():
        return _evaluate(model, loader, classes, world or World(), every_step, dtype, idle)


def _evaluate(
    model: nn.Module,
    loader: EvaluationLoader,
    classes: int,
    world: World,
    every_step: bool,
    dtype: torch.dtype,
    idle: torch.Tensor | None,
) -> Evaluation:
    device = next(model.parameters()).device
    confusion = torch.zeros(classes * classes, dtype=torch.float64, device=device)  # row: label, column: prediction
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, right within five, unreadable
    right_after: torch.Tensor | None = None
    batches = loader.batches() if idle is None else in_step(loader.batches(), device)
    for batch in batches:
        if batch is None:
            model(idle)
            continue
        inputs = batch.inputs.to(dtype)
        steps = model.forward_steps(inputs) if every_step else None  # type: ignore[operator]
        logits = model(inputs) if steps is None else steps[-1]
        logits = logits.float() if dtype != torch.float64 else logits
        sums[0] += F.cross_entropy(logits, batch.labels, reduction="sum").double()
        best = logits.topk(min(5, classes), 1).indices
        sums[1] += (best == batch.labels[:, None]).any(1).sum()
        sums[2] += batch.unreadable
        confusion += torch.bincount(batch.labels * classes + best[:, 0], minlength=classes * classes)
        if steps is not None:
            counts = (steps.argmax(2) == batch.labels).sum(1).double()
            right_after = counts if right_after is None else right_after + counts
    sum_over_processes(confusion, world)
    sum_over_processes(sums, world)
    if right_after is not None:
        sum_over_processes(right_after, world)
    table = confusion.view(classes, classes).long().cpu()
    total = int(table.sum())
    if total == 0:
        raise ValueError("the evaluation part holds no readable sample")
    loss, top5, unreadable = sums.tolist()
    return Evaluation(
        top1=100.0 * int(table.diagonal().sum()) / total,
        top5=100.0 * top5 / total,
        loss=loss / total,
        samples=total,
        per_class=tuple((int(r), int(a)) for r, a in zip(table.diagonal(), table.sum(1), strict=True)),
        top1_after_step=() if right_after is None else tuple(100.0 * float(c) / total for c in right_after),
        unreadable=int(unreadable),
        confusion=tuple(tuple(row) for row in table.tolist()),
    )
