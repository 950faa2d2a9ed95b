"""BatchNorm + residual + pool + LIF kernels against torch's batch_norm, max_pool2d and the plain neuron.

Spikes are compared where h lies further than 1e-4 from the threshold: sums in another order move a float32 current by
about 1e-6, which can flip a spike that sits closer (none does on these seeds with float64 truth; on a GPU one may).
Gradients: 2e-5 of the gradient's norm, some tens of float32 roundings.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

from spikingformer.neurons import LIFConfig, lif_reference
from spikingformer.neurons.triton import launch
from spikingformer.neurons.triton.ops import bn_pool_lif, bn_statistics

# torch's own op checker reads .grad of tensors that are no leaves, and warns of itself.
OPCHECK_READS_GRAD = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
TOLERANCE = 2e-5


def pool_2d(x):
    return F.max_pool2d(x.flatten(0, 1), 3, 2, 1).unflatten(0, x.shape[:2])


def truth(y, weight, bias, running, config, pool, residual, spike_residual, scale, training, repeats):
    """In float64 on the CPU, a repeated picture really repeated; moves the running statistics."""
    y = y.expand(repeats * y.shape[0], *y.shape[1:])
    z = F.batch_norm(y.flatten(0, 1), *running, weight, bias, training, 0.1, 1e-5).unflatten(0, y.shape[:2])
    if scale is not None:
        z = z * scale.view(-1, 1, 1, 1)
    if residual is not None:
        z = z + residual
    current = z
    s, _ = lif_reference(pool_2d(z) if pool == "cml" else z, config)
    s = pool_2d(s) if pool == "sps" else s
    return s if spike_residual is None else s + spike_residual, current


def relative(a, b):
    return ((a.double().cpu() - b.double().cpu()).norm() / b.double().norm().clamp_min(1e-12)).item()


def check(
    device, shape, pool=None, residual=False, training=True, repeats=1, dtype=torch.float32, tolerance=TOLERANCE,
    config=LIFConfig(alpha=2.0), seed=0, scale=None,  # noqa: B008  (frozen)
):  # fmt: skip
    torch.manual_seed(seed)
    channels = shape[2]

    def draw(*size, scale=1.0, shift=0.0):
        return (torch.randn(size) * scale + shift).to(dtype).double()

    y = draw(*shape, scale=2.0, shift=0.7).requires_grad_()
    weight = torch.randn(channels, dtype=torch.float64).float().double().requires_grad_()  # negative ones too
    bias = torch.randn(channels, dtype=torch.float64).float().double().requires_grad_()
    extra = [draw(*shape).requires_grad_() for _ in range(2)] if residual else [None, None]
    running = [torch.randn(channels).double() * 0.1, torch.rand(channels).double() + 1]
    running32 = [r.float().to(device) for r in running]
    leaves = [y, weight, bias, *(e for e in extra if e is not None)]
    s, current = truth(y, weight, bias, running, config, pool, *extra, scale, training, repeats)
    assert 0.02 < s.detach().mean() < 0.98 or residual
    grad_s = draw(*s.shape)
    grads = [grad_s]
    if residual:
        grads.append(draw(*shape))
    expected = torch.autograd.grad([s, current] if residual else [s], leaves, grads)

    def cast(t, to=dtype):
        return None if t is None else t.detach().to(device, to).requires_grad_(t.requires_grad)

    y32, weight32, bias32 = cast(y), cast(weight, torch.float32), cast(bias, torch.float32)
    extra32 = [cast(e) for e in extra]
    if training:
        mean, rstd = bn_statistics(y32, *running32, 0.1, 1e-5, repeats)
    else:
        mean, rstd = running32[0], (running32[1] + 1e-5).rsqrt()
    s32, current32 = bn_pool_lif(
        y32,
        mean,
        rstd,
        weight32,
        bias32,
        config,
        pool=pool,
        residual=extra32[0],
        spike_residual=extra32[1],
        scale=cast(scale, torch.float32),
        batch_statistics=training,
        want_current=residual,
        repeats=repeats,
    )
    assert (current32 is not None) == residual
    assert s32.shape == s.shape
    if dtype == torch.float32:
        wrong = (s32.double().cpu() - s).abs() > 1e-3
        assert wrong.sum() <= 1e-4 * wrong.numel(), f"{int(wrong.sum())} spikes of {wrong.numel()} differ"
        assert torch.allclose(running32[0].cpu().double(), running[0], atol=1e-6)
        assert torch.allclose(running32[1].cpu().double(), running[1], rtol=1e-5)
    if residual:
        assert relative(current32, current) < tolerance
    leaves32 = [y32, weight32, bias32, *(e for e in extra32 if e is not None)]
    actual = torch.autograd.grad([s32, current32] if residual else [s32], leaves32, [cast(g) for g in grads])
    for name, a, b in zip(("y", "weight", "bias", "residual", "spike_residual"), actual, expected, strict=False):
        assert a.shape == b.shape, name
        assert relative(a, b) < tolerance, f"gradient of {name}: error {relative(a, b):.2e}"


KINDS = [
    (pool, residual, training, repeats)
    for pool, residual, training, repeats in itertools.product(
        (None, "cml", "sps"), (False, True), (True, False), (1, 3)
    )
    if not (residual and (pool or repeats > 1))
]


def kind_id(kind):
    pool, residual, training, repeats = kind
    words = (pool or "no-pool", "residual" if residual else "", "batch" if training else "running")
    return "-".join(w for w in (*words, f"repeated{repeats}" if repeats > 1 else "") if w)


@pytest.mark.parametrize("kind", KINDS, ids=kind_id)
def test_every_stage(device, kind):
    pool, residual, training, repeats = kind
    check(device, (1 if repeats > 1 else 3, 2, 12, 5, 7), pool, residual, training, repeats)


@pytest.mark.parametrize("pool", [None, "cml", "sps"])
@pytest.mark.parametrize("shape", [(4, 1, 1, 6, 6), (2, 3, 48, 1, 5), (1, 2, 130, 4, 1), (16, 1, 5, 3, 2)], ids=str)
def test_odd_sizes(device, pool, shape):
    check(device, shape, pool)


@pytest.mark.parametrize("kind", [k for k in KINDS if k[2]], ids=kind_id)
def test_several_chunks_and_tiles(device, kind, monkeypatch):
    """Few programs that loop over many small tiles: the sums then cross tiles and chunks, the last ones ragged."""
    monkeypatch.setattr(launch, "SUMMING_PROGRAMS", 3)
    monkeypatch.setattr(launch, "elements_per_thread", lambda steps, itemsize: 1)
    pool, residual, _, repeats = kind
    check(device, (1 if repeats > 1 else 2, 2, 33, 3, 4), pool, residual, True, repeats)


@pytest.mark.parametrize(
    "config",
    [
        LIFConfig(tau=1.75, v_reset=None, surrogate="atan", detach_reset=False),
        LIFConfig(tau=1.5, v_reset=-0.3, surrogate="gaussian", decay_input=False, v_threshold=0.6),
    ],
    ids=["soft-atan", "hard-gaussian"],
)
@pytest.mark.parametrize("pool", [None, "cml", "sps"])
def test_other_neurons(device, pool, config):
    check(device, (3, 2, 6, 4, 4), pool, config=config)


@pytest.mark.parametrize("pool", [None, "cml", "sps"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half(device, dtype, pool):
    """Gradients are stored once in half precision (eps / 2 each), dL/dz of a pool twice: 2 eps of the norm."""
    check(device, (3, 2, 8, 4, 6), pool, dtype=dtype, tolerance=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("training", [True, False], ids=["batch", "running"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
def test_scaled_samples(device, residual, training):
    scale = torch.tensor([1.25, 0.0, 0.5], dtype=torch.float64)
    check(device, (3, 3, 12, 5, 7), None, residual, training, scale=scale)


def test_scaled_samples_over_several_chunks(device, monkeypatch):
    monkeypatch.setattr(launch, "SUMMING_PROGRAMS", 3)
    monkeypatch.setattr(launch, "elements_per_thread", lambda steps, itemsize: 1)
    for residual in (True, False):
        check(device, (2, 3, 33, 3, 4), None, residual, scale=torch.tensor([0.0, 2.0, 1.0], dtype=torch.float64))


def test_half_residual(device):
    check(device, (3, 2, 8, 4, 6), None, True, dtype=torch.bfloat16, tolerance=2 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("pool", ["cml", "sps"])
def test_ties_go_to_the_first_in_reading_order(device, pool):
    """Integers tie all over; torch's own rule decides where the gradient goes, and ours must be the same."""
    torch.manual_seed(5)
    y = torch.randint(-1, 3, (2, 2, 4, 6, 7)).float().to(device).requires_grad_()
    zeros, ones = torch.zeros(4, device=device), torch.ones(4, device=device)
    config = LIFConfig()
    s, _ = bn_pool_lif(y, zeros, ones, ones, zeros, config, pool=pool)
    other = y.detach().cpu().requires_grad_()
    z = pool_2d(other) if pool == "cml" else other
    expected, _ = lif_reference(z, config)
    expected = pool_2d(expected) if pool == "sps" else expected
    assert torch.equal(s.cpu(), expected)
    grad = torch.randn_like(expected)
    s.backward(grad.to(device))
    expected.backward(grad)
    torch.testing.assert_close(y.grad.cpu(), other.grad, rtol=1e-5, atol=1e-7)


def test_statistics_far_from_zero(device):
    """Mean 1000, deviation 1: a sum of squares in float32 would keep no correct digit of the variance."""
    torch.manual_seed(6)
    y = torch.randn(2, 3, 5, 8, 9, device=device) + 1000
    mean, rstd = bn_statistics(y)
    exact = y.double().transpose(0, 2).flatten(1)
    assert torch.allclose(mean.double(), exact.mean(1), rtol=2e-7)
    assert torch.allclose(rstd.double(), (exact.var(1, unbiased=False) + 1e-5).rsqrt(), rtol=1e-4)


def test_sums_are_the_same_every_time(device):
    y = torch.randn(2, 3, 5, 8, 9, device=device)
    assert all(torch.equal(a, b) for a, b in zip(bn_statistics(y), bn_statistics(y), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool": "avg"}, "pool must be one of"),
        ({"pool": "cml", "want_current": True}, "run them apart"),
        ({"repeats": 2}, "repeats needs y with T = 1, got T = 3"),
        ({"residual": torch.zeros(1)}, "residual must have y's shape"),
        ({"scale": torch.zeros(2)}, r"scale must be float32 of shape \(1,\)"),
    ],
    ids=["pool", "current-and-pool", "repeats", "residual", "scale"],
)
def test_refused(device, change, message):
    y, c = torch.randn(3, 1, 2, 4, 4, device=device), torch.ones(2, device=device)
    with pytest.raises(ValueError, match=message):
        bn_pool_lif(y, c, c, c, c, LIFConfig(), **change)


def test_single_value_has_no_variance(device):
    with pytest.raises(ValueError, match="more than one value per channel"):
        bn_statistics(torch.zeros(1, 1, 3, 1, 1, device=device))


@OPCHECK_READS_GRAD
def test_registered_as_ops(device):
    y = torch.randn(2, 1, 3, 4, 4, device=device, requires_grad=True)
    c = torch.rand(3, device=device)
    neuron = (2.0, 1.0, 0.0, "sigmoid", 4.0, True, True)
    w = c.clone().requires_grad_()
    for pool in ("none", "cml", "sps"):
        torch.library.opcheck(
            torch.ops.spikingformer.triton_bn_pool_lif.default,
            (y, c, c, w, w, None, None, None, True, False, pool, 1, *neuron),
        )
    torch.library.opcheck(
        torch.ops.spikingformer.triton_bn_pool_lif.default,
        (y, c, c, w, w, torch.randn_like(y).requires_grad_(), None, c.new_ones(1), True, True, "none", 1, *neuron),
    )
    torch.library.opcheck(
        torch.ops.spikingformer.triton_bn_statistics.default, (y.detach(), c.clone(), c.clone(), 0.1, 1e-5, 1)
    )
