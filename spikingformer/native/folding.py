"""From an eval model to the products that the engines run: BatchNorm folded in float64, layers in call order.

The model is read by the attribute names of `spikingformer.models.Spikingformer`; nothing of it is kept.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class NeuronSpec:
    """Neuron of the published kind: hard reset to 0, decayed input."""

    tau: float
    threshold: float


@dataclass(frozen=True)
class Product:
    """One product with its BatchNorm folded in: current = conv(spikes, weight) + bias."""

    weight: Tensor  # (O, C, k, k) float64
    bias: Tensor  # (O,) float64
    neuron: NeuronSpec | None  # what fires behind it; None: nothing does
    pool: str | None = None  # "cml" before the neuron, "sps" after it
    stream: str = "none"  # residual stream: "write" starts it with these currents, "add" adds to it


@dataclass(frozen=True)
class AttentionSpec:
    """q (k^T v) * scale, then its neuron; q, k and v are the outputs of the product before, in this order."""

    heads: int
    scale: float
    neuron: NeuronSpec


@dataclass(frozen=True)
class Plan:
    """A model as the engines see it."""

    layers: tuple[Product | AttentionSpec, ...]  # the first one reads numbers, all others spikes
    head: nn.Module
    in_chans: int
    time_steps: int
    reduction: int  # pixels a side of one token


def neuron_spec(lif: Any) -> NeuronSpec:
    """The neuron of a LIF layer. Raises ValueError for a kind that the engines do not run."""
    c = lif.config
    if c.v_reset != 0 or not c.decay_input:
        raise ValueError(
            f"the engine runs neurons with v_reset 0 and decay_input, got v_reset={c.v_reset}, "
            f"decay_input={c.decay_input}: use the model itself"
        )
    return NeuronSpec(float(c.tau), float(c.v_threshold))


def fold(conv: nn.Conv2d, bn: Any) -> tuple[Tensor, Tensor]:
    """(weight, bias) in float64 of the convolution with its BatchNorm's running statistics folded in."""
    scale = bn.weight.detach().double() / (bn.running_var.double() + bn.eps).sqrt()
    shift = bn.bias.detach().double() - bn.running_mean.double() * scale
    bias = shift if conv.bias is None else shift + conv.bias.detach().double() * scale
    return conv.weight.detach().double() * scale[:, None, None, None], bias


def _product(layer: Any, neuron: NeuronSpec | None, stream: str = "none", pool: str | None = None) -> Product:
    return Product(*fold(layer.conv, layer.bn), neuron, pool, stream)


def plan_of(model: Any) -> Plan:
    """The plan of a Spikingformer (either downsampling). Raises ValueError for another family or a model in training."""
    if model.training:
        raise ValueError("the engine runs a model in eval mode, got one in training: call model.eval() first")
    if model.family() != "spikingformer":
        raise ValueError(f"the engine runs the spikingformer family, got {model.family()}: use the model itself")
    layers: list[Product | AttentionSpec] = [
        _product(stage, neuron_spec(stage.lif), pool=stage.pool) for stage in model.stem.stages
    ]
    blocks = list(model.blocks)
    layers.append(_product(model.stem.last, neuron_spec(blocks[0].attn.lif), "write"))
    for i, block in enumerate(blocks):
        attn, mlp = block.attn, block.mlp
        parts = [fold(p.conv, p.bn) for p in (attn.q, attn.k, attn.v)]
        weight, bias = (torch.cat(p) for p in zip(*parts, strict=True))
        layers.append(Product(weight, bias, neuron_spec(attn.q.lif)))
        layers.append(AttentionSpec(attn.heads, float(attn.scale), neuron_spec(attn.attn_lif)))
        layers.append(_product(attn.proj, neuron_spec(mlp.lif), "add"))
        layers.append(_product(mlp.fc1, neuron_spec(mlp.fc1.lif)))
        following = neuron_spec(blocks[i + 1].attn.lif) if i + 1 < len(blocks) else None
        layers.append(_product(mlp.fc2, following, "add"))
    c = model.config
    return Plan(tuple(layers), model.head, c.in_chans, c.time_steps, c.patch_size)
