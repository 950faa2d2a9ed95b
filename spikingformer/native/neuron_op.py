"""The multi-step LIF neuron as a torch op: `torch.ops.spikingformer.lif`, forward and backward one pass each.

T: time steps first. The op is elementwise over everything but T, so any layout whose single steps are dense
(contiguous, channels_last, ...) is served without a copy, and a current repeated over T may have time stride 0.
"""

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .eager import register, register_differentiable
from .inputs import is_dense
from .library import kernel, threads
from .memory import empty_strided

if TYPE_CHECKING:
    from spikingformer.neurons import LIFConfig

ELEMENT_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


class NeuronArgs(ctypes.Structure):
    """`NeuronArgs` of src/common.h."""

    _fields_ = [
        ("tau", ctypes.c_double), ("v_threshold", ctypes.c_double), ("v_reset", ctypes.c_double),
        ("alpha", ctypes.c_double), ("hard_reset", ctypes.c_int32), ("detach_reset", ctypes.c_int32),
        ("decay_input", ctypes.c_int32), ("surrogate", ctypes.c_int32), ("steps", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    ]  # fmt: skip


def neuron_args(
    steps: int,
    tau: float,
    v_threshold: float,
    v_reset: float | None,
    surrogate: int,
    alpha: float,
    detach_reset: bool,
    decay_input: bool,
) -> NeuronArgs:
    """The neuron's constants as the kernels take them."""
    return NeuronArgs(
        tau, v_threshold, v_reset or 0.0, alpha, v_reset is not None, detach_reset, decay_input, surrogate, steps, 0
    )


def neuron_constants(config: "LIFConfig") -> tuple[float, float, float | None, int, float, bool, bool]:
    """The neuron's constants in the order in which the torch ops take them."""
    from spikingformer.neurons.surrogate import get_surrogate

    surrogate = get_surrogate(config.surrogate)
    index = surrogate.index or 0  # None: only forward passes come here with it (choose_backend), which read none
    alpha = surrogate.alpha if config.alpha is None else config.alpha
    return (
        config.tau, config.v_threshold, config.v_reset, index, alpha, config.detach_reset, config.decay_input,
    )  # fmt: skip


def dense_steps(x: Tensor) -> Tensor:
    """x (T, ...) itself where each x[t] is dense in memory, else a contiguous copy."""
    return x if x.numel() == 0 or is_dense(x.shape[1:], x.stride()[1:]) else x.contiguous()


def _step_strides(x: Tensor) -> tuple[int, ...]:
    """Strides of x's shape (T, ...) with one step after another, each in x's own layout."""
    return (max(x[0].numel(), 1), *x.stride()[1:])


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def like_steps(grad: Tensor, x: Tensor) -> Tensor:
    """`grad` in x's dtype with `_step_strides(x)`; itself where it has them already."""
    target_stride = _step_strides(x)
    same = all(a == b or n == 1 for a, b, n in zip(grad.stride(), target_stride, grad.shape, strict=True))
    return grad if same and grad.dtype == x.dtype else empty_strided(x.shape, target_stride, x.dtype).copy_(grad)


def _like_state(v: Tensor, x: Tensor) -> Tensor:
    """v (...) in the state's dtype and in the layout of one step of x."""
    state = v.new_empty_strided(x.shape[1:], x.stride()[1:], dtype=_state_dtype(x))
    same = v.dtype == state.dtype and v.stride() == state.stride()
    return v if same else state.copy_(v)


def address_of(x: Tensor | None) -> int | None:
    """Where x's elements lie; None for no tensor, or one without elements."""
    return None if x is None or x.numel() == 0 else x.data_ptr()


op_library = torch.library.Library("spikingformer", "FRAGMENT")
NEURON_SCHEMA = (
    "float tau, float v_threshold, float? v_reset, int surrogate, float alpha, bool detach_reset, bool decay_input"
)
op_library.define(f"lif(Tensor x, Tensor? v0, {NEURON_SCHEMA}, bool want_membrane) -> (Tensor, Tensor)")
op_library.define(
    "lif_backward(Tensor grad_spikes, Tensor? grad_v_last, Tensor x, Tensor? v0, bool need_grad_v0, "
    f"{NEURON_SCHEMA}) -> (Tensor, Tensor)"
)


def _check(x: Tensor, v0: Tensor | None) -> None:
    if x.dtype not in ELEMENT_TYPES:
        names = ", ".join(str(t) for t in ELEMENT_TYPES)
        raise ValueError(f"lif takes {names}, got {x.dtype}: convert the currents first")
    if x.dim() < 1 or x.shape[0] < 1:
        raise ValueError(f"lif takes currents (T, ...) with at least one time step, got shape {tuple(x.shape)}")
    if v0 is not None and v0.shape != x.shape[1:]:
        raise ValueError(f"the membrane must have shape {tuple(x.shape[1:])} like one step of x, got {tuple(v0.shape)}")


def _membrane_layout(x: Tensor, wanted: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of the last membrane, or of the empty tensor that stands for it."""
    return (x.shape[1:], x.stride()[1:]) if wanted else ((0,), (1,))


def _lif_cpu(x: Tensor, v0: Tensor | None, *settings) -> tuple[Tensor, Tensor]:
    _check(x, v0)
    *constants, want_membrane = settings
    x = dense_steps(x)
    spikes = empty_strided(x.shape, _step_strides(x), x.dtype)
    v_last = spikes.new_empty_strided(*_membrane_layout(x, want_membrane), dtype=_state_dtype(x))
    n = x[0].numel()
    if n:
        start = None if v0 is None else _like_state(v0, x)
        args = neuron_args(x.shape[0], *constants)
        kernel("lif_forward", "piplpppli")(
            ctypes.byref(args), ELEMENT_TYPES[x.dtype], x.data_ptr(), x.stride(0), address_of(start), spikes.data_ptr(),
            v_last.data_ptr() if want_membrane else None, n, threads(),
        )  # fmt: skip
    return spikes, v_last


def _lif_fake(x: Tensor, v0: Tensor | None, *settings) -> tuple[Tensor, Tensor]:
    _check(x, v0)
    x = dense_steps(x)
    membrane = x.new_empty_strided(*_membrane_layout(x, settings[-1]), dtype=_state_dtype(x))
    return x.new_empty_strided(x.shape, _step_strides(x)), membrane


def _lif_backward_cpu(
    grad_spikes: Tensor, grad_v_last: Tensor | None, x: Tensor, v0: Tensor | None, need_grad_v0: bool, *constants
) -> tuple[Tensor, Tensor]:
    x = dense_steps(x)
    grad_x = empty_strided(x.shape, _step_strides(x), x.dtype)
    n = x[0].numel()
    grad_v0 = x.new_empty_strided(*_membrane_layout(x, need_grad_v0), dtype=_state_dtype(x))
    if n:
        start = None if v0 is None else _like_state(v0, x)
        grad_last = None if grad_v_last is None else _like_state(grad_v_last, x)
        grad = like_steps(grad_spikes, x)
        args = neuron_args(x.shape[0], *constants)
        kernel("lif_backward", "piplpppppli")(
            ctypes.byref(args), ELEMENT_TYPES[x.dtype], x.data_ptr(), x.stride(0), address_of(start), grad.data_ptr(),
            address_of(grad_last), grad_x.data_ptr(), grad_v0.data_ptr() if need_grad_v0 else None, n, threads(),
        )  # fmt: skip
    return grad_x, grad_v0


def _lif_backward_fake(grad_spikes, grad_v_last, x, v0, need_grad_v0, *constants):
    x = dense_steps(x)
    grad_v0 = x.new_empty_strided(*_membrane_layout(x, need_grad_v0), dtype=_state_dtype(x))
    return x.new_empty_strided(x.shape, _step_strides(x)), grad_v0


def _setup_context(ctx, inputs, output) -> None:
    x, v0, *constants, _ = inputs
    ctx.save_for_backward(x, v0)
    ctx.constants = constants
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_spikes: Tensor | None, grad_v_last: Tensor | None):
    x, v0 = ctx.saved_tensors
    need_grad_v0 = ctx.needs_input_grad[1]
    if grad_spikes is None:
        grad_spikes = torch.zeros_like(x)
    if grad_v_last is not None and grad_v_last.shape != x.shape[1:]:
        grad_v_last = None  # of the empty tensor that stands for a membrane that was not wanted
    grad_x, grad_v0 = _lif_backward(grad_spikes, grad_v_last, x, v0, need_grad_v0, *ctx.constants)
    if need_grad_v0:
        grad_v0 = grad_v0.to(v0.dtype)
    return grad_x, grad_v0 if need_grad_v0 else None, *([None] * (len(ctx.constants) + 1))


_lif = register_differentiable(op_library, "lif", _lif_cpu, _lif_fake, _setup_context, _backward)
_lif_backward = register(op_library, "lif_backward", _lif_backward_cpu, _lif_backward_fake)


def lif(
    x: Tensor, config: "LIFConfig", v: Tensor | None = None, want_membrane: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Runs LIF neurons over currents x (T, ...) on the CPU.

    x: float32, float64, bfloat16 or float16; the state is float32 (float64 for float64).
    v: (...) the membrane to start from; at rest when None.
    Returns (spikes (T, ...) in x's dtype and per-step layout, last membrane (...), None where it is not wanted). Only x
    is kept for the backward.
    Raises ValueError for other dtypes, no time step or a membrane of another shape.
    """
    spikes, membrane = _lif(x, v, *neuron_constants(config), want_membrane)
    return spikes, membrane if want_membrane else None
