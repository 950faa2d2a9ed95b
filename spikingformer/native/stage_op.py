"""The pointwise stage between two products: BatchNorm, residual, pool, LIF over all time steps.

T: time steps, B: batch, C: channels, H, W: rows and columns. Tensors are (T, B, C, H, W), channels last in memory
(T, B, H, W, C); other layouts are copied. Of a product only its output y is kept for the backward, with a mean and a
reciprocal deviation per channel.
"""

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .eager import register, register_differentiable
from .inputs import channels_last, check_stage
from .library import kernel, threads
from .neuron_op import NEURON_SCHEMA, NeuronArgs, address_of, neuron_args, neuron_constants, op_library
from .norm_op import (
    POOL_NUMBERS,
    STAGE_TYPES,
    StageArgs,
    check_stage_input,
    empty_steps,
    fake_empty_steps,
    normalisation_backward,
)

if TYPE_CHECKING:
    from spikingformer.neurons import LIFConfig


def _halved(y: Tensor) -> tuple[int, int]:
    return (y.shape[3] + 1) // 2, (y.shape[4] + 1) // 2


def _arguments(y: Tensor, pool: str, repeats: int, constants) -> tuple[NeuronArgs, StageArgs]:
    t, b, c, h, w = y.shape
    return (
        neuron_args(t * repeats, *constants),
        StageArgs(t, b, h, w, c, POOL_NUMBERS[pool], threads()),
    )


op_library.define(
    "bn_pool_lif(Tensor y, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, Tensor? residual, "
    f"bool batch_statistics, bool want_current, str pool, int repeats, {NEURON_SCHEMA}) -> (Tensor, Tensor)"
)
op_library.define(
    "bn_pool_lif_backward(Tensor grad_s, Tensor? grad_current, Tensor y, Tensor mean, Tensor rstd, Tensor weight, "
    "Tensor bias, Tensor? residual, bool want_residual, bool batch_statistics, str pool, int repeats, "
    f"{NEURON_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _forward_cpu(y, mean, rstd, weight, bias, residual, batch_statistics, want_current, pool, repeats, *constants):
    y, residual = channels_last(y), channels_last(residual)
    steps = y.shape[0] * repeats
    spikes = empty_steps(y, steps, *(tuple(y.shape[3:]) if pool == "none" else _halved(y)))
    current = empty_steps(y, y.shape[0], *y.shape[3:]) if want_current else y.new_empty(0)
    if not y.numel():
        return spikes, current
    neuron, stage = _arguments(y, pool, repeats, constants)
    fired = empty_steps(y, steps, y.shape[3], y.shape[4], torch.uint8) if pool == "sps" else None
    mean, scale, bias = mean.to(y.dtype).contiguous(), (rstd * weight).to(y.dtype), bias.to(y.dtype).contiguous()
    kernel("stage_forward", "ppipppppppp")(
        ctypes.byref(neuron), ctypes.byref(stage), STAGE_TYPES[y.dtype], y.data_ptr(), address_of(residual),
        mean.data_ptr(), scale.data_ptr(), bias.data_ptr(), spikes.data_ptr(), address_of(current), address_of(fired),
    )  # fmt: skip
    if fired is not None:
        kernel("pool_bytes", "ppippp")(
            ctypes.byref(neuron), ctypes.byref(stage), STAGE_TYPES[y.dtype], fired.data_ptr(), spikes.data_ptr(), None
        )
    return spikes, current


def _forward_fake(y, mean, rstd, weight, bias, residual, batch_statistics, want_current, pool, repeats, *constants):
    spikes = fake_empty_steps(y, y.shape[0] * repeats, *(tuple(y.shape[3:]) if pool == "none" else _halved(y)))
    return spikes, fake_empty_steps(y, y.shape[0], *y.shape[3:]) if want_current else y.new_empty(0)


def _backward_cpu(
    grad_s, grad_current, y, mean, rstd, weight, bias, residual, want_residual, batch_statistics, pool, repeats,
    *constants,
):  # fmt: skip
    """(grad of y, of weight, of bias, of the residual or an empty tensor)."""
    y, residual = channels_last(y), channels_last(residual)
    grad_s, grad_current = channels_last(grad_s.to(y.dtype)), channels_last(grad_current)
    grad_y = empty_steps(y, y.shape[0], *y.shape[3:])
    if not y.numel():
        empty_residual = torch.empty_like(y) if want_residual else y.new_empty(0)
        return grad_y, torch.zeros_like(weight), torch.zeros_like(bias), empty_residual
    neuron, stage = _arguments(y, pool, repeats, constants)
    element = STAGE_TYPES[y.dtype]
    pointers = ctypes.byref(neuron), ctypes.byref(stage), element
    taps = None
    if pool == "cml":
        grad_z = empty_steps(y, y.shape[0], *_halved(y))
        taps = empty_steps(y, y.shape[0], *_halved(y), torch.uint8)
    else:
        # Without a residual the gradient of the current turns into y's in place.
        grad_z = empty_steps(y, y.shape[0], *y.shape[3:]) if want_residual else grad_y
    mean, scale = mean.to(y.dtype).contiguous(), (rstd * weight).to(y.dtype)
    plain_bias = bias.to(y.dtype).contiguous()
    if pool == "sps":
        fired = empty_steps(y, y.shape[0] * repeats, y.shape[3], y.shape[4], torch.uint8)
        taps = empty_steps(y, y.shape[0] * repeats, *_halved(y), torch.uint8)
        kernel("stage_forward", "ppipppppppp")(
            *pointers, y.data_ptr(), None, mean.data_ptr(), scale.data_ptr(), plain_bias.data_ptr(), None, None,
            fired.data_ptr(),
        )  # fmt: skip
        kernel("pool_bytes", "ppippp")(*pointers, fired.data_ptr(), None, taps.data_ptr())
        del fired
    sums = torch.empty(2, y.shape[2], dtype=torch.float64)
    kernel("stage_backward", "ppipppppppppp")(
        *pointers, y.data_ptr(), address_of(residual), mean.data_ptr(), scale.data_ptr(), plain_bias.data_ptr(),
        grad_s.data_ptr(), address_of(grad_current), grad_z.data_ptr(), address_of(taps), sums.data_ptr(),
    )  # fmt: skip
    grad_weight, grad_bias = normalisation_backward(
        pointers, sums, y, mean, rstd, scale, grad_z, taps, grad_y, batch_statistics
    )
    return grad_y, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), grad_z if want_residual else y.new_empty(0)


def _backward_fake(
    grad_s, grad_current, y, mean, rstd, weight, bias, residual, want_residual, batch_statistics, pool, repeats,
    *constants,
):  # fmt: skip
    grad_y = fake_empty_steps(y, y.shape[0], *y.shape[3:])
    grad_residual = fake_empty_steps(y, y.shape[0], *y.shape[3:]) if want_residual else y.new_empty(0)
    return grad_y, torch.empty_like(weight), torch.empty_like(bias), grad_residual


def _setup_context(ctx, inputs, output) -> None:
    y, mean, rstd, weight, bias, residual, batch_statistics, _, pool, repeats, *constants = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(y, mean, rstd, weight, bias, residual)
    ctx.spikes_shape = output[0].shape
    ctx.settings = (batch_statistics, pool, repeats, *constants)


def _backward(ctx, grad_s, grad_current):
    y, mean, rstd, weight, bias, residual = ctx.saved_tensors
    if grad_s is None:
        grad_s = y.new_zeros(ctx.spikes_shape)
    if grad_current is not None and grad_current.numel() == 0:
        grad_current = None
    want_residual = residual is not None and ctx.needs_input_grad[5]
    grad_y, grad_weight, grad_bias, grad_residual = _bn_pool_lif_backward(
        grad_s, grad_current, y, mean, rstd, weight, bias, residual, want_residual, *ctx.settings
    )
    return (
        grad_y, None, None, grad_weight, grad_bias, grad_residual if want_residual else None,
        *[None] * (1 + len(ctx.settings)),
    )  # fmt: skip


_bn_pool_lif = register_differentiable(
    op_library, "bn_pool_lif", _forward_cpu, _forward_fake, _setup_context, _backward
)
_bn_pool_lif_backward = register(op_library, "bn_pool_lif_backward", _backward_cpu, _backward_fake)


def bn_pool_lif(
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    config: "LIFConfig",
    *,
    pool: str | None = None,
    residual: Tensor | None = None,
    spike_residual: Tensor | None = None,
    batch_statistics: bool = False,
    want_current: bool = False,
    repeats: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """Spikes of LIF(pool((y - mean) * rstd * weight + bias + residual)) + spike_residual, on the CPU.

    y: (T, B, C, H, W), a product's output in float32 or float64.
    mean, rstd: (C,), from `bn_statistics`, or running_mean and 1 / sqrt(running_var + eps).
    pool: None; "cml": MaxPool(3, 2, 1) of the current, then fire; "sps": fire, then pool the spikes.
    residual: like y; added to the current. spike_residual: like the spikes; added to them. Both without a pool only.
    batch_statistics: mean and rstd came from y itself, so that y's gradient runs through them too.
    want_current: give the current (before the neuron) as well.
    repeats: a still picture's y comes with T = 1 and fires for T = `repeats` steps; without residuals or current.

    Returns (spikes (T, B, C, H', W') in y's dtype, current (T, B, C, H, W) or None). Gradients: y, weight, bias and
    both residuals. Raises ValueError for a dtype or combination that has no kernel.
    """
    check_stage_input(y)
    check_stage(y, pool, repeats, residual, spike_residual, want_current)
    for name, extra in (("residual", residual), ("spike_residual", spike_residual)):
        if extra is not None and extra.dtype != y.dtype:
            raise ValueError(f"{name} must have y's dtype {y.dtype}, got {extra.dtype}")
    spikes, current = _bn_pool_lif(
        y, mean, rstd, weight, bias, residual, batch_statistics, want_current, pool or "none", repeats,
        *neuron_constants(config),
    )  # fmt: skip
    if spike_residual is not None:
        spikes = spikes + spike_residual
    return spikes, current if want_current else None
