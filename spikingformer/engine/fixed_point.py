"""The integer form of a program: int8 weights per output channel, 16-bit fixed-point currents and membranes.

Only weights (to 8 bits) and currents (to 2^-10) are rounded. One unit of current is 2^-FRACTION_BITS.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from spikingformer.neurons import LIFConfig

from .program import Product, Program

FRACTION_BITS = 10  # currents and membranes: steps of 1/1024, range +-32
LEAK_BITS = 14  # of the leak's two factors, which sum to 2^14
INPUT_BITS = {"picture": 11, "events": 4}  # fraction bits of the first product's input (standardised values; counts)


@dataclass(frozen=True)
class IntegerProduct:
    """current = rint(float32(sum of weight * input) * scale + bias), within int16; scale and bias in float32."""

    weight: Tensor  # (O, C, k, k) int8
    scale: Tensor  # (O,) float32
    bias: Tensor  # (O,) float32


@dataclass(frozen=True)
class IntegerNeuron:
    """h = (v * keep + x * take + 2^13) >> 14; fires at h >= threshold and then starts from 0."""

    keep: int
    take: int
    threshold: int


def input_bits(program: Program) -> int:
    """Fraction bits of the input: fewer for event counts, which reach further."""
    return INPUT_BITS["events" if program.config.takes_events else "picture"]


def quantize_product(step: Product, source_bits: int = 0) -> IntegerProduct:
    """Largest weight of an output channel to 127; `source_bits`: fraction bits of the input (0 for spikes)."""
    largest = step.weight.flatten(1).abs().amax(1)
    unit = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
    weight = (step.weight / unit[:, None, None, None]).round().clamp(-127, 127).to(torch.int8)
    one = 2.0**FRACTION_BITS
    return IntegerProduct(weight, (unit * one / 2**source_bits).float(), (step.bias * one).float())


def quantize_neuron(config: LIFConfig) -> IntegerNeuron:
    """Raises ValueError for a neuron that the integer form does not have."""
    if config.v_reset != 0 or not config.decay_input:
        raise ValueError(
            f"the integer engine has neurons with v_reset=0 and decay_input=True, got v_reset={config.v_reset}, "
            f"decay_input={config.decay_input}: use the float engine"
        )
    keep = round((1 - 1 / config.tau) * 2**LEAK_BITS)
    threshold = round(config.v_threshold * 2**FRACTION_BITS)
    if not 0 < threshold < 2**15:
        raise ValueError(f"the integer engine needs 0 < v_threshold < 32, got {config.v_threshold}")
    return IntegerNeuron(keep, 2**LEAK_BITS - keep, threshold)


def quantize_scale(scale: float) -> int:
    """Attention's factor in units of current per count. Raises ValueError where it is not a whole number of them."""
    units = scale * 2**FRACTION_BITS
    if units != round(units) or not 0 < units < 2**15:
        raise ValueError(
            f"attention_scale must be a multiple of 2^-{FRACTION_BITS} below 32, got {scale}: use the float engine"
        )
    return round(units)


def quantize_input(x: Tensor, bits: int) -> Tensor:
    """Pictures or event counts to int16 fixed point (any shape)."""
    exact = x if x.dtype in (torch.float32, torch.float64) else x.float()  # a power of two changes no digit
    return (exact * 2.0**bits).round().clamp(-(2**15), 2**15 - 1).to(torch.int16)
