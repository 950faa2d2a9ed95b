"""The pointwise stage between two products: BatchNorm, residual, pool, LIF over all time steps.

T: time steps, B: batch, C: channels, H, W: rows and columns. Tensors are (T, B, C, H, W), channels last in memory
(T, B, H, W, C); other layouts are copied. Of a product only its output y is kept for the backward, with a mean and a
reciprocal deviation per channel.
"""

import ctypes

import torch
from torch import Tensor

from .eager import differentiable, past_the_dispatcher
from .library import kernel, threads
from .memory import empty
from .neuron_op import _NEURON_SCHEMA, NeuronArgs, NeuronConfig, _library, neuron_args, neuron_constants

POOL_NUMBERS = {"none": 0, "cml": 1, "sps": 2}
_ELEMENTS = {torch.float32: 0, torch.float64: 1}


class StageArgs(ctypes.Structure):
    """`StageArgs` of src/stage.cpp."""

    _fields_ = [
        ("y_steps", ctypes.c_int64), ("batch", ctypes.c_int64), ("height", ctypes.c_int64),
        ("width", ctypes.c_int64), ("channels", ctypes.c_int64), ("pool", ctypes.c_int32), ("threads", ctypes.c_int32),
    ]  # fmt: skip


def _channels_last(x: Tensor | None) -> Tensor | None:
    """x (T, B, C, H, W) with memory (T, B, H, W, C)."""
    return None if x is None else x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def _empty(y: Tensor, steps: int, height: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    b, c = y.shape[1:3]
    return empty((steps, b, c, height, width), dtype or y.dtype, channels_last=True)


def _fake_empty(y: Tensor, steps: int, height: int, width: int) -> Tensor:
    return y.new_empty(steps, y.shape[1], height, width, y.shape[2]).permute(0, 1, 4, 2, 3)


def _address(x: Tensor | None) -> int | None:
    return None if x is None or x.numel() == 0 else x.data_ptr()


def _halved(y: Tensor) -> tuple[int, int]:
    return (y.shape[3] + 1) // 2, (y.shape[4] + 1) // 2


def _arguments(y: Tensor, pool: str, repeats: int, constants) -> tuple[NeuronArgs, StageArgs]:
    t, b, c, h, w = y.shape
    return (
        neuron_args(t * repeats, *constants),
        StageArgs(t, b, h, w, c, POOL_NUMBERS[pool], threads()),
    )


_library.define(
    "bn_pool_lif(Tensor y, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, Tensor? residual, "
    f"bool batch_statistics, bool want_current, str pool, int repeats, {_NEURON_SCHEMA}) -> (Tensor, Tensor)"
)
_library.define(
    "bn_pool_lif_backward(Tensor grad_s, Tensor? grad_current, Tensor y, Tensor mean, Tensor rstd, Tensor weight, "
    "Tensor bias, Tensor? residual, bool want_residual, bool batch_statistics, str pool, int repeats, "
    f"{_NEURON_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _forward_cpu(y, mean, rstd, weight, bias, residual, batch_statistics, want_current, pool, repeats, *constants):
    y, residual = _channels_last(y), _channels_last(residual)
    steps = y.shape[0] * repeats
    spikes = _empty(y, steps, *(tuple(y.shape[3:]) if pool == "none" else _halved(y)))
    current = _empty(y, y.shape[0], *y.shape[3:]) if want_current else y.new_empty(0)
    if not y.numel():
        return spikes, current
    neuron, stage = _arguments(y, pool, repeats, constants)
    fired = _empty(y, steps, y.shape[3], y.shape[4], torch.uint8) if pool == "sps" else None
    mean, scale, bias = mean.to(y.dtype).contiguous(), (rstd * weight).to(y.dtype), bias.to(y.dtype).contiguous()
    kernel("stage_forward", "ppipppppppp")(
        ctypes.byref(neuron), ctypes.byref(stage), _ELEMENTS[y.dtype], y.data_ptr(), _address(residual),
        mean.data_ptr(), scale.data_ptr(), bias.data_ptr(), spikes.data_ptr(), _address(current), _address(fired),
    )  # fmt: skip
    if fired is not None:
        kernel("pool_bytes", "ppippp")(
            ctypes.byref(neuron), ctypes.byref(stage), _ELEMENTS[y.dtype], fired.data_ptr(), spikes.data_ptr(), None
        )
    return spikes, current


def _forward_fake(y, mean, rstd, weight, bias, residual, batch_statistics, want_current, pool, repeats, *constants):
    spikes = _fake_empty(y, y.shape[0] * repeats, *(tuple(y.shape[3:]) if pool == "none" else _halved(y)))
    return spikes, _fake_empty(y, y.shape[0], *y.shape[3:]) if want_current else y.new_empty(0)


def _normalisation_backward(
    pointers, sums, y, mean, rstd, scale, grad_z, taps, grad_y, batch_statistics
) -> tuple[Tensor, Tensor]:
    """Writes y's gradient into grad_y from that of the normalised currents and its sums; (grad of weight, of bias)."""
    grad_bias, centred = sums
    grad_weight = centred * rstd.double()
    if batch_statistics:
        n = y.numel() // y.shape[2]
        slope, offset = -scale.double() * rstd.double() * grad_weight / n, -scale.double() * grad_bias / n
    else:
        slope = offset = torch.zeros_like(grad_bias)
    slope, offset = slope.to(y.dtype), offset.to(y.dtype)
    kernel("normalisation_backward", "ppipppppppp")(
        *pointers, y.data_ptr(), mean.data_ptr(), scale.data_ptr(), slope.data_ptr(), offset.data_ptr(),
        grad_z.data_ptr(), _address(taps), grad_y.data_ptr(),
    )  # fmt: skip
    return grad_weight, grad_bias


def _backward_cpu(
    grad_s, grad_current, y, mean, rstd, weight, bias, residual, want_residual, batch_statistics, pool, repeats,
    *constants,
):  # fmt: skip
    """(grad of y, of weight, of bias, of the residual or an empty tensor)."""
    y, residual = _channels_last(y), _channels_last(residual)
    grad_s, grad_current = _channels_last(grad_s.to(y.dtype)), _channels_last(grad_current)
    grad_y = _empty(y, y.shape[0], *y.shape[3:])
    if not y.numel():
        empty_residual = torch.empty_like(y) if want_residual else y.new_empty(0)
        return grad_y, torch.zeros_like(weight), torch.zeros_like(bias), empty_residual
    neuron, stage = _arguments(y, pool, repeats, constants)
    element = _ELEMENTS[y.dtype]
    pointers = ctypes.byref(neuron), ctypes.byref(stage), element
    taps = None
    if pool == "cml":
        grad_z = _empty(y, y.shape[0], *_halved(y))
        taps = _empty(y, y.shape[0], *_halved(y), torch.uint8)
    else:
        # Without a residual the gradient of the current turns into y's in place.
        grad_z = _empty(y, y.shape[0], *y.shape[3:]) if want_residual else grad_y
    mean, scale = mean.to(y.dtype).contiguous(), (rstd * weight).to(y.dtype)
    plain_bias = bias.to(y.dtype).contiguous()
    if pool == "sps":
        fired = _empty(y, y.shape[0] * repeats, y.shape[3], y.shape[4], torch.uint8)
        taps = _empty(y, y.shape[0] * repeats, *_halved(y), torch.uint8)
        kernel("stage_forward", "ppipppppppp")(
            *pointers, y.data_ptr(), None, mean.data_ptr(), scale.data_ptr(), plain_bias.data_ptr(), None, None,
            fired.data_ptr(),
        )  # fmt: skip
        kernel("pool_bytes", "ppippp")(*pointers, fired.data_ptr(), None, taps.data_ptr())
        del fired
    sums = torch.empty(2, y.shape[2], dtype=torch.float64)
    kernel("stage_backward", "ppipppppppppp")(
        *pointers, y.data_ptr(), _address(residual), mean.data_ptr(), scale.data_ptr(), plain_bias.data_ptr(),
        grad_s.data_ptr(), _address(grad_current), grad_z.data_ptr(), _address(taps), sums.data_ptr(),
    )  # fmt: skip
    grad_weight, grad_bias = _normalisation_backward(
        pointers, sums, y, mean, rstd, scale, grad_z, taps, grad_y, batch_statistics
    )
    return grad_y, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), grad_z if want_residual else y.new_empty(0)


def _backward_fake(
    grad_s, grad_current, y, mean, rstd, weight, bias, residual, want_residual, batch_statistics, pool, repeats,
    *constants,
):  # fmt: skip
    grad_y = _fake_empty(y, y.shape[0], *y.shape[3:])
    grad_residual = _fake_empty(y, y.shape[0], *y.shape[3:]) if want_residual else y.new_empty(0)
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


_library.impl("bn_pool_lif", _forward_cpu, "CPU")
_library.impl("bn_pool_lif_backward", _backward_cpu, "CPU")
torch.library.register_fake("spikingformer::bn_pool_lif", _forward_fake, lib=_library)
torch.library.register_fake("spikingformer::bn_pool_lif_backward", _backward_fake, lib=_library)
_bn_pool_lif = differentiable(_library, "bn_pool_lif", _forward_cpu, _setup_context, _backward)
_bn_pool_lif_backward = past_the_dispatcher(torch.ops.spikingformer.bn_pool_lif_backward, _backward_cpu)


# BatchNorm without a neuron behind it: the projections whose output joins the residual.
_library.define(
    "batch_norm(Tensor y, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, bool batch_statistics) -> Tensor"
)
_library.define(
    "batch_norm_backward(Tensor grad, Tensor y, Tensor mean, Tensor rstd, Tensor weight, bool batch_statistics) "
    "-> (Tensor, Tensor, Tensor)"
)


def _norm_cpu(y, mean, rstd, weight, bias, batch_statistics):
    y = _channels_last(y)
    out = _empty(y, y.shape[0], *y.shape[3:])
    mean, scale, bias = mean.to(y.dtype).contiguous(), (rstd * weight).to(y.dtype), bias.to(y.dtype).contiguous()
    kernel("normalise", "ippppllpi")(
        _ELEMENTS[y.dtype], y.data_ptr(), mean.data_ptr(), scale.data_ptr(), bias.data_ptr(),
        y.numel() // max(y.shape[2], 1), y.shape[2], out.data_ptr(), threads(),
    )  # fmt: skip
    return out


def _norm_backward_cpu(grad, y, mean, rstd, weight, batch_statistics):
    """(grad of y, of weight, of bias)."""
    y, grad = _channels_last(y), _channels_last(grad.to(y.dtype))
    grad_y = _empty(y, y.shape[0], *y.shape[3:])
    if not y.numel():
        return grad_y, torch.zeros_like(weight), torch.zeros_like(weight)
    stage = StageArgs(*y.shape[:2], *y.shape[3:], y.shape[2], POOL_NUMBERS["none"], threads())
    neuron, element = NeuronArgs(), _ELEMENTS[y.dtype]  # no neuron here: only the shape is read
    mean, scale = mean.to(y.dtype).contiguous(), (rstd * weight).to(y.dtype)
    sums = torch.empty(2, y.shape[2], dtype=torch.float64)
    kernel("gradient_sums", "ipppllpi")(
        element, y.data_ptr(), mean.data_ptr(), grad.data_ptr(), y.numel() // y.shape[2], y.shape[2],
        sums.data_ptr(), threads(),
    )  # fmt: skip
    pointers = ctypes.byref(neuron), ctypes.byref(stage), element
    grad_weight, grad_bias = _normalisation_backward(
        pointers, sums, y, mean, rstd, scale, grad, None, grad_y, batch_statistics
    )
    return grad_y, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _norm_setup_context(ctx, inputs, output) -> None:
    y, mean, rstd, weight, _, ctx.batch_statistics = inputs
    ctx.save_for_backward(y, mean, rstd, weight)


def _norm_backward(ctx, grad):
    grad_y, grad_weight, grad_bias = _batch_norm_backward(grad, *ctx.saved_tensors, ctx.batch_statistics)
    return grad_y, None, None, grad_weight, grad_bias, None


_library.impl("batch_norm", _norm_cpu, "CPU")
_library.impl("batch_norm_backward", _norm_backward_cpu, "CPU")
torch.library.register_fake(
    "spikingformer::batch_norm",
    lambda y, mean, rstd, weight, bias, batch_statistics: _fake_empty(y, y.shape[0], *y.shape[3:]),
    lib=_library,
)
torch.library.register_fake(
    "spikingformer::batch_norm_backward",
    lambda grad, y, mean, rstd, weight, batch_statistics: (
        _fake_empty(y, y.shape[0], *y.shape[3:]),
        torch.empty_like(weight),
        torch.empty_like(weight),
    ),
    lib=_library,
)
_batch_norm = differentiable(_library, "batch_norm", _norm_cpu, _norm_setup_context, _norm_backward)
_batch_norm_backward = past_the_dispatcher(torch.ops.spikingformer.batch_norm_backward, _norm_backward_cpu)


def _check_float(y: Tensor) -> None:
    if y.dtype not in _ELEMENTS:
        raise ValueError(f"the stage takes float32 or float64, got {y.dtype}: convert y first")
    if y.dim() != 5:
        raise ValueError(f"the stage takes y (T, B, C, H, W), got shape {tuple(y.shape)}")


@torch.no_grad()
def bn_statistics(
    y: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    repeats: int = 1,
) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(biased variance + eps) of each channel of y (T, B, C, H, W), in y's dtype.

    The running statistics move by `momentum` towards the batch's, the variance being unbiased over
    T * B * H * W * `repeats`: a repeated picture comes once. No gradient flows here; `bn_pool_lif` knows it.
    Raises ValueError where a channel has a single value, for which no variance exists.
    """
    _check_float(y)
    n = y.numel() // y.shape[2]
    if n * repeats <= 1:
        raise ValueError(f"expected more than one value per channel in training, got y of shape {tuple(y.shape)}")
    y = y.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    mean, variance = torch.empty(2, y.shape[2], dtype=torch.float64)
    kernel("bn_statistics", "ipllppi")(
        _ELEMENTS[y.dtype], y.data_ptr(), n, y.shape[2], mean.data_ptr(), variance.data_ptr(), threads()
    )
    if running_mean is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    if running_var is not None:
        total = n * repeats
        running_var.lerp_((variance * (total / (total - 1))).to(running_var.dtype), momentum)
    return mean.to(y.dtype), (variance + eps).rsqrt().to(y.dtype)


def batch_norm(
    y: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, batch_statistics: bool = False
) -> Tensor:
    """(y - mean) * rstd * weight + bias for y (T, B, C, H, W), on the CPU; for the rest see `bn_pool_lif`.

    Torch's own keeps the same tensors and takes about four times as long backward with channels last.
    """
    _check_float(y)
    return _batch_norm(y, mean, rstd, weight, bias, batch_statistics)


def bn_pool_lif(
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    config: NeuronConfig,
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
    _check_float(y)
    if (pool or "none") not in POOL_NUMBERS:
        raise ValueError(f"pool must be one of None, 'cml', 'sps', got {pool!r}")
    extras = residual is not None or spike_residual is not None or want_current
    if extras and (pool is not None or repeats > 1):
        raise ValueError("a residual or the current was asked for together with a pool or repeats: run them apart")
    if repeats < 1 or (repeats > 1 and y.shape[0] != 1):
        raise ValueError(f"repeats needs y with T = 1, got T = {y.shape[0]} and repeats = {repeats}")
    for name, extra in (("residual", residual), ("spike_residual", spike_residual)):
        if extra is not None and extra.shape != y.shape:
            raise ValueError(f"{name} must have y's shape {tuple(y.shape)}, got {tuple(extra.shape)}")
        if extra is not None and extra.dtype != y.dtype:
            raise ValueError(f"{name} must have y's dtype {y.dtype}, got {extra.dtype}")
    spikes, current = _bn_pool_lif(
        y, mean, rstd, weight, bias, residual, batch_statistics, want_current, pool or "none", repeats,
        *neuron_constants(config),
    )  # fmt: skip
    if spike_residual is not None:
        spikes = spikes + spike_residual
    return spikes, current if want_current else None
