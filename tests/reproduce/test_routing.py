"""Gradient routing on windows small enough to work out by hand, and on both model families."""

import math

import pytest
import timm
import torch

import spikingformer  # noqa: F401  (registers the models)
from spikingformer.neurons import LIF, LIFConfig, use_backend
from spikingformer.reproduce.routing import (
    cosine,
    measure_routing,
    order_gradients,
    pooling_stages,
    window_routing,
)

TAU1 = LIFConfig(tau=1.0)  # fires where the current reaches 1, whatever came before


def one_window(values: list[float]) -> torch.Tensor:
    """Currents of a 2x2 picture: the pool's one window covers all four."""
    return torch.tensor(values).view(1, 1, 1, 2, 2)


@pytest.mark.parametrize(
    ("values", "kind", "elsewhere"),
    [
        pytest.param([0.1, 0.2, 0.3, 0.4], "silent", 1, id="silent-the-first-position-has-it"),
        pytest.param([0.4, 0.3, 0.2, 0.1], "silent", 0, id="silent-the-first-is-the-largest"),
        pytest.param([0.4, 0.4, 0.4, 0.4], "silent", 0, id="silent-all-equal"),
        pytest.param([0.1, 0.2, 3.0, 0.9], "single", 0, id="one-spike-at-the-largest"),
        pytest.param([0.0, 0.0, 2.5, 3.0], "several", 1, id="two-spikes-the-first-is-smaller"),
        pytest.param([0.0, 3.0, 2.5, 0.0], "several", 0, id="two-spikes-the-first-is-larger"),
        pytest.param([0.0, 3.0, 0.0, 3.0], "several", 0, id="two-spikes-of-equal-currents"),
    ],
)
def test_one_window_by_hand(values, kind, elsewhere):
    currents = one_window(values)
    routing = window_routing(currents, LIF(TAU1)(currents))
    assert (routing.windows, getattr(routing, kind)) == (1, 1)
    assert routing.silent + routing.single + routing.several == 1
    assert (routing.elsewhere, getattr(routing, f"elsewhere_{kind}")) == (elsewhere, elsewhere)


def test_a_spike_may_come_from_the_membrane_and_not_the_largest_current():
    """At the second step the first position fires on what it kept, the largest current is elsewhere and silent."""
    currents = torch.stack([one_window([1.9, 0, 0, 0])[0], one_window([1.2, 1.5, 0, 0])[0]])
    routing = window_routing(currents, LIF(LIFConfig(tau=2.0))(currents))
    assert (routing.silent, routing.single) == (1, 1)
    assert (routing.elsewhere_silent, routing.elsewhere_single) == (0, 1)


def test_shares_without_firing_windows():
    routing = window_routing(one_window([0.4, 0.3, 0.2, 0.1]), torch.zeros(1, 1, 1, 2, 2))
    assert routing.elsewhere_share == 0
    assert math.isnan(routing.firing_elsewhere_share)


def test_autograd_sends_the_gradient_where_the_counts_say():
    currents = one_window([0.0, 0.0, 2.5, 3.0])
    fire_pool, pool_fire = order_gradients(currents, TAU1, torch.ones(1, 1, 1, 1, 1))
    assert fire_pool.flatten().nonzero().flatten().tolist() == [2]  # the first spike
    assert pool_fire.flatten().nonzero().flatten().tolist() == [3]  # the largest current
    assert cosine(fire_pool, pool_fire) == 0


def test_the_orders_agree_where_the_largest_current_comes_first():
    currents = one_window([3.0, 2.5, 0.0, 0.0])
    assert cosine(*order_gradients(currents, TAU1, torch.ones(1, 1, 1, 1, 1))) == pytest.approx(1)


@pytest.mark.parametrize("dims", [(2, 3, 4, 8, 8), (3, 2, 5, 7, 9)], ids=["even", "odd"])
def test_counts_of_random_windows_are_those_of_a_plain_loop(dims):
    generator = torch.Generator().manual_seed(0)
    currents = torch.randn(*dims, generator=generator) * 2
    spikes = LIF(LIFConfig())(currents)
    routing = window_routing(currents, spikes)
    elsewhere = several = windows = 0
    for y, s in zip(currents.flatten(0, 2), spikes.flatten(0, 2), strict=True):
        height, width = y.shape
        for r in range(0, height, 2):
            for c in range(0, width, 2):
                cells = [
                    (i, j) for i in (r - 1, r, r + 1) for j in (c - 1, c, c + 1) if 0 <= i < height and 0 <= j < width
                ]
                first = max(cells, key=lambda p: (s[p].item(), -cells.index(p)))
                windows += 1
                several += sum(s[p].item() for p in cells) > 1
                elsewhere += y[first].item() < max(y[p].item() for p in cells)
    assert (routing.windows, routing.several, routing.elsewhere) == (windows, several, elsewhere)


@pytest.mark.parametrize(
    "name", ["spikingformer_4_384", "spikingformer_cml_4_384", "spikformer_4_384", "spikformer_cml_4_384"]
)
def test_every_downsampling_stage_of_a_model_is_measured(name):
    torch.manual_seed(0)
    model = timm.create_model(name, embed_dim=32, depth=1, num_heads=4, img_size=16, time_steps=2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    with use_backend("reference"):
        stages = measure_routing(model, x, labels)
    assert [s.stage for s in stages] == list(pooling_stages(model)) == ["stem.stages.2", "stem.stages.3"]
    assert stages[0].windows.windows == 2 * 4 * 16 * 8 * 8
    for s in stages:
        assert 0 < s.windows.elsewhere_share < 1
        assert -1 <= s.current_cosine < 0.999  # the orders differ on random currents
        assert -1 <= s.weight_cosine < 0.999
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the model was changed"
    assert all(p.grad is None for p in model.parameters())


def test_what_cannot_be_measured_says_why():
    with pytest.raises(ValueError, match="at least two"):
        measure_routing(torch.nn.Linear(1, 1), torch.zeros(1, 1), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="no downsampling stage"):
        measure_routing(torch.nn.Linear(1, 1), torch.zeros(2, 1), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="one shape"):
        window_routing(torch.zeros(1, 1, 1, 2, 2), torch.zeros(1, 1, 1, 2, 4))
