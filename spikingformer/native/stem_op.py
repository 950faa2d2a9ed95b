"""The stem's convolution: 3x3, dense, few input channels (a picture's three, an event frame's two)."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from .library import kernel, serves_float32, threads
from .memory import empty

STEM_FORWARD = "pllllpppllllli"  # the kernel's signature; its picture comes first, at any strides


class _StemConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = x.resolve_neg()  # the kernels read the memory
        n, c, h, w = x.shape
        o = weight.shape[0]
        ctx.save_for_backward(x, weight)
        # Named here, not in the call: the kernel sees only their addresses.
        own_weight, own_bias = weight.contiguous(), None if bias is None else bias.contiguous()
        out = empty((n, o, h, w), channels_last=True)
        kernel("stem_forward", STEM_FORWARD)(
            x.data_ptr(), *x.stride(), own_weight.data_ptr(), None if own_bias is None else own_bias.data_ptr(),
            out.data_ptr(), n, h, w, c, o, threads(),
        )  # fmt: skip
        return out

    @staticmethod
    @once_differentiable  # a second derivative would be silently wrong
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = conv2d_input(x.shape, weight, grad, padding=1)
        if ctx.needs_input_grad[1]:
            n, c, h, w = x.shape
            o = weight.shape[0]
            gradients = grad.permute(0, 2, 3, 1).contiguous()
            taps = empty((3, 3, c, o))
            kernel("stem_weight_gradient", "pllllppllllli")(
                x.data_ptr(), *x.stride(), gradients.data_ptr(), taps.data_ptr(), n, h, w, c, o, threads()
            )
            grad_weight = taps.permute(3, 2, 0, 1)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_weight, grad_bias


def stem_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.conv2d(x, weight, bias, padding=1)` for x (N, C, H, W) with few channels and weight (O, C, 3, 3).

    Returns (N, O, H, W), channels last in memory. Another dtype or device, an empty batch, autocast and torch.compile
    take torch's own. Raises ValueError for another kernel size, channels or a bias that do not match.
    """
    if x.dim() != 4 or weight.dim() != 4 or weight.shape[1:] != (x.shape[1], 3, 3):
        raise ValueError(
            f"stem_conv takes x (N, C, H, W) and a weight (O, C, 3, 3), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"stem_conv takes a bias ({weight.shape[0]},) with this weight, got {tuple(bias.shape)}")
    tensors = [t for t in (x, weight, bias) if t is not None]
    if not x.numel() or not serves_float32(*tensors):
        return F.conv2d(x.contiguous(memory_format=torch.channels_last), weight, bias, padding=1)
    return _StemConv.apply(x, weight, bias)
