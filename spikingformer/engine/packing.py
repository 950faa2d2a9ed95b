"""Products as the compiled kernels want them: weights in tiles, in 32-bit fixed point or int8."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from spikingformer.native.library import kernel
from spikingformer.native.product_op import packed_weight

from .fixed_point import quantize_product
from .program import Product


class ProductArgs(ctypes.Structure):
    """`ProductArgs` of native/src/product_args.h."""

    _fields_ = [
        ("input", ctypes.c_void_p), ("packed", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p), ("images", ctypes.c_int64), ("height", ctypes.c_int64), ("width", ctypes.c_int64),
        ("channels", ctypes.c_int64), ("outputs", ctypes.c_int64), ("taps", ctypes.c_int64), ("counts", ctypes.c_int32),
        ("accumulate", ctypes.c_int32), ("max_count", ctypes.c_int32), ("threads", ctypes.c_int32),
        ("rows", ctypes.c_void_p),
    ]  # fmt: skip


@dataclass(frozen=True)
class PackedProduct:
    """A product ready for the kernels; the tensors are kept alive here."""

    weight: Tensor  # [tile][tap][C][tile width], int8 or 32-bit fixed point; the stem's: as its kernel wants it
    bias: Tensor
    scale: Tensor | None
    outputs: int
    channels: int
    taps: int
    rows: Tensor | None = None  # int8: the weights once more, where byte shuffles multiply


def pack_int8(weight: Tensor) -> Tensor:
    """int8 (O, C, k, k) to [tile][tap][C][tile width], zeros past the last output."""
    o, c, k, _ = weight.shape
    width = torch.zeros(1, dtype=torch.int64, device="cpu")
    kernel("engine_tile_width", "lp")(o, width.data_ptr())
    tiles = -(-o // int(width))
    padded = torch.zeros(tiles * int(width), c, k * k, dtype=torch.int8, device="cpu")
    padded[:o] = weight.reshape(o, c, k * k)
    return padded.unflatten(0, (tiles, int(width))).permute(0, 3, 2, 1).contiguous()


def pack_rows(weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor | None:
    """int8 (O, C, k, k) as src/shuffle_product.h reads it: bytes, or None where the processor has no such shuffles."""
    o, c, k, _ = weight.shape
    by_tap = weight.reshape(o, c, k * k).transpose(1, 2).contiguous()
    size = torch.zeros(1, dtype=torch.int64, device="cpu")
    pack = kernel("engine_pack_rows", "ppplllpp")
    shape = (by_tap.data_ptr(), scale.data_ptr(), bias.data_ptr(), o, c, k * k)
    pack(*shape, None, size.data_ptr())
    if not size:
        return None
    rows = torch.zeros(int(size), dtype=torch.uint8, device="cpu")
    pack(*shape, rows.data_ptr(), size.data_ptr())
    return rows


def _pack_picture(weight: Tensor) -> Tensor:
    """int8 (O, C, 3, 3) to int16 [3 rows][pairs of (column, channel)][outputs, padded][2]."""
    o, c = weight.shape[:2]
    if (9 * c + 1) * 127 * 2**15 > 2**31:
        raise ValueError(f"sums of the integer engine hold up to 57 input channels, got {c}: use the float engine")
    inputs = torch.zeros(3, -(-3 * c // 2) * 2, -(-o // 192) * 192, dtype=torch.int16, device="cpu")
    inputs[:, : 3 * c, :o] = weight.permute(2, 3, 1, 0).reshape(3, 3 * c, o)
    return inputs.unflatten(1, (-1, 2)).transpose(2, 3).contiguous()


def pack_product(step: Product, max_count: int, integer: bool, bits_of_input: int) -> PackedProduct:
    """`step` for the int8 or the float32 kernels.

    `max_count`: the largest count of spikes that it reads. `bits_of_input`: fraction bits of the picture (int8).

    Raises ValueError for a first product of too many channels (int8).
    """
    o, c, k, _ = step.weight.shape
    if step.source == "picture":
        if not integer:
            return PackedProduct(step.weight.float().contiguous(), step.bias.float(), None, o, c, 9)
        first = quantize_product(step, bits_of_input)
        return PackedProduct(_pack_picture(first.weight), first.bias, first.scale, o, c, 9)
    if not integer:
        fixed = packed_weight(step.weight.float())
        # The units are so small that no sum of spikes overflows: counts need larger ones where they reach far.
        units = (step.weight / fixed.scale.double()[:, None, None, None]).nan_to_num().flatten(1)
        largest = torch.maximum(units.clamp(min=0).sum(1), (-units).clamp(min=0).sum(1)).max() + units.shape[1]
        shift = (int(max_count * largest) >> 31).bit_length()
        packed = (fixed.packed + (1 << shift >> 1)) >> shift
        return PackedProduct(packed, step.bias.float(), fixed.scale * 2**shift, o, c, k * k)
    q = quantize_product(step)
    rows = None if step.source == "counts" else pack_rows(q.weight, q.scale, q.bias)
    return PackedProduct(pack_int8(q.weight), q.bias, q.scale, o, c, k * k, rows)
