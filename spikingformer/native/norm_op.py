"""BatchNorm without a neuron behind it (the projections whose output joins the residual), and the batch's statistics.

T: time steps, B: batch, C: channels, H, W: rows and columns. Tensors are (T, B, C, H, W), channels last in memory
(T, B, H, W, C); other layouts are copied. Of a product only its output y is kept for the backward, with a mean and a
reciprocal deviation per channel. `stage_op` shares what is here.
"""

import ctypes

import torch
from torch import Tensor

from .eager import register, register_differentiable
from .inputs import channels_last
from .library import kernel, threads
from .memory import empty
from .neuron_op import NeuronArgs, address_of, op_library

POOL_NUMBERS = {"none": 0, "cml": 1, "sps": 2}
STAGE_TYPES = {torch.float32: 0, torch.float64: 1}


class StageArgs(ctypes.Structure):
    """`StageArgs` of src/stage.cpp."""

    _fields_ = [
        ("y_steps", ctypes.c_int64), ("batch", ctypes.c_int64), ("height", ctypes.c_int64),
        ("width", ctypes.c_int64), ("channels", ctypes.c_int64), ("pool", ctypes.c_int32), ("threads", ctypes.c_int32),
    ]  # fmt: skip


def empty_steps(y: Tensor, steps: int, height: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """New memory (steps, B, C, height, width), channels last, with y's B and C; `dtype`: y's where None."""
    b, c = y.shape[1:3]
    return empty((steps, b, c, height, width), dtype or y.dtype, channels_last=True)


def fake_empty_steps(y: Tensor, steps: int, height: int, width: int) -> Tensor:
    """`empty_steps` for tensors without data."""
    return y.new_empty(steps, y.shape[1], height, width, y.shape[2]).permute(0, 1, 4, 2, 3)


def check_stage_input(y: Tensor) -> None:
    """Raises ValueError for a type or rank that has no kernel."""
    if y.dtype not in STAGE_TYPES:
        raise ValueError(f"the stage takes float32 or float64, got {y.dtype}: convert y first")
    if y.dim() != 5:
        raise ValueError(f"the stage takes y (T, B, C, H, W), got shape {tuple(y.shape)}")


def normalisation_backward(
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
        grad_z.data_ptr(), address_of(taps), grad_y.data_ptr(),
    )  # fmt: skip
    return grad_weight, grad_bias


op_library.define(
    "batch_norm(Tensor y, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, bool batch_statistics) -> Tensor"
)
op_library.define(
    "batch_norm_backward(Tensor grad, Tensor y, Tensor mean, Tensor rstd, Tensor weight, bool batch_statistics) "
    "-> (Tensor, Tensor, Tensor)"
)


def _norm_cpu(y, mean, rstd, weight, bias, batch_statistics):
    y = channels_last(y)
    out = empty_steps(y, y.shape[0], *y.shape[3:])
    mean, scale, bias = mean.to(y.dtype).contiguous(), (rstd * weight).to(y.dtype), bias.to(y.dtype).contiguous()
    kernel("normalise", "ippppllpi")(
        STAGE_TYPES[y.dtype], y.data_ptr(), mean.data_ptr(), scale.data_ptr(), bias.data_ptr(),
        y.numel() // max(y.shape[2], 1), y.shape[2], out.data_ptr(), threads(),
    )  # fmt: skip
    return out


def _norm_backward_cpu(grad, y, mean, rstd, weight, batch_statistics):
    """(grad of y, of weight, of bias)."""
    y, grad = channels_last(y), channels_last(grad.to(y.dtype))
    grad_y = empty_steps(y, y.shape[0], *y.shape[3:])
    if not y.numel():
        return grad_y, torch.zeros_like(weight), torch.zeros_like(weight)
    stage = StageArgs(*y.shape[:2], *y.shape[3:], y.shape[2], POOL_NUMBERS["none"], threads())
    neuron, element = NeuronArgs(), STAGE_TYPES[y.dtype]  # no neuron here: only the shape is read
    mean, scale = mean.to(y.dtype).contiguous(), (rstd * weight).to(y.dtype)
    sums = torch.empty(2, y.shape[2], dtype=torch.float64)
    kernel("gradient_sums", "ipppllpi")(
        element, y.data_ptr(), mean.data_ptr(), grad.data_ptr(), y.numel() // y.shape[2], y.shape[2],
        sums.data_ptr(), threads(),
    )  # fmt: skip
    pointers = ctypes.byref(neuron), ctypes.byref(stage), element
    grad_weight, grad_bias = normalisation_backward(
        pointers, sums, y, mean, rstd, scale, grad, None, grad_y, batch_statistics
    )
    return grad_y, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _norm_setup_context(ctx, inputs, output) -> None:
    y, mean, rstd, weight, _, ctx.batch_statistics = inputs
    ctx.save_for_backward(y, mean, rstd, weight)


def _norm_backward(ctx, grad):
    grad_y, grad_weight, grad_bias = _batch_norm_backward(grad, *ctx.saved_tensors, ctx.batch_statistics)
    return grad_y, None, None, grad_weight, grad_bias, None


def _norm_fake(y, mean, rstd, weight, bias, batch_statistics):
    return fake_empty_steps(y, y.shape[0], *y.shape[3:])


def _norm_backward_fake(grad, y, mean, rstd, weight, batch_statistics):
    return fake_empty_steps(y, y.shape[0], *y.shape[3:]), torch.empty_like(weight), torch.empty_like(weight)


_batch_norm = register_differentiable(
    op_library, "batch_norm", _norm_cpu, _norm_fake, _norm_setup_context, _norm_backward
)
_batch_norm_backward = register(op_library, "batch_norm_backward", _norm_backward_cpu, _norm_backward_fake)


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
    check_stage_input(y)
    n = y.numel() // y.shape[2]
    if n * repeats <= 1:
        raise ValueError(f"expected more than one value per channel in training, got y of shape {tuple(y.shape)}")
    y = channels_last(y)  # type: ignore[assignment]
    mean, variance = torch.empty(2, y.shape[2], dtype=torch.float64)
    kernel("bn_statistics", "ipllppi")(
        STAGE_TYPES[y.dtype], y.data_ptr(), n, y.shape[2], mean.data_ptr(), variance.data_ptr(), threads()
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
    check_stage_input(y)
    return _batch_norm(y, mean, rstd, weight, bias, batch_statistics)
