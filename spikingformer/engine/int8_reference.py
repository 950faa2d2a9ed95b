"""The definition of the integer engine, in plain integers: the C++ engine equals it bit for bit.

Written for reading, not for speed. Shapes: (T, B, C, H, W) throughout; sums are exact in float64 and int64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from spikingformer.layers import from_heads, max_pool, to_heads

from .fixed_point import (
    FRACTION_BITS,
    LEAK_BITS,
    IntegerNeuron,
    IntegerProduct,
    input_bits,
    quantize_input,
    quantize_neuron,
    quantize_product,
    quantize_scale,
)
from .program import AddBits, Attention, Fire, Product, Program

LOWEST, HIGHEST = -(2**15), 2**15 - 1


def product(x: Tensor, p: IntegerProduct) -> Tensor:
    """Integers (T, B, C, H, W) to currents (T, B, O, H, W), int64 within int16."""
    k = p.weight.shape[-1]
    sums = F.conv2d(x.flatten(0, 1).double(), p.weight.double(), padding=k // 2).to(torch.int64)
    currents = sums.float() * p.scale[:, None, None] + p.bias[:, None, None]
    return currents.clamp(LOWEST, HIGHEST).round().to(torch.int64).unflatten(0, x.shape[:2])


def neuron(x: Tensor, n: IntegerNeuron) -> Tensor:
    """Currents (T, ...) to spikes 0/1, int64."""
    v = torch.zeros_like(x[0])
    spikes = []
    for current in x:
        h = (v * n.keep + current * n.take + (1 << (LEAK_BITS - 1))) >> LEAK_BITS
        s = (h >= n.threshold).to(torch.int64)
        v = h * (1 - s)
        spikes.append(s)
    return torch.stack(spikes)


def attention(bits: Tensor, heads: int, scale: int, n: IntegerNeuron) -> Tensor:
    """q, k, v side by side (T, B, 3C, H, W) to spikes (T, B, C, H, W). Counts and currents saturate at 2^15 - 1."""
    q, k, v = (to_heads(x, heads).double() for x in bits.chunk(3, 2))
    counts = (q @ (k.mT @ v)).to(torch.int64)
    currents = counts.clamp(max=HIGHEST // scale) * scale
    return neuron(from_heads(currents, bits.shape[3:]), n)


def pool(x: Tensor) -> Tensor:
    return max_pool(x.double()).to(torch.int64)


@torch.no_grad()
def run(program: Program, x: Tensor) -> Tensor:
    """Pictures (B, C, H, W) or event frames (B, T, C, H, W) to logits after each step (T, B, num_classes), float64."""
    still = x.ndim == 4
    steps = program.config.time_steps if still else x.shape[1]
    bits_of_input = input_bits(program)
    now = quantize_input(x, bits_of_input).to(torch.int64)  # what the next step reads
    now = now[None] if still else now.transpose(0, 1)
    stream = now
    for step in program.steps:
        if isinstance(step, Product):
            source = stream if step.source == "counts" else now
            q = quantize_product(step, bits_of_input if step.source == "picture" else 0)
            current = product(source, q)
            if step.source == "picture" and still:
                current = current.expand(steps, *current.shape[1:])
            if step.into == "current":
                now = current
            else:
                stream = current if step.into == "stream" else (stream + current).clamp(LOWEST, HIGHEST)
        elif isinstance(step, Fire):
            current = stream if step.source == "stream" else now
            spikes = neuron(pool(current) if step.pool == "cml" else current, quantize_neuron(step.lif))
            now = pool(spikes) if step.pool == "sps" else spikes
        elif isinstance(step, Attention):
            now = attention(now, step.heads, quantize_scale(step.scale), quantize_neuron(step.lif))
        else:
            assert isinstance(step, AddBits)
            stream = now if step.replace else stream + now
    sums = stream.sum((3, 4)).cumsum(0)
    tokens = stream.shape[3] * stream.shape[4]
    return logits_of(program, sums, tokens)


def logits_of(program: Program, sums: Tensor, tokens: int) -> Tensor:
    """Cumulative integer sums (T, B, C) to logits after each step (T, B, num_classes), float64."""
    unit = 1.0 if program.counts else 2.0**-FRACTION_BITS
    steps = torch.arange(1, len(sums) + 1, dtype=torch.float64)[:, None, None]
    features = sums.double() * unit / (tokens * steps)
    # Added up one by one, in the order of the channels: float64 sums depend on it
    products = features[:, :, None] * program.head_weight
    return products.cumsum(-1)[..., -1] + program.head_bias
