"""The stem's convolution against the dense one in float64: output, all gradients, odd sizes, every instruction set."""

import pytest
import torch
import torch.nn.functional as F

from spikingformer import native
from spikingformer.native.ops import stem_conv

pytestmark = [
    pytest.mark.skipif(not native.status().available, reason=native.status().reason),
    pytest.mark.usefixtures("poisoned_empty"),
]


@pytest.mark.parametrize(
    ("n", "c", "o", "h", "w"),
    [(2, 2, 5, 5, 7), (1, 3, 40, 1, 2), (3, 1, 33, 9, 1), (2, 3, 48, 17, 20), (1, 4, 64, 8, 13), (1, 15, 1, 1, 1)],
)
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_equals_the_convolution_with_all_gradients(isa, n, c, o, h, w, with_bias):
    torch.manual_seed(0)
    x, weight = torch.randn(n, c, h, w), torch.randn(o, c, 3, 3)
    bias = torch.randn(o) if with_bias else None
    grad = torch.randn(n, o, h, w)

    def run(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias) if t is not None]
        leaves = [t.detach().clone().requires_grad_() for t in leaves]
        out = function(*leaves)
        out.backward(grad.to(dtype))
        return [out.detach(), *(t.grad for t in leaves)]

    got = run(stem_conv, torch.float32)
    expected = run(lambda *a: F.conv2d(*a, padding=1), torch.float64)
    for g, e in zip(got, expected, strict=True):
        # float32 sums of at most 680 products of size 1
        torch.testing.assert_close(g.double(), e, rtol=1e-5, atol=1e-4)
    assert got[0].is_contiguous(memory_format=torch.channels_last)


def test_the_output_of_a_picture_does_not_depend_on_its_batch(isa):
    x, weight = torch.randn(3, 3, 9, 10), torch.randn(20, 3, 3, 3)
    assert torch.equal(stem_conv(x, weight)[1:2], stem_conv(x[1:2], weight))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_and_the_empty_batch_take_torchs_own(isa, dtype):
    x, weight = torch.randn(2, 3, 4, 4, dtype=dtype), torch.randn(5, 3, 3, 3, dtype=dtype)
    torch.testing.assert_close(stem_conv(x, weight), F.conv2d(x, weight, padding=1))
    assert stem_conv(x[:0].float(), weight.float()).shape == (0, 5, 4, 4)


def test_a_bias_that_is_not_contiguous(isa):
    x, weight, bias = torch.randn(1, 3, 8, 8), torch.randn(48, 3, 3, 3), torch.randn(96)[::2]
    torch.testing.assert_close(stem_conv(x, weight, bias), F.conv2d(x, weight, bias, padding=1), rtol=1e-5, atol=1e-4)


def test_refusals():
    with pytest.raises(ValueError, match=r"stem_conv takes a bias \(5,\) with this weight, got \(4,\)"):
        stem_conv(torch.zeros(1, 3, 4, 4), torch.zeros(5, 3, 3, 3), torch.zeros(4))
    with pytest.raises(ValueError, match=r"stem_conv takes x \(N, C, H, W\) and a weight \(O, C, 3, 3\), got"):
        stem_conv(torch.zeros(1, 3, 4, 4), torch.zeros(5, 3, 1, 1))
