"""Multi-step LIF on a GPU as a torch op: torch.compile and torch.export see one call.

x: (T, ...) currents in float32, bfloat16 or float16, any dense layout of a step, any time stride.
"""

import torch
import triton
from torch import Tensor

from ..config import LIFConfig
from .launch import (
    NEURON_ARGUMENTS,
    NEURON_SCHEMA,
    OPTIONS,
    check_float,
    elements_per_thread,
    empty_steps,
    in_layout,
    neuron_arguments,
    on_device,
    step_strides,
    time_stride,
)
from .lif_kernels import lif_backward, lif_forward
from .neuron import compile_time_neuron

STEPS_AT_ONCE = 16  # time steps that one kernel holds in registers; longer sequences run in pieces
WARPS = 4


def _pieces(steps: int) -> list[slice]:
    return [slice(t, min(t + STEPS_AT_ONCE, steps)) for t in range(0, steps, STEPS_AT_ONCE)]


def _launch_forward(x: Tensor, v: Tensor | None, s: Tensor | None, v_last: Tensor | None, config: LIFConfig) -> None:
    steps, neurons = x.shape[0], x[0].numel()
    block = 32 * WARPS * elements_per_thread(steps, x.element_size())
    with on_device(x):
        lif_forward[(triton.cdiv(neurons, block),)](
            x, v, s, v_last, neurons, time_stride(x),
            steps, compile_time_neuron(config), block, num_warps=WARPS, **OPTIONS,
        )  # fmt: skip


def _membrane(x: Tensor, strides: tuple[int, ...], wanted: bool) -> Tensor:
    """New float32 memory for one membrane per neuron, or an empty tensor: an op has no optional outputs."""
    return empty_steps(x, 1, strides, torch.float32)[0] if wanted else x.new_empty(0, dtype=torch.float32)


@torch.library.custom_op(
    "spikingformer::triton_lif",
    mutates_args=(),
    schema=f"(Tensor x, Tensor? v, bool want_membrane, {NEURON_SCHEMA}) -> (Tensor, Tensor)",
)
def triton_lif(x, v, want_membrane, *neuron):
    """(spikes, last membrane or an empty tensor); `v` is float32 and shaped like x[0]."""
    config = LIFConfig(*neuron)
    strides = step_strides(x)
    x = in_layout(x, strides)
    s = empty_steps(x, x.shape[0], strides, x.dtype)
    if v is not None:
        v = in_layout(v[None], strides)[0]
    pieces = _pieces(x.shape[0])
    for piece in pieces:
        v_last = _membrane(x, strides, True) if want_membrane or piece is not pieces[-1] else None
        _launch_forward(x[piece], v, s[piece], v_last, config)
        v = v_last
    return s, _membrane(x, strides, False) if v is None else v


@triton_lif.register_fake
def _(x, v, want_membrane, *neuron):
    strides = step_strides(x)
    return empty_steps(x, x.shape[0], strides, x.dtype), _membrane(x, strides, want_membrane)


@torch.library.custom_op(
    "spikingformer::triton_lif_backward",
    mutates_args=(),
    schema=f"(Tensor grad_s, Tensor? grad_v, Tensor x, Tensor? v, {NEURON_SCHEMA}) -> (Tensor, Tensor)",
)
def triton_lif_backward(grad_s, grad_v, x, v, *neuron):
    """(grad of x, grad of the first membrane or an empty tensor where `v` is None)."""
    config = LIFConfig(*neuron)
    strides = step_strides(x)
    x, grad_s = in_layout(x, strides), in_layout(grad_s, strides)
    grad_v = None if grad_v is None else in_layout(grad_v[None], strides)[0]
    starts = [None if v is None else in_layout(v[None], strides)[0]]
    grad_x = empty_steps(x, x.shape[0], strides, x.dtype)
    pieces = _pieces(x.shape[0])
    for piece in pieces[:-1]:  # the membranes at the seams, again
        v_last = _membrane(x, strides, True)
        _launch_forward(x[piece], starts[-1], None, v_last, config)
        starts.append(v_last)
    neurons = x[0].numel()
    for piece, start in zip(reversed(pieces), reversed(starts), strict=True):
        steps = piece.stop - piece.start
        block = 32 * WARPS * elements_per_thread(steps, x.element_size())
        grad_start = None if start is None else _membrane(x, strides, True)
        with on_device(x):
            lif_backward[(triton.cdiv(neurons, block),)](
                x[piece], start, grad_s[piece], grad_v, grad_x[piece], grad_start,
                neurons, time_stride(x[piece]), time_stride(grad_s[piece]),
                steps, compile_time_neuron(config), block, num_warps=WARPS, **OPTIONS,
            )  # fmt: skip
        grad_v = grad_start
    return grad_x, _membrane(x, strides, False) if grad_v is None else grad_v


@triton_lif_backward.register_fake
def _(grad_s, grad_v, x, v, *neuron):
    strides = step_strides(x)
    return empty_steps(x, x.shape[0], strides, x.dtype), _membrane(x, strides, v is not None)


def _setup_context(ctx, inputs, output):
    x, v, _, *neuron = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, v)
    ctx.neuron = neuron


def _backward(ctx, grad_s, grad_v):
    x, v = ctx.saved_tensors
    if grad_s is None:
        grad_s = torch.zeros_like(x)
    if grad_v is not None and grad_v.numel() == 0:
        grad_v = None
    grad_x, grad_start = triton_lif_backward(grad_s, grad_v, x, v, *ctx.neuron)
    return grad_x, None if v is None else grad_start, None, *[None] * NEURON_ARGUMENTS


triton_lif.register_autograd(_backward, setup_context=_setup_context)


def lif(
    x: Tensor, config: LIFConfig, v: Tensor | None = None, want_membrane: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Runs LIF neurons over x (T, ...); the meaning is `lif_reference`'s.

    `v` (...) is the membrane to start from, at rest when None; it is used in float32.
    Returns (spikes (T, ...) in x's dtype, last membrane (...) in float32, or None without `want_membrane`, which saves
    writing it). Backward keeps x alone.
    Raises ValueError for a dtype that is not float32, bfloat16 or float16.
    """
    check_float("currents", x)
    s, v_last = triton_lif(x, None if v is None else v.float(), want_membrane, *neuron_arguments(config))
    return s, v_last if want_membrane else None
