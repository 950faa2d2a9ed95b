"""What every op here needs around a launch: layouts, block sizes, the device, and the neuron in an op's schema.

Block sizes follow from shapes alone, so that a run is repeatable; nothing is tuned by timing.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spikingformer.native.inputs import is_dense

from ..config import LIFConfig

# The neuron's parameters as the ops' schemas list them, in the order of `neuron_arguments`.
NEURON_SCHEMA = (
    "float tau, float v_threshold, float? v_reset, str surrogate, float alpha, bool detach_reset, bool decay_input"
)
NEURON_ARGUMENTS = 7
FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
# Multiply-adds may fuse; wherever rounding decides about a spike the kernels ask for IEEE results themselves.
OPTIONS = {"enable_fp_fusion": True}

SUMMING_PROGRAMS = 1056  # 8 for each of an H200's 132 multiprocessors

NeuronArguments = tuple[float, float, float | None, str, float, bool, bool]


def neuron_arguments(config: LIFConfig) -> NeuronArguments:
    """`config` as the arguments of an op."""
    assert config.alpha is not None
    return (
        config.tau,
        config.v_threshold,
        config.v_reset,
        config.surrogate,
        config.alpha,
        config.detach_reset,
        config.decay_input,
    )


def check_float(name: str, x: Tensor) -> None:
    """Raises ValueError where the kernels have no form for x's type."""
    if x.dtype not in FLOAT_TYPES:
        raise ValueError(
            f"the Triton kernels take {name} in float32, bfloat16 or float16 (their state is float32), got {x.dtype}; "
            "cast it, or use the reference backend"
        )


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes x's card the current one: Triton launches there."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))[: len(shape)] if shape else ()


def step_strides(x: Tensor) -> tuple[int, ...]:
    """Strides of one time step x[0] of x (T, ...): its own where it is dense in any order of dims, else contiguous."""
    shape, strides = tuple(x.shape[1:]), x.stride()[1:]
    return strides if is_dense(shape, strides) else contiguous_strides(shape)


def empty_steps(x: Tensor, steps: int, strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """New memory for `steps` time steps like x[0], each laid out by `strides`."""
    shape = tuple(x.shape[1:])
    return torch.empty_strided((steps, *shape), (x[0].numel(), *strides), dtype=dtype, device=x.device)


def in_layout(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """x (T, ...) itself where each of its steps is laid out by `strides`, else a copy that is.

    The time stride is free: 0 for a still picture's repeated current.
    """
    own = x.stride()[1:]
    if all(a == b or n == 1 for n, a, b in zip(x.shape[1:], own, strides, strict=True)):
        return x
    return empty_steps(x, x.shape[0], strides, x.dtype).copy_(x)


def time_stride(x: Tensor) -> int:
    """Elements from one time step to the next, 0 where there is one step only."""
    return x.stride(0) if x.shape[0] > 1 else 0


def elements_per_thread(steps: int, itemsize: int) -> int:
    """16-byte accesses for few time steps; fewer elements, a power of two, where more steps share the registers."""
    fit = max(1, min(16 // itemsize, 32 // steps))
    return 1 << (fit.bit_length() - 1)


def power_of_two_at_least(n: int) -> int:
    """The smallest power of two >= n (n >= 1)."""
    return 1 << (n - 1).bit_length()


def empty_channels_last(y: Tensor, steps: int, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """New memory (steps, B, C, *size), channels last, with y's B and C."""
    height, width = size
    shape = (steps, y.shape[1], height, width, y.shape[2])
    return torch.empty(shape, dtype=dtype, device=y.device).permute(0, 1, 4, 2, 3)


@dataclass(frozen=True)
class Tiles:
    """How rows x channels are cut: tiles of block_rows x block_channels, and chunks of tiles for the sums."""

    rows: int
    channels: int
    block_rows: int
    block_channels: int
    chunk: int  # rows of one program that sums, a multiple of block_rows
    chunks: int
    warps: int = 4

    @staticmethod
    def of(rows: int, channels: int, live: int, itemsize: int) -> "Tiles":
        """`live`: tiles that a program holds in registers at once, about the number of time steps."""
        exact = channels & -channels  # largest power of two in it: no idle lanes
        block_channels = min(128, exact if exact >= 32 else power_of_two_at_least(channels))
        block_rows = max(1, 128 * elements_per_thread(live, itemsize) // block_channels)
        wanted = max(1, SUMMING_PROGRAMS // -(-channels // block_channels))
        tiles = -(-rows // block_rows)
        chunk = -(-tiles // wanted) * block_rows
        return Tiles(rows, channels, block_rows, block_channels, chunk, -(-rows // chunk))

    @property
    def grid(self) -> tuple[int, int]:
        """One program a tile."""
        return -(-self.rows // self.block_rows), -(-self.channels // self.block_channels)

    @property
    def chunk_grid(self) -> tuple[int, int]:
        """One program a chunk and block of channels."""
        return self.chunks, -(-self.channels // self.block_channels)
