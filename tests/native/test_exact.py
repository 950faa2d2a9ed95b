"""Spike products are exact: float32 sums in fixed point, int8 sums in integers, whatever the batch, threads or path."""

import ctypes

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spikingformer import native
from spikingformer.engine.runner import SHUFFLING, _pack_int8, _pack_rows, _ProductArgs
from spikingformer.native.library import kernel
from spikingformer.native.ops import pack_spikes, spike_conv

pytestmark = pytest.mark.skipif(not native.status().available, reason=native.status().reason)
ISAS = native.available_isas() or ("none",)
RATES = [pytest.param(0.05, id="lists"), pytest.param(0.5, id="tables")]
KERNELS = [pytest.param(1, id="1x1"), pytest.param(3, id="3x3")]


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def spikes(*shape: int, rate: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    n, c, h, w = shape
    return (torch.rand(n, h, w, c, generator=generator) < rate).float().permute(0, 3, 1, 2)


def case(c: int, o: int, k: int) -> tuple[Tensor, Tensor]:
    """A weight whose outputs differ in size by orders of magnitude, and a bias."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(o, c, k, k, generator=generator) * torch.logspace(-4, 4, o)[:, None, None, None]
    return weight, torch.randn(o, generator=generator)


# ---- float32 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel_size", KERNELS)
@pytest.mark.parametrize("rate", RATES)
def test_a_sample_alone_gives_the_bits_it_gives_in_a_batch(isa, threads, rate, kernel_size):
    weight, bias = case(70, 50, kernel_size)
    s = spikes(40, 70, 6, 5, rate=rate)  # more tokens than a chunk holds
    whole = spike_conv(s, weight, bias)
    for i in range(0, len(s), 7):
        assert torch.equal(whole[i : i + 1], spike_conv(s[i : i + 1], weight, bias))


@pytest.mark.parametrize("kernel_size", KERNELS)
@pytest.mark.parametrize("rate", RATES)
def test_instruction_sets_and_threads_agree_to_the_bit(rate, kernel_size):
    weight, bias = case(130, 70, kernel_size)
    s = spikes(20, 130, 7, 9, rate=rate)
    before, results = torch.get_num_threads(), []
    try:
        for name in ISAS:
            for count in (1, 2):
                torch.set_num_threads(count)
                with native.use_isa(name):
                    results.append(spike_conv(s, weight, bias))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize("kernel_size", KERNELS)
def test_lists_and_tables_agree_to_the_bit(isa, kernel_size):
    """The same sample in a batch that is silent otherwise, and in one that fires everywhere else."""
    weight, bias = case(100, 50, kernel_size)
    s = spikes(1, 100, 8, 8, rate=0.3)
    silent = spike_conv(torch.cat([s, torch.zeros(7, 100, 8, 8)]), weight, bias)
    firing = spike_conv(torch.cat([s, torch.ones(7, 100, 8, 8)]), weight, bias)
    assert torch.equal(silent[:1], firing[:1])
    assert not torch.equal(silent[1:], firing[1:])


@pytest.mark.parametrize("kernel_size", KERNELS)
@pytest.mark.parametrize("rate", RATES)
def test_the_error_is_a_rounding_of_the_sum_of_all_weights(isa, threads, rate, kernel_size):
    weight, _ = case(70, 50, kernel_size)
    s = spikes(4, 70, 9, 8, rate=rate)
    want = F.conv2d(s.double(), weight.double(), padding=kernel_size // 2)
    total = weight.double().abs().sum((1, 2, 3))[:, None, None]
    error = (spike_conv(s, weight).double() - want).abs() / total
    assert error.max() < 2e-7
    assert want.abs().max() > 1e3  # and outputs of 1e-4 were held to the same share of their own weights
    assert total.min() < 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("kernel_size", KERNELS)
@pytest.mark.parametrize("rate", RATES)
def test_a_weight_that_is_not_finite_spoils_its_own_output_alone(isa, rate, kernel_size, value):
    weight, bias = case(65, 20, kernel_size)
    s = spikes(2, 65, 5, 4, rate=rate)
    before = spike_conv(s, weight, bias)
    weight[7, 64, 0, 0] = value
    after = spike_conv(s, weight, bias)
    assert not after[:, 7].isfinite().any()
    others = [i for i in range(20) if i != 7]
    assert torch.equal(after[:, others], before[:, others])
    assert before.isfinite().all()


@pytest.mark.parametrize("rate", RATES)
def test_weights_of_zero_give_the_bias(isa, rate):
    weight, bias = case(65, 20, 3)
    weight[:10] = 0
    out = spike_conv(spikes(2, 65, 5, 4, rate=rate), weight, bias)
    assert torch.equal(out[:, :10], bias[:10, None, None].expand(2, 10, 5, 4))
    assert not torch.equal(out[:, 10], bias[10].expand(2, 5, 4))


@pytest.mark.parametrize("size", [1e-30, 1e30, 3e38], ids=["1e-30", "1e30", "3e38"])
def test_weights_at_the_ends_of_the_range(isa, size):
    weight, s = torch.full((3, 64, 1, 1), size), torch.zeros(1, 64, 2, 2)
    weight[1] *= -1
    s[0, 5] = 1
    out = spike_conv(s, weight)
    torch.testing.assert_close(out, F.conv2d(s, weight), rtol=1e-6, atol=0)
    assert out[0, 1, 0, 0] < 0


def test_largest_weights_of_one_sign_do_not_overflow(isa):
    for rate in (0.05, 1.0):
        s, weight = spikes(1, 1500, 4, 4, rate=rate), torch.full((20, 1500, 3, 3), 0.9999999)
        want = F.conv2d(s.double(), weight.double(), padding=1)
        torch.testing.assert_close(spike_conv(s, weight).double(), want, rtol=1e-5, atol=0)


# ---- int8 -----------------------------------------------------------------------------------------------------------


def int8_product(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, before: Tensor | None = None, spoil_rows: bool = False
) -> Tensor:
    """Currents int16 (N, O, H, W) of spikes or counts x (N, C, H, W), int8 weight (O, C, k, k).

    spoil_rows: the weights that byte shuffles read are zeros, so that it shows where they were used.
    """
    n, c, h, w = x.shape
    o, _, k, _ = weight.shape
    counts = x.max() > 1
    tokens = x.permute(0, 2, 3, 1).to(torch.uint8).contiguous() if counts else pack_spikes(x.float()).bits
    packed, rows = _pack_int8(weight), _pack_rows(weight)
    if rows is not None and spoil_rows:
        rows.zero_()
    out = torch.full((n, h, w, o), -12345, dtype=torch.int16)
    if before is not None:
        out.copy_(before.permute(0, 2, 3, 1))
    args = _ProductArgs(
        tokens.data_ptr(), packed.data_ptr(), scale.data_ptr(), bias.data_ptr(), out.data_ptr(), n, h, w, c, o, k * k,
        counts, before is not None, int(x.max()) if counts else 1, torch.get_num_threads(),
        None if rows is None else rows.data_ptr(),
    )  # fmt: skip
    kernel("engine_product_i8", "p")(ctypes.addressof(args))
    return out.permute(0, 3, 1, 2)


def int8_definition(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, before: Tensor | None = None) -> Tensor:
    sums = F.conv2d(x.double(), weight.double(), padding=weight.shape[-1] // 2).round()
    currents = (sums.float() * scale[:, None, None] + bias[:, None, None]).clamp(-32768, 32767).round()
    if before is not None:
        currents = (currents + before).clamp(-32768, 32767)
    return currents.to(torch.int16)


def int8_case(c: int, o: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randint(-127, 128, (o, c, k, k), generator=generator, dtype=torch.int8)
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


@pytest.mark.parametrize("counts", [False, True], ids=["spikes", "counts"])
@pytest.mark.parametrize("kernel_size", KERNELS)
def test_shuffles_run_where_many_fire_and_nowhere_else(isa, kernel_size, counts):
    case = int8_case(384, 40, kernel_size)
    for rate, shuffled in ((0.02, False), (0.13, False), (0.23, True), (0.9, True)):
        x = spikes(4, 384, 8, 8, rate=rate)
        if counts:  # the sum of both planes' spikes weighs the second double: 3 rates, of 2 planes
            x = (x + 2 * spikes(4, 384, 8, 8, rate=rate * 0.5, seed=1)).clamp(max=3)
            x[0, 0, 0, 0] = 3
        want = int8_definition(x, *case)
        assert torch.equal(int8_product(x, *case), want)
        spoilt = int8_product(x, *case, spoil_rows=True)
        assert torch.equal(spoilt, want) == (not shuffled or isa not in SHUFFLING)


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
@pytest.mark.parametrize("count", [1, 15, 17])
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
