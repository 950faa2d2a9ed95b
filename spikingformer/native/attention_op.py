"""Spike attention with its neuron on the CPU: LIF(q (k^T v) * scale), all time steps in one call.

T: time steps, B: batch, C: channels, H, W: rows and columns. Only q, k and v are kept for the backward, as bits.
"""

import ctypes
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .library import kernel, threads
from .memory import empty
from .neuron_op import neuron_args, neuron_constants
from .product_op import PackedSpikes, pack_spikes

if TYPE_CHECKING:
    from spikingformer.neurons import LIFConfig

_ELEMENTS = {torch.float32: 0, torch.float64: 1}


class AttentionArgs(ctypes.Structure):
    """`AttentionArgs` of src/attention.cpp."""

    _fields_ = [
        ("batch", ctypes.c_int64), ("tokens", ctypes.c_int64), ("channels", ctypes.c_int64), ("heads", ctypes.c_int64),
        ("scale", ctypes.c_double), ("threads", ctypes.c_int32), ("unused", ctypes.c_int32),
    ]  # fmt: skip


def _call(name: str, packed: list[PackedSpikes], shape, settings, dtype: torch.dtype, *tensors: Tensor) -> None:
    t, b, c, h, w = shape
    heads, scale, *constants = settings
    neuron = neuron_args(t, *constants)
    args = AttentionArgs(b, h * w, c, heads, scale, threads(), 0)
    kernel(name, "ppi" + "p" * (3 + len(tensors)))(
        ctypes.byref(neuron), ctypes.byref(args), _ELEMENTS[dtype], *(p.bits.data_ptr() for p in packed),
        *(x.data_ptr() for x in tensors),
    )  # fmt: skip


class _SpikeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, packed: list[PackedSpikes], *settings) -> Tensor:
        t, b, c, h, w = q.shape
        ctx.packed, ctx.settings, ctx.shape = packed, settings, q.shape
        spikes = empty((t, b, c, h, w), q.dtype, channels_last=True)
        if spikes.numel():
            _call("attention_forward", packed, q.shape, settings, q.dtype, spikes)
        return spikes

    @staticmethod
    @once_differentiable  # a second derivative would be silently wrong
    def backward(ctx, grad: Tensor):
        grad = grad.permute(0, 1, 3, 4, 2).contiguous()
        grads = [empty(tuple(grad.shape), grad.dtype) for _ in range(3)]
        if grad.numel():
            _call("attention_backward", ctx.packed, ctx.shape, ctx.settings, grad.dtype, grad, *grads)
        return *(g.permute(0, 1, 4, 2, 3) for g in grads), None, *[None] * len(ctx.settings)


def _pack(x: Tensor) -> PackedSpikes:
    packed = pack_spikes(x.float())
    return packed if x.dtype == torch.float32 else replace(packed, binary=bool(((x == 0) | (x == 1)).all()))


def attention_lif(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float, config: "LIFConfig") -> Tensor | None:
    """Spikes of LIF(q (k^T v) * scale), one head after another in the channels; None where an input is not all spikes.

    q, k, v: (T, B, C, H, W), float32 or float64, channels last in memory. Returns the same shape and layout.
    Raises ValueError for another dtype or shapes that do not fit.
    """
    if q.dtype not in _ELEMENTS or q.dim() != 5 or not q.shape == k.shape == v.shape or q.shape[2] % heads:
        raise ValueError(
            f"attention takes q, k, v (T, B, C, H, W) of one shape in float32 or float64, "
            f"C a multiple of {heads} heads; got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} in {q.dtype}"
        )
    packed = [_pack(x.detach().flatten(0, 1)) for x in (q, k, v)]
    if not all(p.binary for p in packed):
        return None
    return _SpikeAttention.apply(q, k, v, packed, heads, scale, *neuron_constants(config))
