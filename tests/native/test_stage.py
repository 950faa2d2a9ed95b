"""The fused stage (BatchNorm, residual, pool, LIF) against the same composed of torch's own ops."""

from inspect import signature

import pytest
import torch
import torch.nn.functional as F

from spikingformer import native
from spikingformer.native.ops import batch_norm, bn_pool_lif, bn_statistics
from spikingformer.neurons.config import LIFConfig
from spikingformer.neurons.reference import lif_reference

pytestmark = [
    pytest.mark.skipif(not native.status().available, reason=native.status().reason),
    pytest.mark.usefixtures("poisoned_empty"),
]
TOLERANCE = {torch.float64: {"rtol": 1e-9, "atol": 1e-11}, torch.float32: {"rtol": 1e-3, "atol": 1e-4}}


def plain_batch_norm(y, weight, bias, training, repeats, running):
    # Written out: torch 2.15's own batch_norm has wrong gradients on the CPU for one image where y and the incoming
    # gradient differ in memory layout (channels last, contiguous).
    dims, n = (0, 1, 3, 4), y.numel() // y.shape[2] * repeats
    mean, var = running
    if training:
        batch_mean, batch_var = y.mean(dims), y.var(dims, unbiased=False)
        mean.lerp_(batch_mean.detach(), 0.1)
        var.lerp_(batch_var.detach() * n / (n - 1), 0.1)
        mean, var = batch_mean, batch_var
    mean, var, weight, bias = (v[:, None, None] for v in (mean, var, weight, bias))
    return (y - mean) * (var + 1e-5).rsqrt() * weight + bias


def plain_stage(y, weight, bias, config, pool, residual, training, repeats, running):
    z = plain_batch_norm(y, weight, bias, training, repeats, running)
    if residual is not None:
        z = z + residual
    current = z
    if pool == "cml":
        z = F.max_pool2d(z.flatten(0, 1), 3, 2, 1).unflatten(0, y.shape[:2])
    s = lif_reference(z.expand(repeats * z.shape[0], *z.shape[1:]), config)[0]
    if pool == "sps":
        s = F.max_pool2d(s.flatten(0, 1), 3, 2, 1).unflatten(0, s.shape[:2])
    return s, current


def fused_stage(y, weight, bias, config, pool, residual, training, repeats, running, want_current):
    mean, var = running
    if training:
        mean, rstd = bn_statistics(y, mean, var, 0.1, 1e-5, repeats)
    else:
        rstd = (var + 1e-5).rsqrt()
    return bn_pool_lif(
        y, mean, rstd, weight, bias, config, pool=pool, residual=residual, batch_statistics=training,
        want_current=want_current, repeats=repeats,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(
    ("pool", "with_residual", "repeats"),
    [(None, False, 1), (None, True, 1), (None, False, 3), ("cml", False, 1), ("cml", False, 4), ("sps", False, 1),
     ("sps", False, 2)],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(3, 2, 20, 7, 6), (1, 1, 5, 1, 4), (2, 1, 64, 4, 5)], ids=str)
def test_equals_the_composition_with_all_gradients(isa, dtype, training, pool, with_residual, repeats, shape):
    torch.manual_seed(0)
    if repeats > 1:
        shape = (1, *shape[1:])
    c = shape[2]
    y = (torch.randn(shape, dtype=dtype) * 1.5 + 3).permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    weight, bias = torch.randn(c, dtype=dtype) * 1.5, torch.rand(c, dtype=dtype)
    residual = torch.randn(shape, dtype=dtype) if with_residual else None
    config = LIFConfig(tau=1.75)

    def run(function, *extra):
        running = [torch.full((c,), 2.5, dtype=dtype), torch.full((c,), 1.5, dtype=dtype)]
        leaves = [t.detach().clone().requires_grad_() for t in (y, weight, bias, residual) if t is not None]
        r = leaves[3] if with_residual else None
        s, current = function(*leaves[:3], config, pool, r, training, repeats, running, *extra)
        torch.manual_seed(1)
        grads = [torch.randn(s.shape, dtype=dtype)]
        outputs = [s]
        if with_residual:
            outputs.append(current)
            grads.append(torch.randn(current.shape, dtype=dtype))
        torch.autograd.backward(outputs, grads)
        return [o.detach() for o in outputs], [t.grad for t in leaves], running

    expected, expected_grads, expected_running = run(plain_stage)
    got, got_grads, running = run(fused_stage, with_residual)
    assert torch.equal(got[0], expected[0])
    assert got[0].sum() > 0
    for g, e in zip(got[1:] + got_grads, expected[1:] + expected_grads, strict=True):
        torch.testing.assert_close(g, e, **TOLERANCE[dtype])
    torch.testing.assert_close(running[0], expected_running[0])
    torch.testing.assert_close(running[1], expected_running[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("shape", [(3, 2, 20, 7, 6), (1, 1, 5, 1, 4), (2, 5, 67, 4, 5), (2, 0, 3, 4, 4)], ids=str)
def test_batch_norm_alone_with_all_gradients(isa, dtype, training, shape):
    torch.manual_seed(0)
    c = shape[2]
    running = [torch.full((c,), 2.5, dtype=dtype), torch.full((c,), 1.5, dtype=dtype)]
    y, grad = torch.randn(shape, dtype=dtype) * 1.5 + 3, torch.randn(shape, dtype=dtype)

    def fused(y, weight, bias):
        if training and y.numel():
            mean, rstd = bn_statistics(y)
        else:
            mean, rstd = running[0], (running[1] + 1e-5).rsqrt()
        return batch_norm(y, mean, rstd, weight, bias, training)

    def run(function):
        affine = torch.linspace(-1, 1, c, dtype=dtype), torch.linspace(0, 1, c, dtype=dtype)
        leaves = [t.clone().requires_grad_() for t in (y, *affine)]
        out = function(*leaves)
        out.backward(grad)
        return [out.detach(), *(t.grad for t in leaves)]

    got = run(fused)
    assert got[0].shape == y.shape
    if y.numel():
        expected = run(lambda *t: plain_batch_norm(*t, training, 1, [r.clone() for r in running]))
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e, **TOLERANCE[dtype])


def test_a_scale_of_zero_ties_the_whole_window(isa):
    torch.manual_seed(0)
    y = torch.randn(2, 2, 3, 6, 5, dtype=torch.float64)
    running = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    grads = []
    for run in (plain_stage, lambda *a: fused_stage(*a, False)):
        weight = torch.tensor([0.0, -1.0, 0.0], dtype=torch.float64, requires_grad=True)
        bias = torch.tensor([1.5, 1.0, 2.5], dtype=torch.float64, requires_grad=True)
        s, _ = run(y, weight, bias, LIFConfig(), "cml", None, True, 1, [r.clone() for r in running])
        s.backward(torch.arange(s.numel(), dtype=torch.float64).reshape(s.shape))
        grads.append((weight.grad, bias.grad))
    torch.testing.assert_close(grads[1], grads[0])


def test_ties_in_the_pool_go_to_the_first(isa):
    y = torch.zeros(1, 1, 3, 5, 6, dtype=torch.float64)
    y[..., 2:4, 1:5] = 1.0
    leaves = [y.clone().requires_grad_() for _ in range(2)]
    weight, bias = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    running = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for pool in ("cml", "sps"):
        grads = []
        for leaf, run in zip(leaves, (plain_stage, lambda *a: fused_stage(*a, False)), strict=True):
            leaf.grad = None
            s, _ = run(leaf, weight, bias, LIFConfig(), pool, None, False, 1, running)
            s.backward(torch.arange(s.numel(), dtype=torch.float64).reshape(s.shape))
            grads.append(leaf.grad)
        torch.testing.assert_close(grads[1], grads[0])


def test_spike_residual_is_added_to_the_spikes():
    torch.manual_seed(0)
    y, extra = torch.randn(2, 1, 4, 3, 3), torch.ones(2, 1, 4, 3, 3, requires_grad=True)
    one = torch.ones(4)
    plain, _ = bn_pool_lif(y, one * 0, one, one, one, LIFConfig())
    added, _ = bn_pool_lif(y, one * 0, one, one, one, LIFConfig(), spike_residual=extra)
    assert torch.equal(added.detach(), plain + 1)
    added.sum().backward()
    assert torch.equal(extra.grad, torch.ones_like(extra))


def test_statistics_survive_a_large_mean():
    torch.manual_seed(0)
    y = torch.randn(4, 2, 7, 9, 9) * 0.01 + 1000
    mean, rstd = bn_statistics(y, eps=0.0)
    exact = y.double().permute(0, 1, 3, 4, 2).reshape(-1, 7)
    torch.testing.assert_close(mean, exact.mean(0).float())
    torch.testing.assert_close(rstd, exact.var(0, unbiased=False).rsqrt().float(), rtol=1e-3, atol=0)


def test_empty_batch():
    one = torch.ones(4)
    s, _ = bn_pool_lif(torch.zeros(2, 0, 4, 6, 6), one, one, one, one, LIFConfig(), pool="cml")
    assert s.shape == (2, 0, 4, 3, 3)


def test_options_have_names_that_both_forms_share():
    """Their orders differ (the Triton form has a scale), so that a position could mean another option."""
    one = torch.ones(4)
    with pytest.raises(TypeError, match="positional"):
        bn_pool_lif(torch.zeros(2, 1, 4, 3, 3), one, one, one, one, LIFConfig(), "cml")
    pytest.importorskip("triton")
    from spikingformer.neurons.triton.ops import bn_pool_lif as on_gpu

    native_options, gpu_options = (
        {p.name: p.default for p in signature(f).parameters.values() if p.kind is p.KEYWORD_ONLY}
        for f in (bn_pool_lif, on_gpu)
    )
    assert gpu_options == native_options | {"scale": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool": "max"}, "pool must be one of"),
        ({"pool": "cml", "want_current": True}, "run them apart"),
        ({"repeats": 2}, "needs y with T = 1"),
        ({"residual": torch.zeros(1)}, "must have y's shape"),
        ({"y": torch.zeros(2, 1, 4, 3, 3, dtype=torch.float16)}, "float32 or float64"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_refusals(change, message):
    one = torch.ones(4)
    arguments = {"y": torch.zeros(2, 1, 4, 3, 3), "mean": one, "rstd": one, "weight": one, "bias": one}
    with pytest.raises(ValueError, match=message):
        bn_pool_lif(**{**arguments, "config": LIFConfig(), **change})
