"""Anytime inference: the stop rule by hand, the curve's ends, and the running form against the recorded one."""

import math

import pytest
import torch

from spikingformer.energy import count_operations, get_preset
from spikingformer.export.anytime import (
    anytime_curve,
    energy_by_step,
    format_curve,
    margins,
    predict_anytime,
    step_logits,
    stopping_steps,
)

from .conftest import small_model

# margins of softmax([x, 0]) are tanh(x / 2): three steps, four samples, two classes
LOGITS = torch.tensor(
    [
        [[0.1, 0.0], [3.0, 0.0], [0.0, 0.1], [0.1, 0.0]],
        [[2.5, 0.0], [0.0, 4.0], [0.0, 0.1], [0.1, 0.0]],
        [[0.0, 1.0], [5.0, 0.0], [0.0, 9.0], [0.1, 0.0]],
    ]
)
LABELS = torch.tensor([0, 0, 1, 1])


def test_each_sample_stops_at_its_first_sure_step():
    assert stopping_steps(LOGITS, 0.8).tolist() == [2, 1, 3, 3]
    assert stopping_steps(LOGITS, 1e-6).tolist() == [1, 1, 1, 1]
    assert stopping_steps(LOGITS, math.inf).tolist() == [3, 3, 3, 3]


def test_curve_counts_accuracy_steps_and_energy_at_the_stop():
    sure, never = anytime_curve(LOGITS, LABELS, [0.8, math.inf], energy_by_step=[3.0, 1.0, 1.0])
    assert sure.accuracy == 75.0  # samples 0, 1, 2 right at steps 2, 1, 3; sample 3 wrong
    assert sure.mean_steps == (2 + 1 + 3 + 3) / 4
    assert sure.energy_mj == pytest.approx((4 + 3 + 5 + 5) / 4)
    assert sure.stopped_at == (0.25, 0.25, 0.5)
    assert never.accuracy == 50.0
    assert never.mean_steps == 3
    assert never.energy_mj == 5.0
    assert "all    50.00%   3.00          5" in format_curve([sure, never])


@pytest.mark.parametrize("kind", ["pictures", "events"])
def test_running_form_stops_where_the_recorded_logits_say(kind):
    model = small_model("spikformer_2_256" if kind == "events" else "spikingformer_cml_4_384", img_size=32)
    x = torch.randn(6, 3, 32, 32) if kind == "pictures" else torch.poisson(torch.ones(6, 4, 2, 32, 32))
    logits, _ = step_logits(model, [(x[:4], torch.zeros(4)), (x[4:], torch.zeros(2))])
    first = margins(logits[0]).sort().values
    threshold = float(first[0] + first[-1]) / 2  # between two samples: some stop after one step, some later
    steps = stopping_steps(logits, threshold)
    with torch.device("meta"):  # what does not follow x to its device lands where nothing can be computed
        got, taken = predict_anytime(model, x, threshold)
    assert taken.tolist() == steps.tolist()
    assert len(set(taken.tolist())) > 1
    expected = logits[steps - 1, torch.arange(6)]
    # the same spikes; the mean over time is summed in another order
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_energy_of_the_steps_sums_to_the_estimate():
    model = small_model("spikingformer_cml_4_384", img_size=16)
    facts = count_operations(model, [torch.randn(4, 3, 16, 16)])
    cost = energy_by_step(facts)
    assert len(cost) == 4
    assert sum(cost) == pytest.approx(get_preset("exact").price(facts).energy_mj, rel=1e-9)
    assert all(c > 0 for c in cost)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stopping_steps(LOGITS, 0), "a margin above 0 .* got 0"),
        (lambda: stopping_steps(LOGITS[..., :1], 0.5), "at least two classes, got 1"),
        (lambda: anytime_curve(LOGITS[0], LABELS), r"expected logits \(T, N, K\)"),
        (lambda: anytime_curve(LOGITS, LABELS, energy_by_step=[1.0]), "energy of 3 time steps, got 1"),
        (lambda: step_logits(small_model("spikformer_4_384"), []), "no samples"),
    ],
    ids=["threshold", "one-class", "shape", "energy", "empty"],
)
def test_wrong_input_says_what_is_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_head_of_the_users_own_decides_the_number_of_classes():
    model = small_model("spikingformer_cml_4_384", img_size=16).eval()
    model.head = torch.nn.Linear(model.num_features, 3)
    x = torch.randn(2, 3, 16, 16)
    logits, steps = predict_anytime(model, x, 1.0)
    torch.testing.assert_close(logits, model.forward_steps(x)[-1].detach(), rtol=0, atol=1e-5)
    assert steps.tolist() == [model.time_steps] * 2


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan")])
def test_running_with_a_threshold_that_is_none_is_refused(threshold):
    model = small_model("spikingformer_cml_4_384", img_size=16)
    with pytest.raises(ValueError, match="a margin above 0"):
        predict_anytime(model, torch.zeros(1, 3, 16, 16), threshold)
    with pytest.raises(ValueError, match="got"):
        predict_anytime(model, torch.zeros(3, 16, 16), 0.5)
