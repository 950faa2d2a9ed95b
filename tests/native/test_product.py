"""Spike products against the dense ones: outputs and all gradients, odd sizes, every instruction set."""

import pytest
import torch
import torch.nn.functional as F

from spikingformer import native
from spikingformer.native import product_op
from spikingformer.native.ops import pack_spikes, spike_conv, spike_linear

pytestmark = [
    pytest.mark.skipif(not native.status().available, reason=native.status().reason),
    pytest.mark.usefixtures("poisoned_empty"),
]
# float32 sums of up to 9 * 130 terms of size 1 in another order than the dense product's
TOLERANCE = {"rtol": 1e-4, "atol": 2e-4}


@pytest.fixture(params=[1.0, -1.0], ids=["lists", "tables"])
def gradient_form(request, monkeypatch):
    monkeypatch.setattr(product_op, "gradient_table_rate", lambda: request.param)


def spikes(*shape, rate=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n, c, h, w = shape
    return (torch.rand(n, h, w, c, generator=generator) < rate).float().permute(0, 3, 1, 2)


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize(
    ("n", "c", "o", "h", "w"),
    [
        (2, 64, 192, 5, 7),
        (3, 1, 1, 1, 1),
        (1, 63, 17, 3, 2),
        (2, 130, 200, 4, 4),
        (1, 48, 96, 33, 20),
        (2, 24, 384, 2, 9),
    ],
)
@pytest.mark.parametrize("rate", [0.03, 0.6], ids=["forward by lists", "forward by tables"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_equals_the_dense_product_with_all_gradients(isa, gradient_form, kernel_size, n, c, o, h, w, with_bias, rate):
    torch.manual_seed(0)
    s = spikes(n, c, h, w, rate=rate)
    weight = torch.randn(o, c, kernel_size, kernel_size)
    bias = torch.randn(o) if with_bias else None
    grad = torch.randn(n, o, h, w)

    def run(function):
        leaves = [t.detach().clone().requires_grad_() for t in (s, weight, bias) if t is not None]
        out = function(*leaves)
        out.backward(grad)
        return [out.detach(), *(t.grad for t in leaves)]

    got = run(spike_conv)
    expected = run(lambda *a: F.conv2d(*a, padding=kernel_size // 2))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, **TOLERANCE)
    assert got[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.5, 1.0])
def test_rates_from_silence_to_all_ones(isa, gradient_form, rate):
    s, weight = spikes(2, 100, 6, 6, rate=rate), torch.randn(50, 100, 3, 3)
    packed = pack_spikes(s)
    assert packed.binary
    assert packed.ones == int(s.sum())
    assert torch.equal(packed.unpack(), s)
    torch.testing.assert_close(spike_conv(s, weight), F.conv2d(s, weight, padding=1), **TOLERANCE)


def test_wide_layers_walk_their_weights_in_blocks(isa, gradient_form):
    for rate in (0.05, 0.5):
        s, weight = spikes(1, 3000, 5, 5, rate=rate), torch.randn(200, 3000, 1, 1)
        torch.testing.assert_close(spike_conv(s, weight), F.conv2d(s, weight), rtol=1e-3, atol=1e-3)


def test_many_small_images_and_parts_of_large_ones_in_the_weight_gradient(isa, gradient_form):
    for shape in ((40, 70, 4, 4), (2, 70, 40, 30)):
        s, grad = spikes(*shape), torch.randn(shape[0], 20, *shape[2:])
        weight = torch.zeros(20, 70, 3, 3, requires_grad=True)
        spike_conv(s, weight).backward(grad)
        got, weight.grad = weight.grad, None
        F.conv2d(s, weight, padding=1).backward(grad)
        torch.testing.assert_close(got, weight.grad, rtol=1e-4, atol=1e-3)


def test_linear(isa, gradient_form):
    s = spikes(2, 3, 5, 70)[:, 0].contiguous()
    weight = torch.randn(33, 70)
    torch.testing.assert_close(spike_linear(s, weight), F.linear(s, weight), **TOLERANCE)


@pytest.mark.parametrize("value", [2.0, -1.0, 0.5, float("nan")])
def test_anything_but_spikes_takes_the_dense_product(isa, gradient_form, value):
    s, weight = spikes(1, 65, 3, 3), torch.randn(8, 65, 3, 3, requires_grad=True)
    s[0, 64, 2, 2] = value
    assert not pack_spikes(s).binary
    out, expected = spike_conv(s, weight), F.conv2d(s, weight, padding=1)
    torch.testing.assert_close(out, expected, equal_nan=True, **TOLERANCE)
    grad = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, weight, grad)
    (want,) = torch.autograd.grad(expected, weight, grad)
    torch.testing.assert_close(got, want, equal_nan=True, **TOLERANCE)


def test_only_the_bits_are_kept_for_the_backward(isa):
    s, weight = spikes(1, 65, 3, 3), torch.randn(8, 65, 3, 3, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        spike_conv(s, weight)
    assert s.numel() not in kept, "the float spikes must not be kept"


def test_the_weight_gradient_over_many_tokens(isa, gradient_form):
    """More tokens than the tables' chunk holds, and a last chunk that ends inside a word."""
    s, grad = spikes(3, 33, 30, 31, rate=0.5), torch.randn(3, 20, 30, 31)
    packed = pack_spikes(s)
    expected = product_op._dense_weight_gradient(s.double(), grad.double(), torch.zeros(20, 33, 3, 3).double())
    got = product_op.product_weight_gradient(packed, grad, 3)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("width", [62, 63, 64, 65, 130])
def test_the_weight_gradient_of_rows_longer_than_a_word(isa, gradient_form, width):
    """Taps read the neighbouring rows' bits, a whole word or more away, and never past a picture's edge."""
    s, grad = spikes(9, 5, 4, width, rate=0.5), torch.randn(9, 6, 4, width)
    expected = product_op._dense_weight_gradient(s.double(), grad.double(), torch.zeros(6, 5, 3, 3).double())
    got = product_op.product_weight_gradient(pack_spikes(s), grad, 3)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("n", "o", "c", "h", "w"), [(2, 17, 5, 5, 7), (3, 33, 40, 1, 2), (5, 130, 70, 9, 12), (0, 16, 16, 4, 4)]
)
def test_the_gradient_of_the_spikes_of_a_3x3_product(isa, n, o, c, h, w):
    """Winograd's transforms add and subtract before they multiply: held to the float64 product, whatever the batch."""
    torch.manual_seed(0)
    grad, weight = torch.randn(n, h, w, o).permute(0, 3, 1, 2), torch.randn(o, c, 3, 3)
    got = product_op._input_gradient(grad, weight)
    assert got.shape == (n, c, h, w)
    if n:
        expected = torch.nn.grad.conv2d_input((n, c, h, w), weight.double(), grad.double(), padding=1)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)  # sums of 9 * o terms of size 1
        assert torch.equal(product_op._input_gradient(grad[-1:], weight), got[-1:])


def test_a_changed_weight_is_packed_again(isa, gradient_form):
    s, weight = spikes(1, 10, 2, 2), torch.nn.Parameter(torch.randn(4, 10, 1, 1))
    before = spike_conv(s, weight)
    with torch.no_grad():
        weight.mul_(2)
    torch.testing.assert_close(spike_conv(s, weight), before * 2)


def test_a_weight_changed_through_data_is_packed_again(isa, gradient_form):
    """As optimisers of older manners do: the tensor's version stays what it was."""
    for o, c in ((4, 10), (100, 300)):
        s, weight = spikes(1, c, 2, 2), torch.nn.Parameter(torch.randn(o, c, 1, 1))
        before = spike_conv(s, weight)
        weight.data.mul_(2)
        torch.testing.assert_close(spike_conv(s, weight), before * 2)


def test_layouts_and_the_empty_batch(isa, gradient_form):
    s, weight = spikes(2, 20, 6, 5), torch.randn(12, 20, 3, 3).to(memory_format=torch.channels_last)
    expected = F.conv2d(s, weight, padding=1)
    torch.testing.assert_close(spike_conv(s.contiguous(), weight), expected, **TOLERANCE)
    torch.testing.assert_close(
        spike_conv(s.transpose(2, 3), weight), F.conv2d(s.transpose(2, 3), weight, padding=1), **TOLERANCE
    )
    assert spike_conv(s[:0], weight).shape == (0, 12, 6, 5)


def test_refusals():
    with pytest.raises(ValueError, match="kernels of 1x1 and 3x3, got 5x5"):
        spike_conv(torch.zeros(1, 2, 8, 8), torch.zeros(3, 2, 5, 5))
    with pytest.raises(ValueError, match=r"a weight \(O, C, k, k\)"):
        spike_conv(torch.zeros(1, 2, 8, 8), torch.zeros(3, 4, 3, 3))


def test_the_fingerprint_sees_every_word():
    """Pairs too, in one column of the hash (128 words apart): changes of two signs must not undo each other."""
    x = torch.randn(200_000)
    before = product_op.Fingerprint([x, x[:7]])()
    changed = set()
    for places in (
        [0],
        [1],
        [131_071],
        [199_999],
        [1, 129],
        [1, 129, 257, 385],
        [2, 2 + 128 * 99],
        list(range(3000, 9000)),
    ):
        y = x.clone()
        y[places] *= -1
        changed.add(product_op.Fingerprint([y, y[:7]])())
    assert before not in changed
    assert len(changed) == 8
    assert product_op.Fingerprint([x.clone(), x[:7]])() == before
    assert product_op.Fingerprint([x[:7], x])() != before
