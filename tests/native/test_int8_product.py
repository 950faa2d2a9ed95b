"""Products of spikes or counts and int8 weights against their definition, bit for bit, on every path."""

import ctypes

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spikingformer import native
from spikingformer.engine.fixed_point import IntegerNeuron
from spikingformer.engine.int8_reference import neuron
from spikingformer.engine.packing import ProductArgs, pack_int8, pack_rows
from spikingformer.native.library import kernel
from spikingformer.native.ops import pack_spikes
from tests.native.helpers import KERNELS, spikes

pytestmark = pytest.mark.skipif(not native.status().available, reason=native.status().reason)


def int8_product(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    before: Tensor | None = None,
    spoil_rows: bool = False,
    fire: tuple[int, IntegerNeuron, bool] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Currents int16 (N, O, H, W) of spikes or counts x (N, C, H, W), int8 weight (O, C, k, k).

    spoil_rows: the weights that byte shuffles read are zeros, so that it shows where they were used.
    fire: time steps T (N = T * B), the neuron, whether currents are kept. Then spikes' bits (N, H, W, words) are
    returned too; currents that are not kept mean nothing.
    """
    n, c, h, w = x.shape
    o, _, k, _ = weight.shape
    counts = x.max() > 1
    tokens = x.permute(0, 2, 3, 1).to(torch.uint8).contiguous() if counts else pack_spikes(x.float()).bits
    most = int(x.max()) if counts else 1
    packed, rows = pack_int8(weight), None if counts else pack_rows(weight, scale, bias)
    if rows is not None and spoil_rows:
        rows.zero_()
    out = torch.full((n, h, w, o), -12345, dtype=torch.int16)
    if before is not None:
        out.copy_(before.permute(0, 2, 3, 1))
    args = ProductArgs(
        tokens.data_ptr(), packed.data_ptr(), scale.data_ptr(), bias.data_ptr(), out.data_ptr(), n, h, w, c, o, k * k,
        counts, before is not None, most, torch.get_num_threads(),
        None if rows is None else rows.data_ptr(),
    )  # fmt: skip
    if fire is None:
        kernel("engine_product_i8", "p")(ctypes.addressof(args))
        return out.permute(0, 3, 1, 2)
    steps, lif, keep = fire
    bits = torch.full((n, h, w, -(-o // 64)), -1)
    kernel("engine_product_fire_i8", "pliiiip")(
        ctypes.addressof(args), steps, int(keep), lif.keep, lif.take, lif.threshold, bits.data_ptr()
    )
    return out.permute(0, 3, 1, 2), bits


def int8_definition(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, before: Tensor | None = None) -> Tensor:
    sums = F.conv2d(x.double(), weight.double(), padding=weight.shape[-1] // 2).round()
    currents = (sums.float() * scale[:, None, None] + bias[:, None, None]).clamp(-32768, 32767).round()
    if before is not None:
        currents = (currents + before).clamp(-32768, 32767)
    return currents.to(torch.int16)


def int8_case(c: int, o: int, k: int, largest: int = 127) -> tuple[Tensor, Tensor, Tensor]:
    """Weights to `largest`. Shuffles add two groups in bytes at most below 30, none at 127."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randint(-largest, largest + 1, (o, c, k, k), generator=generator, dtype=torch.int8)
    return weight, torch.rand(o, generator=generator) * 3, torch.randn(o, generator=generator) * 100


# Below and above where lists meet tables (0.35 - 10 / C) and shuffles (0.17 - 3.5 / C, and 0.2 - 3.5 / C for 3x3).
INT8_RATES = [pytest.param(0.02, id="few fire"), pytest.param(0.6, id="many fire")]
SHAPES = [
    pytest.param(1, 63, 1, 3, 3, id="63 to 1"),
    pytest.param(2, 65, 7, 5, 7, id="65 to 7"),
    pytest.param(3, 67, 41, 4, 9, id="67 to 41"),
    pytest.param(1, 130, 200, 6, 5, id="130 to 200"),
    pytest.param(40, 66, 33, 9, 11, id="several chunks"),
    pytest.param(1, 259, 40, 33, 35, id="several chunks of one picture"),
]


@pytest.mark.parametrize("accumulate", [False, True], ids=["fresh", "added"])
@pytest.mark.parametrize("kernel_size", KERNELS)
@pytest.mark.parametrize("rate", INT8_RATES)
@pytest.mark.parametrize(("n", "c", "o", "h", "w"), SHAPES)
def test_int8_currents_of_spikes(isa, rate, kernel_size, n, c, o, h, w, accumulate):
    x, case = spikes(n, c, h, w, rate=rate), int8_case(c, o, kernel_size)
    before = torch.randint(-32768, 32768, (n, o, h, w), dtype=torch.int16) if accumulate else None
    want = int8_definition(x, *case, before)
    assert torch.equal(int8_product(x, *case, before), want)
    assert want.unique().numel() > 1


@pytest.mark.parametrize("most", [2, 3, 9, 17], ids=lambda n: f"counts to {n}")
@pytest.mark.parametrize("kernel_size", KERNELS)
@pytest.mark.parametrize("rate", INT8_RATES)
@pytest.mark.parametrize(("n", "c", "o", "h", "w"), SHAPES[1:5])
def test_int8_currents_of_counts(isa, rate, kernel_size, n, c, o, h, w, most):
    x, case = sum(spikes(n, c, h, w, rate=rate, seed=i) for i in range(most)), int8_case(c, o, kernel_size)
    x[0, 0, 0, 0] = most
    assert torch.equal(int8_product(x, *case), int8_definition(x, *case))


@pytest.mark.parametrize("kernel_size", KERNELS)
def test_shuffles_run_where_many_fire_and_nowhere_else(isa, kernel_size):
    case = int8_case(384, 40, kernel_size)
    for rate, shuffled in ((0.02, False), (0.13, False), (0.23, True), (0.9, True)):
        x = spikes(4, 384, 8, 8, rate=rate)
        want = int8_definition(x, *case)
        assert torch.equal(int8_product(x, *case), want)
        spoilt = int8_product(x, *case, spoil_rows=True)
        assert torch.equal(spoilt, want) == (not shuffled or isa not in ("avx512", "avx2"))


@pytest.mark.parametrize("sign", [127, -127], ids=["all 127", "all -127"])
@pytest.mark.parametrize("kernel_size", KERNELS)
@pytest.mark.parametrize("rate", [0.1, 1.0], ids=["few fire", "all fire"])
@pytest.mark.parametrize("c", [64, 257, 1536])
def test_largest_int8_weights_do_not_overflow(isa, c, rate, kernel_size, sign):
    weight = torch.full((9, c, kernel_size, kernel_size), sign, dtype=torch.int8)
    scale, bias = torch.full((9,), 32000 / (127 * c * kernel_size**2)), torch.zeros(9)
    x = spikes(1, c, 5, 5, rate=rate)
    want = int8_definition(x, weight, scale, bias)
    assert torch.equal(int8_product(x, weight, scale, bias), want)
    assert want.abs().max() < 32767, "the currents do not saturate: a wrapped sum would show"
    if rate == 1:
        assert want.abs().max() == 32000


@pytest.mark.parametrize("kernel_size", KERNELS)
@pytest.mark.parametrize("count", [1, 15, 17, 127, 128, 255])
def test_largest_counts_do_not_overflow(isa, kernel_size, count):
    c = 384
    weight = torch.full((9, c, kernel_size, kernel_size), 127, dtype=torch.int8)
    weight[4:] *= -1
    scale, bias = torch.full((9,), 32000 / (127 * c * count * kernel_size**2)), torch.zeros(9)
    x = torch.full((2, c, 4, 4), float(count))
    want = int8_definition(x, weight, scale, bias)
    assert torch.equal(int8_product(x, weight, scale, bias), want)
    assert want.max() == 32000
    assert want.min() == -32000


def test_int8_currents_saturate(isa):
    weight = torch.full((8, 384, 3, 3), 127, dtype=torch.int8)
    weight[4:] *= -1
    for rate in (0.05, 1.0):
        x = spikes(1, 384, 4, 4, rate=rate)
        out = int8_product(x, weight, torch.full((8,), 100.0), torch.zeros(8))
        assert (out[:, :4] == 32767).all()
        assert (out[:, 4:] == -32768).all()


@pytest.mark.parametrize("largest", [30, 64, 75, 127], ids=lambda n: f"weights to {n}")
@pytest.mark.parametrize("kernel_size", KERNELS)
@pytest.mark.parametrize("count", [1, 3], ids=["spikes", "counts"])
@pytest.mark.parametrize("c", [61, 384])
def test_every_plan_of_adding_groups(isa, c, count, kernel_size, largest):
    x, case = spikes(3, c, 8, 9, rate=0.5) * count, int8_case(c, 37, kernel_size, largest)
    case[0][3] = 0
    case[0][5, :, 0, 0] = torch.where(torch.arange(c) % 4 == 0, 127, 0).to(torch.int8)  # groups of one large weight
    assert torch.equal(int8_product(x, *case), int8_definition(x, *case))


@pytest.mark.parametrize("into", ["scratch", "stream", "added"])
@pytest.mark.parametrize("rate", INT8_RATES)
@pytest.mark.parametrize("kernel_size", KERNELS)
@pytest.mark.parametrize("count", [1, 2], ids=["spikes", "counts"])
@pytest.mark.parametrize(
    ("steps", "batch", "c", "o", "h", "w"),
    [
        pytest.param(1, 2, 64, 40, 5, 7, id="one step"),
        pytest.param(3, 2, 67, 130, 5, 5, id="a part of a word"),
        pytest.param(4, 23, 96, 64, 8, 8, id="several chunks"),
        pytest.param(16, 1, 70, 72, 14, 13, id="chunks of a part of a picture"),
    ],
)
def test_a_product_with_its_neurons(isa, threads, steps, batch, c, o, h, w, count, kernel_size, rate, into):
    x = spikes(steps * batch, c, h, w, rate=rate) * count
    weight, scale, bias = int8_case(c, o, kernel_size)
    before = None
    if into == "added":
        before = torch.randint(-2000, 2000, (steps * batch, o, h, w), dtype=torch.int16)
    want = int8_definition(x, weight, scale, bias, before)
    lif = IntegerNeuron(2**13, 2**13, int(want.abs().double().mean() / 2) + 1)
    fired = neuron(want.long().unflatten(0, (steps, batch)), lif).flatten(0, 1)
    currents, bits = int8_product(x, weight, scale, bias, before, fire=(steps, lif, into != "scratch"))
    assert 0.002 < fired.double().mean() < 0.98
    assert torch.equal(
        bits.flatten(0, 2), pack_spikes(fired.float().contiguous(memory_format=torch.channels_last)).bits
    )
    if into != "scratch":
        assert torch.equal(currents, want)
