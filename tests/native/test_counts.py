"""Products of counts of spikes (Spikformer's stream) and float32 weights: exact on every path.

Weights are small integers, so that fixed point holds them whole and sums in float64 are exact.
"""

import ctypes

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spikingformer import native
from spikingformer.engine.packing import ProductArgs
from spikingformer.native.library import kernel
from spikingformer.native.product_op import packed_weight
from tests.native.helpers import KERNELS, spikes

pytestmark = pytest.mark.skipif(not native.status().available, reason=native.status().reason)
SHIFT = 7  # 2^7 > 65, the largest count here


def product(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor | None = None) -> Tensor:
    """Currents (N, O, H, W) of counts x (N, C, H, W)."""
    n, c, h, w = x.shape
    o, _, k, _ = weight.shape
    tokens = x.permute(0, 2, 3, 1).to(torch.uint8).contiguous()
    fixed = packed_weight(weight)
    assert not (fixed.packed & (2**SHIFT - 1)).any()
    packed, scale = fixed.packed >> SHIFT, fixed.scale * 2**SHIFT  # units so large that no sum of counts overflows
    out = torch.full((n, h, w, o), torch.nan)
    if before is not None:
        out.copy_(before.permute(0, 2, 3, 1))
    args = ProductArgs(
        tokens.data_ptr(), packed.data_ptr(), scale.data_ptr(), bias.data_ptr(), out.data_ptr(), n, h, w, c, o, k * k,
        1, before is not None, int(x.max()), torch.get_num_threads(), None,
    )  # fmt: skip
    kernel("engine_product_f32", "p")(ctypes.addressof(args))
    return out.permute(0, 3, 1, 2)


def integers(*shape: int, largest: int = 20, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).float()


def counts(*shape: int, most: int, rate: float) -> Tensor:
    x = sum(spikes(*shape, rate=rate, seed=i) for i in range(most))
    x[0, 0, 0, 0] = most
    return x


def definition(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor | None = None) -> Tensor:
    sums = F.conv2d(x.double(), weight.double(), padding=weight.shape[-1] // 2).float() + bias[:, None, None]
    return sums if before is None else sums + before


@pytest.mark.parametrize("accumulate", [False, True], ids=["fresh", "added"])
@pytest.mark.parametrize("kernel_size", KERNELS)
@pytest.mark.parametrize(
    ("most", "rate"),
    [
        pytest.param(3, 0.05, id="lists"),
        pytest.param(3, 0.4, id="tables"),
        pytest.param(9, 0.03, id="lists of up to nine"),
        pytest.param(9, 0.3, id="tables and lists of fours"),
        pytest.param(65, 0.5, id="mostly fours"),
    ],
)
@pytest.mark.parametrize(
    ("n", "c", "o", "h", "w"),
    [
        pytest.param(1, 1, 7, 5, 7, id="1 to 7"),
        pytest.param(3, 67, 41, 4, 9, id="67 to 41"),
        pytest.param(1, 130, 200, 6, 5, id="130 to 200"),
        pytest.param(40, 66, 33, 9, 11, id="several chunks"),
        pytest.param(1, 31, 40, 33, 35, id="several chunks of one picture"),
    ],
)
def test_currents_of_counts(isa, n, c, o, h, w, most, rate, kernel_size, accumulate):
    x, weight, bias = counts(n, c, h, w, most=most, rate=rate), integers(o, c, kernel_size, kernel_size), integers(o)
    before = integers(n, o, h, w, seed=2) if accumulate else None
    want = definition(x, weight, bias, before)
    assert torch.equal(product(x, weight, bias, before), want)
    assert want.unique().numel() > 1


def test_chunks_choose_their_own_way(isa):
    """Silent, lists, tables, tables with fours: pictures of one call, each as it is alone."""
    kinds = [
        torch.zeros(8, 96, 8, 8),
        *(counts(8, 96, 8, 8, most=m, rate=r) for m, r in ((2, 0.1), (3, 0.5), (12, 0.5))),
    ]
    weight, bias = integers(50, 96, 1, 1), integers(50)
    whole = product(torch.cat(kinds), weight, bias)
    assert torch.equal(whole, torch.cat([product(x, weight, bias) for x in kinds]))
    assert torch.equal(whole, definition(torch.cat(kinds), weight, bias))
