"""What a model does with chosen samples: predictions, spikes and attention, time step by time step.

T: time steps, B: samples, C: channels, h, w: rows and columns of a layer's map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from spikingformer.layers import to_heads
from spikingformer.models import SpikingTransformer
from spikingformer.models.spikformer import Block as SpikformerBlock
from spikingformer.models.spikingformer import Block as SpikingformerBlock
from spikingformer.neurons.observe import observed_spikes

from . import pictures

RASTER_NEURONS = 48  # shown a layer
SHOWN = 192  # pixels a side of a sample


@dataclass
class SampleView:
    """One sample, ready for the page. Lists of images hold one data URI a time step."""

    index: int
    label: str
    prediction: str
    right: bool
    steps: list[tuple[str, float]]  # (class, probability) after each time step
    frames: list[str]
    maps: list[tuple[str, list[str]]] = field(default_factory=list)  # (layer, spikes over channels)
    attention: list[tuple[str, list[str]]] = field(default_factory=list)  # (block, attention a token receives)
    rasters: list[tuple[str, str, float]] = field(default_factory=list)  # (layer, image, firing rate)


def choose_samples(labels: Tensor, predictions: Tensor, count: int) -> list[int]:
    """Indices of samples worth a look: a third wrong where there are any, the rest right, of many classes."""
    wrong = (labels != predictions).nonzero().flatten().tolist()
    chosen = _spread(wrong, labels, count // 3)
    right = (labels == predictions).nonzero().flatten().tolist()
    return _spread(right, labels, count - len(chosen)) + chosen


def _spread(indices: Sequence[int], labels: Tensor, count: int) -> list[int]:
    """The first `count` of the indices, taking the classes in turn."""
    turns: dict[int, int] = {}
    ranked = []
    for i in indices:
        label = int(labels[i])
        turns[label] = turns.get(label, 0) + 1
        ranked.append((turns[label], i))
    return [i for _, i in sorted(ranked)[:count]]


@torch.no_grad()
def view_samples(
    model: SpikingTransformer,
    x: Tensor,
    labels: Tensor,
    indices: Sequence[int],
    class_names: Sequence[str],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> list[SampleView]:
    """Runs the model on x (B, C, H, W) or (B, T, C, H, W) and pictures what happens inside."""
    spikes, attention = _observe(model, x)
    steps = _predictions(model, x)
    layers = _shown_layers(list(spikes))
    views = []
    for b, index in enumerate(indices):
        frames = _frames(x[b], mean, std)
        predicted = [(class_names[int(p.argmax())], float(p.max())) for p in steps[:, b]]
        right = int(steps[-1, b].argmax()) == int(labels[b])
        view = SampleView(index, class_names[int(labels[b])], predicted[-1][0], right, predicted,
                          [pictures.data_uri(f) for f in frames])  # fmt: skip
        for name in layers:
            s = spikes[name][:, b]
            rates = s.mean(1)  # (T, h, w)
            top = float(rates.max())
            view.maps.append((name, [pictures.data_uri(pictures.colour_map(m, top)) for m in rates]))
            view.rasters.append((name, pictures.data_uri(pictures.raster(_pick(s))), float(s.mean())))
        for name, received in attention.items():
            maps = received[:, b]
            over = [pictures.overlay(frames[min(t, len(frames) - 1)], m) for t, m in enumerate(maps)]
            view.attention.append((name, [pictures.data_uri(i) for i in over]))
        views.append(view)
    return views


def _observe(model: SpikingTransformer, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Spikes of every neuron layer (T, B, C, h, w), and for every block the attention that each token receives."""
    with observed_spikes(model) as fired:
        model(x)
    spikes = {name.removesuffix(".lif"): s.float() for name, s in fired.items()}
    attention: dict[str, Tensor] = {}
    for i, block in enumerate(model.blocks):
        q, k = (spikes[f"blocks.{i}.attn.{part}"] for part in "qk")
        assert isinstance(block, (SpikingformerBlock, SpikformerBlock))
        heads = block.attn.heads
        weight = to_heads(q, heads).sum(3, keepdim=True)  # every query at once
        received = (to_heads(k, heads) * weight).sum((2, 4))  # (T, B, N): sum over heads of (sum of q) k
        attention[f"block {i}"] = received.unflatten(2, k.shape[3:])
    return spikes, attention


def _predictions(model: SpikingTransformer, x: Tensor) -> Tensor:
    """Class probabilities after each time step, (T, B, classes)."""
    return model.forward_steps(x).float().softmax(2)


def _shown_layers(names: list[str]) -> list[str]:
    """The stem's layers and those of the first and last block that meet the eye first."""
    stem = [n for n in names if n.startswith("stem")]
    blocks = sorted({n.split(".")[1] for n in names if n.startswith("blocks.")}, key=int)
    kept = [f"blocks.{i}.{part}" for i in dict.fromkeys([blocks[0], blocks[-1]])
            for part in ("attn.q", "attn.v", "mlp.fc1")]  # fmt: skip
    return [n for n in stem if not n.endswith("rpe")][-3:] + [n for n in kept if n in names]


def _pick(s: Tensor) -> Tensor:
    """(T, C, h, w) to (neurons, T): evenly spaced among those that fire, silent ones only where these are too few."""
    flat = s.flatten(1)
    fires = flat.sum(0) > 0
    active, silent = fires.nonzero().flatten(), (~fires).nonzero().flatten()
    count = min(RASTER_NEURONS, flat.shape[1])
    if len(active) < count:
        active = torch.cat([active, silent[: count - len(active)]])
    return flat[:, active[torch.linspace(0, len(active) - 1, count).long()]].T


def _frames(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> list[Image.Image]:
    if x.ndim == 3:
        images = [pictures.picture(x, mean, std)]
    else:
        most = float(x.flatten(1).float().quantile(0.995)) if x.numel() < 1e7 else float(x.max()) / 2
        images = [pictures.event_frame(f, max(most, 1.0)) if len(f) == 2 else pictures.picture(f, mean, std) for f in x]
    side = max(images[0].size)
    if side >= SHOWN:
        return images
    scale = -(-SHOWN // side)
    return [i.resize((i.width * scale, i.height * scale), Image.Resampling.NEAREST) for i in images]
