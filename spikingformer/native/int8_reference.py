"""The definition of the integer engine: plain integer arithmetic, slow and short. The engine equals it bit for bit.

Numbers: currents, membranes and the residual stream are fixed point with 12 fractional bits (ONE = 4096).

- Weights: int8, one scale a channel: q = round(w / s), s = max|w| / 127, w with BatchNorm folded in.
- Sums of weights: exact integers, clamped to +-(2^17 - 1).
- Current: (sum * M + 2^(shift - 1)) >> shift, plus the bias in fixed point; M / 2^shift stands for s * ONE, M < 2^14.
- Neuron: h = v + ((clamp(x - v, +-(2^18 - 1)) * round(4096 / tau)) >> 12); fires at h >= threshold; then v = 0.
- Attention: q (k^T v) is an integer; times round(scale * ONE) it is a current.
- Stem's first convolution: input round(x * 1024) in int16, weights in 11 bits, sums >> 13, then as above.
- Head: sums over tokens and time are exact; their mean goes through the float head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .folding import AttentionSpec, NeuronSpec, Plan, Product

FRACTION_BITS = 12
ONE = 1 << FRACTION_BITS
SUM_LIMIT = (1 << 17) - 1
STEP_LIMIT = (1 << 18) - 1
INPUT_ONE = 1024
STEM_SUM_SHIFT = 13


@dataclass(frozen=True)
class IntegerProduct:
    """A quantised product; see the module's text."""

    weight: Tensor  # (O, C, k, k) int32: int8 values, in the stem's first one 11 bits
    multiplier: Tensor  # (O,) int32
    shift: Tensor  # (O,) int32, 1 to 30
    bias: Tensor  # (O,) int32, fixed point
    stem: bool
    spec: Product


def quantise(product: Product, stem: bool) -> IntegerProduct:
    """Quantises one product, an output channel at a time."""
    largest = 1023 if stem else 127
    weight = product.weight
    scale = weight.abs().amax((1, 2, 3)) / largest
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    q = torch.round(weight / scale[:, None, None, None])
    factor = scale * ONE * ((1 << STEM_SUM_SHIFT) / INPUT_ONE if stem else 1)
    shift = torch.floor(torch.log2((1 << 14) / factor)).clamp(1, 30)
    multiplier = torch.round(factor * 2**shift).clamp(max=(1 << 14) - 1)
    bias = torch.round(product.bias * ONE).clamp(-(2**29), 2**29)
    return IntegerProduct(q.int(), multiplier.int(), shift.int(), bias.int(), stem, product)


def keep_factor(neuron: NeuronSpec) -> int:
    """round(4096 / tau)."""
    return round(ONE / neuron.tau)


def quantise_input(x: Tensor) -> Tensor:
    """Pictures or frames to the stem's int16 numbers."""
    return torch.round(x.float() * INPUT_ONE).clamp(-32767, 32767).to(torch.int16)


def _product(x: Tensor, p: IntegerProduct) -> Tensor:
    """x (T, B, C, H, W) integers -> currents int64, same layout. float64 sums of integers below 2^53 are exact."""
    y = F.conv2d(x.flatten(0, 1).double(), p.weight.double(), padding=p.weight.shape[2] // 2)
    total = y.long().unflatten(0, x.shape[:2])
    if p.stem:
        total = total >> STEM_SUM_SHIFT
    total = total.clamp(-SUM_LIMIT, SUM_LIMIT)
    shift, multiplier, bias = (v.long()[:, None, None] for v in (p.shift, p.multiplier, p.bias))
    return ((total * multiplier + (1 << (shift - 1))) >> shift) + bias


def _fire(x: Tensor, neuron: NeuronSpec) -> Tensor:
    """Currents (T, ...) int64 to spikes int64."""
    v, spikes = torch.zeros_like(x[0]), []
    for current in x:
        d = (current - v).clamp(-STEP_LIMIT, STEP_LIMIT)
        h = v + ((d * keep_factor(neuron)) >> 12)
        s = (h >= round(neuron.threshold * ONE)).long()
        spikes.append(s)
        v = h * (1 - s)
    return torch.stack(spikes)


def _max_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x.flatten(0, 1).double(), 3, 2, 1).long().unflatten(0, x.shape[:2])


def _attention(s: Tensor, spec: AttentionSpec) -> Tensor:
    size = s.shape[3:]
    q, k, v = (p.flatten(3).unflatten(2, (spec.heads, -1)).transpose(3, 4).double() for p in s.chunk(3, 2))
    y = (q @ (k.transpose(3, 4) @ v)).long() * round(spec.scale * ONE)
    return _fire(y.transpose(3, 4).flatten(2, 3).unflatten(3, size), spec.neuron)


def run(plan: Plan, frames: Tensor, repeats: int) -> Tensor:
    """Frames (t, B, C, H, W), each standing for `repeats` steps, to logits (B, classes)."""
    s, stream, first = quantise_input(frames), torch.empty(0), True
    for layer in plan.layers:
        if isinstance(layer, AttentionSpec):
            s = _attention(s, layer)
            continue
        x = _product(s, quantise(layer, stem=first))
        if first:
            x = x.expand(x.shape[0] * repeats, *x.shape[1:])
        first = False
        if layer.stream != "none":
            stream = x = x if layer.stream == "write" else stream + x
        if layer.neuron is None:
            continue
        if layer.pool == "cml":
            x = _max_pool(x)
        s = _fire(x, layer.neuron)
        if layer.pool == "sps":
            s = _max_pool(s)
    t, _, _, h, w = stream.shape
    return plan.head((stream.sum((0, 3, 4)).double() / (t * h * w * ONE)).float())
