"""Layers against what they stand for: repeated pictures, the two pools' gradients, attention in both orders."""

import copy

import pytest
import timm
import torch
from timm.utils import freeze
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from spikingformer.layers import (
    ConvBN,
    ConvBNLIF,
    DropPath,
    folded_convolution,
    from_heads,
    fused,
    max_pool,
    spike_attention,
    to_heads,
)
from spikingformer.neurons.backend import unavailable, use_backend

D = torch.float64


@pytest.mark.parametrize("pool", [None, "cml", "sps"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_picture_that_stands_for_t_copies(pool, training):
    torch.manual_seed(0)
    once = ConvBNLIF(3, 8, 3, pool=pool).to(D).train(training)
    copies = ConvBNLIF(3, 8, 3, pool=pool).to(D).train(training)
    copies.load_state_dict(once.state_dict())
    x = torch.randn(1, 2, 3, 9, 7, dtype=D)
    a = x.clone().requires_grad_()
    b = x.clone().requires_grad_()
    out = once(a, repeats=4)
    want = copies(b.expand(4, -1, -1, -1, -1))
    assert torch.equal(out, want)
    assert 0 < want.mean() < 1
    weight = torch.randn_like(want)
    (out * weight).sum().backward()
    (want * weight).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)
    for p, q in zip(once.parameters(), copies.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    for (key, p), q in zip(once.named_buffers(), copies.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14, msg=key)


def test_cml_gradient_goes_to_the_largest_current_and_sps_to_the_first_spike():
    currents = torch.tensor([[2.0, 3.0], [2.5, 9.0]], dtype=D)[None, None, None]  # all fire; 9.0 is the maximum
    unit = ConvBNLIF(1, 1).to(D)

    def routed(order: str) -> torch.Tensor:
        x = currents.clone().requires_grad_()
        s = unit.lif(max_pool(x)) if order == "cml" else max_pool(unit.lif(x))
        s.sum().backward()
        return x.grad.flatten().nonzero().flatten()

    assert routed("cml").tolist() == [3]
    assert routed("sps").tolist() == [0]


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_attention_orders_agree_exactly_on_spikes(heads):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.rand(3, 2, 16, 5, 4, generator=generator, dtype=D).gt(0.6).to(D) for _ in range(3))
    heads_of = [to_heads(x, heads) for x in (q, k, v)]
    assert heads_of[0].shape == (3, 2, heads, 20, 16 // heads)
    a, b = (spike_attention(*heads_of, 0.125, order) for order in ("qk", "kv"))
    assert torch.equal(a, b)
    want = torch.zeros(20, 16 // heads, dtype=D)
    one_q, one_k, one_v = (h[1, 1, 0] for h in heads_of)
    for n in range(20):
        for m in range(20):
            want[n] += (one_q[n] * one_k[m]).sum() * one_v[m] * 0.125
    assert torch.equal(a[1, 1, 0], want)
    assert a.max() > 0


def test_heads_round_trip():
    x = torch.randn(2, 3, 12, 4, 5)
    assert torch.equal(from_heads(to_heads(x, 3), (4, 5)), x)
    assert torch.equal(to_heads(x, 3)[1, 2, 0, 7], x[1, 2, :4, 1, 2]), "tokens run row by row, heads take neighbours"


def test_product_over_time_is_the_product_of_each_step():
    layer = ConvBN(4, 6, 3).to(D).eval()
    x = torch.randn(3, 2, 4, 5, 5, dtype=D)
    torch.testing.assert_close(layer(x)[1], layer(x[1:2])[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_a_folded_convolution_is_the_convolution_and_its_norm(affine, bias):
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(3, 5, 3, padding=1, bias=bias).to(D), nn.BatchNorm2d(5, eps=0.1, affine=affine).to(D).eval()
    for t in (bn.running_mean, bn.running_var, *bn.parameters()):
        t.data.uniform_(0.5, 2)
    x = torch.randn(2, 3, 4, 6, dtype=D)
    weight, folded_bias = folded_convolution(conv, bn)
    assert not weight.requires_grad
    assert not folded_bias.requires_grad
    got = nn.functional.conv2d(x, weight, folded_bias, padding=1)
    torch.testing.assert_close(got, bn(conv(x)), rtol=1e-12, atol=1e-12)


def test_folding_without_a_norm_or_without_statistics():
    conv = nn.Conv2d(3, 5, 1, bias=False)
    weight, bias = folded_convolution(conv, nn.Identity())
    assert torch.equal(weight, conv.weight.double())
    assert torch.equal(bias, torch.zeros(5, dtype=D))
    with pytest.raises(ValueError, match="keeps no running statistics, so it cannot be folded"):
        folded_convolution(conv, nn.BatchNorm2d(5, track_running_stats=False))


def test_cumulative_average_batch_norm_is_left_alone():
    layer = ConvBN(3, 4).to(D).train()
    layer.bn.momentum = None
    layer(torch.randn(1, 2, 3, 4, 4, dtype=D), repeats=4)
    assert layer.bn.num_batches_tracked == 1


def test_drop_path_keeps_the_mean():
    drop = DropPath(0.25).train()
    x = torch.ones(2, 4000, 1, dtype=D)
    torch.manual_seed(0)
    y = drop(x)
    assert torch.equal(y[0], y[1])
    assert set(y.unique().tolist()) == {0.0, 1 / 0.75}
    assert y.mean().item() == pytest.approx(1, abs=0.04)
    with pytest.raises(ValueError, match=r"drop_path_rate must lie in \[0, 1\), got 1"):
        DropPath(1.0)


def test_unknown_pool():
    with pytest.raises(ValueError, match="pool must be one of"):
        ConvBNLIF(3, 4, pool="avg")


def test_modules_are_plain_torch():
    """What export, pruning and energy counting rely on: a standard convolution and BatchNorm inside."""
    unit = ConvBNLIF(3, 4, 3)
    assert isinstance(unit.conv, nn.Conv2d)
    assert isinstance(unit.bn, nn.BatchNorm2d)


@pytest.fixture
def fused_calls(monkeypatch) -> list[str]:
    """One entry a call of the fused stage."""
    pytest.importorskip("spikingformer.native.ops")
    from spikingformer.layers import conv

    calls: list[str] = []
    monkeypatch.setattr(conv, "fire", lambda *args: calls.append("fused") or fused.fire(*args))
    return calls


@pytest.mark.skipif(unavailable("native") is not None, reason="no compiled kernels here")
@pytest.mark.parametrize("pool", [None, "cml", "sps"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_fused_stage_equals_the_modules(fused_calls, pool, training):
    torch.manual_seed(0)
    layer = ConvBNLIF(32, 24, 3, bias=True, pool=pool).to(D).train(training)
    layer.bn.weight.data.uniform_(1.0, 2.0)
    plain = copy.deepcopy(layer)
    a = (torch.rand(3, 2, 32, 6, 8, dtype=D) < 0.3).to(D).requires_grad_()
    b = a.detach().clone().requires_grad_()
    out = layer(a)
    with use_backend("reference"):
        want = plain(b)
        weight = torch.randn_like(want)
        (want * weight).sum().backward()
    (out * weight).sum().backward()
    assert fused_calls == ["fused"]
    assert torch.equal(out, want)
    assert 0 < want.mean() < 1
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-11)
    for (key, p), q in zip(layer.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-11, msg=key)
    for (key, p), q in zip(layer.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14, msg=key)


@pytest.mark.skipif(unavailable("native") is not None, reason="no compiled kernels here")
def test_the_fused_stage_steps_aside_where_modules_are_watched_or_changed(fused_calls):
    x = (torch.rand(2, 1, 32, 4, 4) < 0.3).float()
    layer = ConvBNLIF(32, 16)
    layer(x)
    assert fused_calls == ["fused"]
    seen = []
    for part in (layer.conv, layer.bn, layer.lif):
        handle = part.register_forward_hook(lambda m, *_: seen.append(type(m).__name__))
        layer(x)
        handle.remove()
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 32 * 32 * 16
    layer(x, {})  # an explicit state: the neuron must start from it
    torch.nn.utils.parametrizations.weight_norm(layer.conv)
    layer(x)
    layer.bn.momentum = None
    layer(x)
    assert seen == ["Conv2d", "BatchNorm2d", "LIF"]
    assert fused_calls == ["fused"]


def test_shapes_that_make_no_sense_are_refused():
    for layer in (ConvBN, ConvBNLIF):
        with pytest.raises(ValueError, match="kernel_size must be odd, so that pictures keep their size, got 2"):
            layer(3, 4, 2)
        with pytest.raises(ValueError, match=r"expected spikes \(T, B, C, H, W\), got shape \(1, 3, 8, 8\)"):
            layer(3, 4, 3)(torch.rand(1, 3, 8, 8))


def test_timms_frozen_batch_norm_trains_on_with_its_statistics():
    model = timm.create_model("spikingformer_cml_4_384", embed_dim=32, depth=1, num_heads=4, img_size=16)
    model.eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(x)
    freeze(model)
    model.train()
    torch.testing.assert_close(model(x).detach(), expected, rtol=0, atol=1e-4)
