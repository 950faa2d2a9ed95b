"""The fused attention with its neuron against the plain composition: spikes and the gradients of q, k and v."""

import pytest
import torch

from spikingformer.layers import from_heads, spike_attention, to_heads
from spikingformer.native import available_isas, ops
from spikingformer.native.library import use_isa
from spikingformer.neurons import LIFConfig, lif_reference

pytestmark = pytest.mark.skipif(not available_isas(), reason="no compiled kernels")

SHAPES = {  # T, B, C, H, W, heads
    "cifar": (4, 2, 384, 8, 8, 12),
    "dvs": (16, 1, 256, 8, 8, 16),
    "imagenet-wide": (2, 1, 768, 7, 7, 8),
    "odd": (3, 2, 54, 5, 3, 3),
    "head-over-a-word": (2, 1, 140, 3, 3, 2),
    "one-of-everything": (1, 1, 1, 1, 1, 1),
}


def plain(q, k, v, heads, scale, config):
    y = spike_attention(*(to_heads(x, heads) for x in (q, k, v)), scale, "qk")
    return lif_reference(from_heads(y, q.shape[3:]), config)[0]


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("config", [LIFConfig(v_threshold=0.5), LIFConfig(tau=1.75, v_reset=None, surrogate="atan")])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_plain_composition(shape, config, dtype, isa):
    *size, heads = shape
    generator = torch.Generator().manual_seed(1)
    rate = min(0.3, (8 * heads / (size[2] * size[3] * size[4])) ** (1 / 3))  # counts about the threshold
    inputs = [
        (torch.rand(size, generator=generator) < rate).to(dtype).contiguous(memory_format=torch.channels_last_3d)
        for _ in range(3)
    ]
    inputs = [x.requires_grad_() for x in inputs]
    want = plain(*inputs, heads, 0.125, config)
    upstream = torch.randn(want.shape, generator=generator, dtype=dtype)
    wanted = torch.autograd.grad(want, inputs, upstream)
    with use_isa(isa):
        got = ops.attention_lif(*inputs, heads, 0.125, config)
        gradients = torch.autograd.grad(got, inputs, upstream)
    assert torch.equal(got, want)
    assert 0 < want.mean() < 1 or want.numel() == 1
    for a, b in zip(gradients, wanted, strict=True):
        # sums of a few hundred terms in another order
        torch.testing.assert_close(
            a, b, rtol=0, atol=(1e-12 if dtype == torch.float64 else 1e-5) * b.abs().max().item()
        )


def test_an_input_that_is_no_spike_is_left_to_the_plain_form():
    q = torch.ones(2, 1, 8, 2, 2)
    assert ops.attention_lif(q, q * 0.5, q, 2, 0.125, LIFConfig()) is None
    tiny = torch.ones(2, 1, 8, 2, 2, dtype=torch.float64)
    assert ops.attention_lif(tiny, tiny * (1 + 1e-12), tiny, 2, 0.125, LIFConfig()) is None


def test_bad_shapes_are_named():
    q = torch.ones(2, 1, 8, 2, 2)
    with pytest.raises(ValueError, match=r"C a multiple of 3 heads; got \(2, 1, 8, 2, 2\)"):
        ops.attention_lif(q, q, q, 3, 0.125, LIFConfig())
