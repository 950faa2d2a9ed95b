"""Products of spikes and weights in float32: rows of weights are added, nothing is multiplied (src/spike_product.h).

N: images (time steps times batch), C, O: channels in and out, H, W: rows and columns, M: tokens.
Spikes are packed to one bit each; for the backward only the bits are kept. Where the input holds anything but 0 and 1,
the dense product is taken instead.
"""

import ctypes
import weakref
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .library import current_isa, kernel, serves_float32, threads
from .memory import empty

MAX_CHANNELS = 65535  # places of spikes are 16-bit numbers


def gradient_table_rate() -> float:
    """The firing rate up to which the weight gradient walks lists of spikes, and above which it uses tables.

    Where they met on an EPYC 9005: 0.20 to 0.22 over seven shapes with tables in the cache, 0.08 to 0.14 over six with
    tables in registers (avx512).
    """
    return 0.13 if current_isa() == "avx512" else 0.2


@dataclass
class PackedSpikes:
    """Spikes as bits. `bits` (N * H * W, ceil(C / 64)) int64; `shape` is (N, C, H, W)."""

    bits: Tensor
    shape: tuple[int, int, int, int]
    ones: int
    binary: bool  # False: the input held something else than 0 and 1, and the bits are not its content

    @property
    def rate(self) -> float:
        """Share of ones, 0 to 1."""
        n, c, h, w = self.shape
        return self.ones / max(n * c * h * w, 1)

    def unpack(self) -> Tensor:
        """The spikes as float32 (N, C, H, W), channels last in memory."""
        n, c, h, w = self.shape
        out = empty((n, c, h, w), channels_last=True)
        if out.numel():
            kernel("unpack_spikes", "pllpi")(self.bits.data_ptr(), n * h * w, c, out.data_ptr(), threads())
        return out


def pack_spikes(s: Tensor) -> PackedSpikes:
    """Packs float32 spikes (N, C, H, W), best channels last in memory, and counts them on the way."""
    n, c, h, w = s.shape
    tokens = s.permute(0, 2, 3, 1).contiguous()
    bits = torch.empty(n * h * w, (c + 63) // 64, dtype=torch.int64, device="cpu")
    counts = torch.zeros(2, dtype=torch.int64, device="cpu")
    if tokens.numel():
        kernel("pack_spikes", "pllpppi")(
            tokens.data_ptr(), n * h * w, c, bits.data_ptr(), counts.data_ptr(), counts.data_ptr() + 8, threads()
        )
    ones, wrong = counts.tolist()
    return PackedSpikes(bits, (n, c, h, w), ones, wrong == 0)


@dataclass(frozen=True)
class PackedWeight:
    """A weight in 32-bit fixed point, so that every sum of its rows is exact; `scale` (O,): a unit's worth."""

    packed: Tensor  # int32 [tile][tap][C][tile width]
    scale: Tensor


_packed_weights: dict[tuple[int, str], tuple[weakref.ref, tuple[int, ...], PackedWeight]] = {}


def packed_weight(weight: Tensor) -> PackedWeight:
    """`weight` (O, C, k, k) float32, k 1 or 3, as the kernels want it; kept until the tensor changes or goes away."""
    isa = current_isa()
    key = (id(weight), isa)
    keeps = isinstance(weight, torch.nn.Parameter) and is_plain_layout(weight)
    # Versions see every change but those through `.data`: the fingerprint sees these.
    state = (weight._version, weight.data_ptr(), Fingerprint([weight])()) if keeps else ()
    found = _packed_weights.get(key)
    if keeps and found and found[0]() is weight and found[1] == state:
        return found[2]
    o, c, k, _ = weight.shape
    one_tap_stride = k == 1 or weight.stride(2) == 3 * weight.stride(3)
    weight_source = weight if one_tap_stride else weight.contiguous()
    size = torch.zeros(1, dtype=torch.int64, device="cpu")
    kernel("packed_size", "lllp")(o, c, k * k, size.data_ptr())
    result = PackedWeight(empty((int(size),), torch.int32), empty((o,)))
    kernel("pack_weight", "pllllllppi")(
        weight_source.data_ptr(), weight_source.stride(0), weight_source.stride(1), weight_source.stride(3), o, c,
        k * k, result.packed.data_ptr(), result.scale.data_ptr(), threads(),
    )  # fmt: skip
    if keeps:
        _packed_weights[key] = (weakref.ref(weight, lambda _: _packed_weights.pop(key, None)), state, result)
    return result


def is_plain_layout(x: Tensor) -> bool:
    """Whether x is contiguous, as it is or channels last."""
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


class Fingerprint:
    """A number that changes with the contents of tensors that are dense in memory; all of them is read at every call.

    The tensors must stay where they are.
    """

    def __init__(self, tensors: list[Tensor]):
        n = len(tensors)
        self._addresses = (ctypes.c_void_p * n)(*[t.data_ptr() for t in tensors])
        self._sizes = (ctypes.c_int64 * n)(*[t.numel() * t.element_size() for t in tensors])

    def __call__(self) -> int:
        result = ctypes.c_uint64()
        n = len(self._sizes)
        kernel("fingerprint", "pplpi")(self._addresses, self._sizes, n, ctypes.addressof(result), threads())
        return result.value


def product_forward(spikes: PackedSpikes, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product of packed spikes and weight (O, C, k, k): (N, O, H, W), channels last in memory."""
    n, c, h, w = spikes.shape
    o, _, k, _ = weight.shape
    out = empty((n, o, h, w), channels_last=True)
    if out.numel():
        shape = (n, h, w) if k == 3 else (n * h * w, 1, 1)
        b = None if bias is None else bias.contiguous()
        packed = packed_weight(weight)  # held here: the kernel sees only its address
        kernel("product_forward", "ppppplllllli")(
            spikes.bits.data_ptr(), packed.packed.data_ptr(), packed.scale.data_ptr(),
            None if b is None else b.data_ptr(),
            out.data_ptr(), *shape, c, o, k * k, threads(),
        )  # fmt: skip
    return out


def product_weight_gradient(spikes: PackedSpikes, grad: Tensor, kernel_size: int) -> Tensor:
    """Gradient (O, C, k, k) of the weight from grad (N, O, H, W)."""
    n, c, h, w = spikes.shape
    o, k = grad.shape[1], kernel_size
    tokens = grad.permute(0, 2, 3, 1).contiguous()
    make = torch.empty if tokens.numel() and c else torch.zeros
    out = make(k, k, c, o, dtype=torch.float32, device="cpu")
    if tokens.numel() and c:
        shape = (n, h, w) if k == 3 else (n * h * w, 1, 1)
        tables = int(spikes.rate > gradient_table_rate())
        kernel("product_weight_gradient", "pppllllllii")(
            spikes.bits.data_ptr(), tokens.data_ptr(), out.data_ptr(), *shape, c, o, k * k, tables, threads()
        )
    return out.permute(3, 2, 0, 1)


def _dense_forward(s: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(s, weight, bias, padding=weight.shape[2] // 2)


def _dense_weight_gradient(s: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    pad = weight.shape[2] // 2
    return torch.ops.aten.convolution_backward(
        grad, s, weight, None, [1, 1], [pad, pad], [1, 1], False, [0, 0], 1, [False, True, False]
    )[1]


def _input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient (N, C, H, W) of the spikes from grad (N, O, H, W), channels last in memory, float32."""
    o, c, k, _ = weight.shape
    if k == 3:
        n, _, h, w = grad.shape
        out = empty((n, c, h, w), channels_last=True)
        tokens, contiguous = grad.permute(0, 2, 3, 1).contiguous(), weight.contiguous()
        kernel("conv3x3_input_gradient", "pppllllli")(
            tokens.data_ptr(), contiguous.data_ptr(), out.data_ptr(), n, h, w, o, c, threads()
        )
        return out
    # MKL is faster where a product widens (EPYC 7003: 168 against 106 GFLOP/s, 384 to 1536), but has no AVX-512 for AMD
    # (EPYC 9005: 214 against 457 on pictures, 274 against 117 where each token is a picture of its own).
    if c > o and (current_isa() != "avx512" or grad.shape[2] * grad.shape[3] == 1):
        return F.linear(grad.permute(0, 2, 3, 1), weight.view(o, c).t()).permute(0, 3, 1, 2)
    # A convolution with the transposed kernel: oneDNN's forward is faster than its backward, and than MKL on AMD.
    return F.conv2d(grad, weight.transpose(0, 1).contiguous(memory_format=torch.channels_last))


class _SpikeProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, s: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        spikes = pack_spikes(s)
        ctx.spikes, ctx.has_bias = spikes, bias is not None
        # The bits stand for the spikes, so the float tensor can go.
        ctx.save_for_backward(weight, None if spikes.binary else s)
        if spikes.binary:
            return product_forward(spikes, weight, bias)
        return _dense_forward(s.contiguous(memory_format=torch.channels_last), weight, bias)

    @staticmethod
    @once_differentiable  # a second derivative would be silently wrong
    def backward(ctx, grad: Tensor):
        weight, s = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_s = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_s = _input_gradient(grad, weight)
        if ctx.needs_input_grad[1]:
            if s is None:
                grad_weight = product_weight_gradient(ctx.spikes, grad, weight.shape[2])
            else:
                grad_weight = _dense_weight_gradient(s, grad, weight)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3))
        return grad_s, grad_weight, grad_bias


def spike_conv(s: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolution of spikes with kernel 1 or 3, stride 1, same size: F.conv2d's numbers, up to the order of sums.

    s: (N, C, H, W), best channels last in memory; weight: (O, C, k, k); bias: (O,) or None.
    Returns (N, O, H, W), channels last in memory. Anything that the spike product cannot serve (another dtype or
    device, inputs that are not 0 or 1, autocast, torch.compile) takes the dense product.
    Raises ValueError for another kernel size or channels that do not match.
    """
    if s.dim() != 4 or weight.dim() != 4 or weight.shape[1] != s.shape[1]:
        raise ValueError(
            f"spike_conv takes spikes (N, C, H, W) and a weight (O, C, k, k), got {tuple(s.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"spike_conv takes a bias ({weight.shape[0]},) with this weight, got {tuple(bias.shape)}")
    k = weight.shape[2]
    if k not in (1, 3) or weight.shape[3] != k:
        raise ValueError(f"spike_conv has kernels of 1x1 and 3x3, got {k}x{weight.shape[3]}: use F.conv2d")
    if weight.shape[1] > MAX_CHANNELS or not serves_float32(s, weight):
        return F.conv2d(s, weight, bias, padding=k // 2)
    return _SpikeProduct.apply(s, weight, bias)


def spike_linear(s: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear of spikes (..., C) and weight (O, C): (..., O); see `spike_conv` for what falls back to dense."""
    if s.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"spikes (..., C) and weight (O, C) must agree, got {tuple(s.shape)} and {tuple(weight.shape)}"
        )
    if weight.shape[1] > MAX_CHANNELS or not serves_float32(s, weight):
        return F.linear(s, weight, bias)
    tokens = s.reshape(-1, s.shape[-1])[:, :, None, None]
    return spike_conv(tokens, weight[:, :, None, None], bias).reshape(*s.shape[:-1], weight.shape[0])
