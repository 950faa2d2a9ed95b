"""Anytime inference: a sample stops at the first time step whose softmax margin reaches a threshold.

The margin is the probability of the first class minus that of the second. T: time steps, N: samples, K: classes.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spikingformer.energy import Facts, get_preset
from spikingformer.models import SpikingTransformer, StreamState
from spikingformer.training.evaluation import evaluating

THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, math.inf)


@dataclass(frozen=True)
class AnytimePoint:
    """Accuracy and cost at one threshold."""

    threshold: float  # smallest margin to stop at; infinity: never stop before the last step
    accuracy: float  # percent
    mean_steps: float
    energy_mj: float | None  # mean per sample, by the preset of the estimate; None without an estimate
    stopped_at: tuple[float, ...]  # share of samples that stop after step 1, 2, ..., T


@torch.no_grad()
def step_logits(model: SpikingTransformer, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(logits after each time step (T, N, K), labels (N,)) over batches of (inputs, labels), in eval mode."""
    logits, labels = [], []
    with evaluating(model):
        for x, y in batches:
            logits.append(model.forward_steps(x).float().cpu())
            labels.append(y.cpu())
    if not logits:
        raise ValueError("there are no samples to evaluate")
    return torch.cat(logits, 1), torch.cat(labels)


def margins(logits: Tensor) -> Tensor:
    """Softmax margin of logits (..., K): (...). Raises ValueError for fewer than two classes."""
    if logits.shape[-1] < 2:
        raise ValueError(f"a margin needs at least two classes, got {logits.shape[-1]}")
    best = logits.float().softmax(-1).topk(2, -1).values
    return best[..., 0] - best[..., 1]


def stopping_steps(logits: Tensor, threshold: float) -> Tensor:
    """The time step (1 ... T) after which each sample stops, (N,), for logits after each step (T, N, K)."""
    _check_threshold(threshold)
    never = torch.zeros(logits.shape[:2], dtype=torch.bool, device=logits.device)
    passed = margins(logits) >= threshold if threshold < 1 else never
    passed[-1] = True
    return passed.int().argmax(0) + 1


def anytime_curve(
    logits: Tensor,
    labels: Tensor,
    thresholds: Sequence[float] = THRESHOLDS,
    energy_by_step: Sequence[float] | None = None,
) -> list[AnytimePoint]:
    """Accuracy, mean steps and mean energy at each threshold.

    logits: (T, N, K) after each time step (`step_logits`); labels: (N,). energy_by_step: mJ of each time step
    (`energy_by_step`). Raises ValueError if the shapes do not fit together.
    """
    if logits.ndim != 3 or logits.shape[1] != len(labels):
        raise ValueError(f"expected logits (T, N, K) and labels (N,), got {tuple(logits.shape)}, {tuple(labels.shape)}")
    steps = len(logits)
    if energy_by_step is not None and len(energy_by_step) != steps:
        raise ValueError(f"expected the energy of {steps} time steps, got {len(energy_by_step)}")
    right = logits.argmax(-1) == labels  # (T, N)
    energy = None if energy_by_step is None else torch.tensor(energy_by_step, dtype=torch.float64).cumsum(0)
    points = []
    for threshold in thresholds:
        stop = stopping_steps(logits, threshold)
        correct = right.gather(0, (stop - 1)[None])[0]
        points.append(
            AnytimePoint(
                threshold=threshold,
                accuracy=100 * correct.double().mean().item(),
                mean_steps=stop.double().mean().item(),
                energy_mj=None if energy is None else energy[stop - 1].mean().item(),
                stopped_at=tuple((stop == t + 1).double().mean().item() for t in range(steps)),
            )
        )
    return points


def energy_by_step(facts: Facts, preset: str = "exact") -> tuple[float, ...]:
    """mJ per sample of each time step, from counts of whole runs (`spikingformer.energy.count_operations`).

    A product's energy is split over the steps in proportion to its input's spikes. What a still picture needs only once
    counts in step 1. The rest (neurons, additions) is the same in every step. The sum is the estimate for all T steps.
    """
    steps = facts.time_steps
    shares = {
        p.name: [1.0] + [0.0] * (steps - 1)
        if p.stands_for > 1
        else _shares([float(n) for n in p.input.nonzero_by_step], steps)
        for p in facts.products
    }
    even = [1 / steps] * steps
    cost = [0.0] * steps
    for line in get_preset(preset).price(facts).lines:
        for t, share in enumerate(shares.get(line.name, even)):
            cost[t] += share * line.energy_pj / 1e9
    return tuple(cost)


def _shares(counts: list[float], steps: int) -> list[float]:
    total = sum(counts)
    return [c / total for c in counts] if len(counts) == steps and total else [1 / steps] * steps


@torch.no_grad()
def predict_anytime(model: SpikingTransformer, x: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Runs `model` step by step and drops each sample from the batch once it has stopped.

    x: pictures (B, C, H, W) or event frames (B, T, C, H, W). Returns, on its device, (logits (B, K) at the stop, steps
    taken (B,)). Raises ValueError for another shape, and for a threshold that is not above 0.
    """
    _check_threshold(threshold)
    model.frames(x)  # raises for a shape that the model does not take
    frames = x.unbind(1) if x.ndim == 5 else (x,) * model.time_steps
    running = torch.arange(len(x), device=x.device)
    logits = torch.empty(0, device=x.device)
    taken = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    state: StreamState | None = None
    for t, frame in enumerate(frames, 1):
        now, state = model.stream(frame[running], state)
        if t == 1:
            logits = torch.zeros(now.shape, device=x.device)  # a head of the user's own decides K, not num_classes
        if threshold >= 1 or t == len(frames):
            stops = torch.full((len(running),), t == len(frames), device=x.device)
        else:
            stops = margins(now) >= threshold
        logits[running[stops]], taken[running[stops]] = now[stops].float(), t
        state = _rows(state, ~stops)
        running = running[~stops]
        if not len(running):
            break
    return logits, taken


def _check_threshold(threshold: float) -> None:
    if threshold <= 0 or math.isnan(threshold):
        raise ValueError(f"a threshold is a margin above 0 (1 or more: never stop early), got {threshold}")


def _rows(state: StreamState, kept: Tensor) -> StreamState:
    return replace(state, membranes=tuple(v[kept] for v in state.membranes), feature_sum=state.feature_sum[kept])


def format_curve(points: Sequence[AnytimePoint]) -> str:
    """The curve as a table for a terminal."""
    rows = [f"{'margin':>7} {'accuracy':>9} {'steps':>6} {'energy mJ':>10}"]
    for p in points:
        margin = "all" if math.isinf(p.threshold) else f"{p.threshold:g}"
        energy = "-" if p.energy_mj is None else f"{p.energy_mj:.4g}"
        rows.append(f"{margin:>7} {p.accuracy:8.2f}% {p.mean_steps:6.2f} {energy:>10}")
    return "\n".join(rows)
