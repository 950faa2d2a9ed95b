"""A model as a list of steps between buffers of bits: what both engines run.

T: time steps, B: batch, C, O: channels in and out. Products carry BatchNorm folded in, in float64.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from spikingformer.layers import ConvBN, ConvBNLIF, folded_convolution
from spikingformer.models import ModelConfig, Spikformer, Spikingformer, SpikingTransformer
from spikingformer.models.whole import as_built
from spikingformer.neurons import LIFConfig


@dataclass(frozen=True)
class Product:
    """out = weight * input + bias; a kernel of 1x1 or 3x3, stride 1, same size."""

    name: str
    weight: Tensor  # (O, C, k, k)
    bias: Tensor  # (O,)
    source: str  # "picture", "bits" or "counts"
    into: str  # "current": a fresh buffer, "stream": set the residual stream, "add": add to it


@dataclass(frozen=True)
class Fire:
    """Neurons over all time steps: currents to bits. `pool` as in ConvBNLIF."""

    name: str
    lif: LIFConfig
    source: str  # "current" or "stream"
    pool: str | None = None


@dataclass(frozen=True)
class Attention:
    """Bits of q, k, v side by side to bits, through q (k^T v) * scale and a neuron."""

    name: str
    heads: int
    scale: float
    lif: LIFConfig


@dataclass(frozen=True)
class AddBits:
    """Spikformer's residual: counts += bits, or counts = bits."""

    name: str
    replace: bool = False


Step = Product | Fire | Attention | AddBits


@dataclass(frozen=True)
class Program:
    """Steps, then the head on the mean over tokens and time of the stream (currents, or counts for Spikformer)."""

    config: ModelConfig
    steps: tuple[Step, ...]
    head_weight: Tensor  # (num_classes, C) float64
    head_bias: Tensor  # (num_classes,) float64
    counts: bool  # the stream holds counts


def _product(name: str, layer: ConvBN | ConvBNLIF, source: str, into: str = "current") -> Product:
    return Product(name, *folded_convolution(layer.conv, layer.bn), source, into)


def _side_by_side(name: str, layers: tuple[ConvBNLIF, ...], source: str) -> Product:
    weights, biases = zip(*(folded_convolution(f.conv, f.bn) for f in layers), strict=True)
    return Product(name, torch.cat(weights), torch.cat(biases), source, "current")


def _stem(model: Any) -> list[Step]:
    steps: list[Step] = []
    for i, stage in enumerate(model.stem.stages):
        steps.append(_product(f"stem.stages.{i}", stage, "bits" if i else "picture"))
        steps.append(Fire(f"stem.stages.{i}.lif", stage.lif.config, "current", stage.pool))
    return steps


def _spikingformer(model: Any) -> list[Step]:
    steps = _stem(model)
    steps.append(_product("stem.last", model.stem.last, "bits", "stream"))
    for i, block in enumerate(model.blocks):
        a, m, at = block.attn, block.mlp, f"blocks.{i}"
        steps += [
            Fire(f"{at}.attn.lif", a.lif.config, "stream"),
            _side_by_side(f"{at}.attn.qkv", (a.q, a.k, a.v), "bits"),
            Fire(f"{at}.attn.qkv.lif", a.q.lif.config, "current"),
            Attention(f"{at}.attn", a.heads, a.scale, a.attn_lif.config),
            _product(f"{at}.attn.proj", a.proj, "bits", "add"),
            Fire(f"{at}.mlp.lif", m.lif.config, "stream"),
            _product(f"{at}.mlp.fc1", m.fc1, "bits"),
            Fire(f"{at}.mlp.fc1.lif", m.fc1.lif.config, "current"),
            _product(f"{at}.mlp.fc2", m.fc2, "bits", "add"),
        ]
    return steps


def _spikformer(model: Any) -> list[Step]:
    steps = _stem(model)
    rpe = model.stem.rpe
    steps += [
        AddBits("stem", replace=True),
        _product("stem.rpe", rpe, "bits"),
        Fire("stem.rpe.lif", rpe.lif.config, "current"),
        AddBits("stem.rpe"),
    ]
    for i, block in enumerate(model.blocks):
        a, m, at = block.attn, block.mlp, f"blocks.{i}"
        steps += [
            _side_by_side(f"{at}.attn.qkv", (a.q, a.k, a.v), "counts"),
            Fire(f"{at}.attn.qkv.lif", a.q.lif.config, "current"),
            Attention(f"{at}.attn", a.heads, a.scale, a.attn_lif.config),
            _product(f"{at}.attn.proj", a.proj, "bits"),
            Fire(f"{at}.attn.proj.lif", a.proj.lif.config, "current"),
            AddBits(f"{at}.attn"),
            _product(f"{at}.mlp.fc1", m.fc1, "counts"),
            Fire(f"{at}.mlp.fc1.lif", m.fc1.lif.config, "current"),
            _product(f"{at}.mlp.fc2", m.fc2, "bits"),
            Fire(f"{at}.mlp.fc2.lif", m.fc2.lif.config, "current"),
            AddBits(f"{at}.mlp"),
        ]
    return steps


def _computes_otherwise(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is not of a kind, or has methods of its own in place of that kind's."""
    if kind is nn.BatchNorm2d and isinstance(module, nn.Identity | nn.modules.batchnorm._BatchNorm):
        return False  # folded away, or with statistics of several processes
    if not isinstance(module, kind):
        return True
    own = {name for cls in type(module).__mro__ if not issubclass(kind, cls) for name in vars(cls)}
    return any(callable(getattr(kind, name, None)) for name in own | vars(module).keys() if not name.startswith("__"))


def _check_modules(model: SpikingTransformer, family: type[SpikingTransformer]) -> None:
    """Raises ValueError where the model computes something else than its configuration says; blocks may be missing."""
    expected = as_built(family, model.config)  # type: ignore[arg-type]
    for name, module in model.named_modules():
        kind = expected[name][0] if name in expected else type(module)
        if _computes_otherwise(module, kind):
            raise ValueError(
                f"the engine runs a {family.__name__} as it was built, but its {name or 'class'} was replaced or has "
                f"methods of its own (expected {kind.__name__}, got {type(module).__name__}): call the model itself"
            )


def build_program(model: nn.Module) -> Program:
    """The steps of a model of this package. Raises ValueError for any other, and where its modules or methods were
    replaced."""
    if not isinstance(model, Spikingformer | Spikformer):
        raise ValueError(f"the engine runs Spikformer and Spikingformer models, got {type(model).__name__}")
    if isinstance(model, Spikingformer):
        _check_modules(model, Spikingformer)
        steps = _spikingformer(model)
    else:
        _check_modules(model, Spikformer)
        steps = _spikformer(model)
    if isinstance(model.head, nn.Identity):
        raise ValueError("the engine needs a classifier: this model was made with num_classes=0")
    if not isinstance(model.head, nn.Linear):
        raise ValueError(f"the engine needs a head of one linear layer, got {type(model.head).__name__}")
    if model.head.bias is None:
        raise ValueError("the engine needs a classifier with a bias: give it one of zeros")
    return Program(
        replace(model.config, time_steps=model.time_steps),  # T may have been set since the model was made
        tuple(steps),
        model.head.weight.detach().double(),
        model.head.bias.detach().double(),
        counts=isinstance(model, Spikformer),
    )
