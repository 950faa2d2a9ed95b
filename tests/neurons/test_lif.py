"""The definition of the neuron against hand-made numbers, SpikingJelly's equations and itself step by step."""

import pytest
import timm
import torch

from spikingformer.native import status as native_status
from spikingformer.neurons import LIF, SURROGATES, LIFConfig, lif, lif_reference, lif_step, spike, use_backend
from spikingformer.neurons.surrogate import Surrogate

ALL = [
    LIFConfig(surrogate=s, v_reset=r, detach_reset=d, decay_input=i, tau=t)
    for s in SURROGATES
    for r, d, i, t in [
        (0.0, True, True, 2.0),
        (None, False, True, 1.5),
        (-0.3, False, False, 1.75),
        (0.2, True, False, 3),
    ]
]


def name(c: LIFConfig) -> str:
    return f"{c.surrogate}-reset{c.v_reset}-{'detached' if c.detach_reset else 'through'}-tau{c.tau}"


def test_by_hand():
    x = torch.tensor([1.9, 2.1, 1.0, 3.0, 2.0], dtype=torch.float64)[:, None]
    # h: .95 | .95+(2.1-.95)/2=1.525 fires | 0+.5 | .5+1.25=1.75 fires | 1.0 exactly at the threshold: fires
    s, v = lif_reference(x, LIFConfig())
    assert s.flatten().tolist() == [0, 1, 0, 1, 1]
    assert v.item() == 0
    s, v = lif_reference(x[:2], LIFConfig(v_reset=None))
    assert s.flatten().tolist() == [0, 1]
    assert v.item() == pytest.approx(0.525)


def test_fires_at_the_threshold_not_above_it():
    assert spike(torch.tensor([0.0, -1e-30, 1e-30]), "sigmoid", 4.0).tolist() == [1, 0, 1]


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_surrogates_are_even_bells_of_unit_area(surrogate):
    entry = SURROGATES[surrogate]
    u = torch.linspace(-60, 60, 1_200_001, dtype=torch.float64)
    d = entry.derivative(u, entry.alpha)
    torch.testing.assert_close(d, d.flip(0), rtol=1e-9, atol=1e-12)
    assert d.argmax() == 600_000 or d[600_000] == d.max()
    area = torch.trapezoid(d, u).item()
    # fast sigmoid is published without normalisation: its area is 2 / alpha; atan has heavy tails beyond 60
    want = 2 / entry.alpha if surrogate == "fast_sigmoid" else 1.0
    assert area == pytest.approx(want, rel=7e-3)


@pytest.mark.parametrize("config", ALL, ids=name)
def test_steps_and_cuts_equal_one_run(config):
    torch.manual_seed(0)
    x = torch.randn(7, 3, 5, dtype=torch.float64) * 2
    whole, v_whole = lif_reference(x, config)
    head, v = lif_reference(x[:4], config)
    tail, v = lif_reference(x[4:], config, v)
    assert torch.equal(torch.cat([head, tail]), whole)
    assert torch.equal(v, v_whole)
    v = torch.full_like(x[0], config.v_rest)
    for t in range(7):
        s, v = lif_step(x[t], v, config)
        assert torch.equal(s, whole[t])
    assert 0 < whole.mean() < 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_state_is_at_least_float32(dtype):
    x = (torch.randn(6, 1000, generator=torch.Generator().manual_seed(1)) * 2).to(dtype)
    with use_backend("reference"):
        state: dict = {}
        module = LIF()
        s = module(x, state)
    assert s.dtype == dtype
    assert state[module].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    want, _ = lif_reference(x.float(), LIFConfig())
    assert torch.equal(s.float(), want), "half precision rounds the input, never the membrane"


def test_gradient_by_hand():
    x = torch.tensor([[0.5], [0.8]], dtype=torch.float64, requires_grad=True)
    config = LIFConfig()
    s, _ = lif_reference(x, config)
    s[1].sum().backward()
    # h1 = .25, h2 = .25 / 2 + .4 = .525; no spike, so d h2 / d x1 = .5 * .5
    sg = torch.sigmoid(torch.tensor(4 * (0.525 - 1.0), dtype=torch.float64))
    g = (4 * sg * (1 - sg)).item()
    assert x.grad.flatten().tolist() == pytest.approx([0.25 * g, 0.5 * g])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tau": 0.5}, "tau must be a finite number of time steps >= 1, got 0.5"),
        ({"v_reset": 1.0}, "v_reset must lie below v_threshold 1.0, got 1.0"),
        ({"surrogate": "sigmoids"}, "unknown surrogate 'sigmoids': use one of sigmoid, atan"),
        ({"alpha": 0.0}, "alpha must be > 0"),
    ],
    ids=lambda v: str(v)[:20],
)
def test_impossible_neurons(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LIFConfig(**kwargs)


def test_a_backend_asked_for_by_name_never_falls_back():
    with pytest.raises(ValueError, match="unknown backend 'cuda': use one of auto, reference"), use_backend("cuda"):
        pass
    if not torch.cuda.is_available():
        with use_backend("triton"), pytest.raises(ValueError, match=r"backend 'triton' cannot be used: .*cpu"):
            LIF()(torch.zeros(2, 3))


def test_a_surrogate_of_ones_own_is_computed_by_the_plain_neuron(monkeypatch):
    flat = Surrogate(None, 1.0, lambda u, alpha: torch.full_like(u, 0.25), "a test")
    x = torch.randn(4, 2, 8, requires_grad=True)
    for name in ("mine", "sigmoid"):  # a new name, and one that the kernels know for another function
        monkeypatch.setitem(SURROGATES, name, flat)
        grads = {}
        for backend in ("reference", "auto"):
            with use_backend(backend):
                spikes, _ = lif(x, LIFConfig(tau=1.7, surrogate=name))
            (grads[backend],) = torch.autograd.grad(spikes.sum(), x)
        assert torch.equal(grads["auto"], grads["reference"])
    if native_status().available:
        with use_backend("native"), pytest.raises(ValueError, match="no form of the surrogate 'mine'; ask for 'auto'"):
            lif(x, LIFConfig(surrogate="mine"))


def test_a_model_with_a_surrogate_of_ones_own_evaluates_as_ever(monkeypatch):
    monkeypatch.setitem(SURROGATES, "mine", Surrogate(None, 1.0, lambda u, alpha: torch.full_like(u, 0.25), "a test"))
    size = {"embed_dim": 32, "depth": 1, "num_heads": 4, "img_size": 16}
    for family in ("spikingformer_cml_4_384", "spikformer_4_384"):
        models = []
        for surrogate in ("mine", "sigmoid"):
            torch.manual_seed(0)
            models.append(timm.create_model(family, surrogate=surrogate, **size).eval())
        x = torch.randn(2, 3, 16, 16)
        with torch.no_grad():
            assert torch.equal(models[0](x), models[1](x))
        models[0](x).sum().backward()
        assert models[0].stem.stages[0].conv.weight.grad is not None


def test_a_number_in_a_tensor_is_a_number():
    assert LIFConfig(tau=torch.tensor(1.5)) == LIFConfig(tau=1.5)


@pytest.mark.parametrize("name", ["tau", "v_threshold", "alpha"])
def test_what_would_not_be_learnt_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be a number, got Parameter: .* is not learnt"):
        LIFConfig(**{name: torch.nn.Parameter(torch.tensor(2.0))})
