"""Spike products in float32 are exact: sums in fixed point, whatever the batch, threads or path."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spikingformer import native
from spikingformer.native.ops import spike_conv
from tests.native.helpers import KERNELS, spikes

pytestmark = pytest.mark.skipif(not native.status().available, reason=native.status().reason)
ISAS = native.available_isas() or ("none",)
RATES = [pytest.param(0.05, id="lists"), pytest.param(0.5, id="tables")]


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
