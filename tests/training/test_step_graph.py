"""The training step as one graph: what is replayed, what is not, and that a run's numbers stay the same."""

import logging
import weakref

import pytest
import torch
from torch import nn

from spikingformer.training.run import train
from spikingformer.training.run_folder import LAST_FILE
from spikingformer.training.step_graph import StepGraph
from tests.training.helpers import assert_same_tensors, tiny_recipe


class Recorded:
    """A step on the CPU and a stand-in for its capture: replays run it again on the captured tensors."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 2))
        self.eager, self.replays = 0, 0

    def run(self, inputs, targets, weight):
        self.eager += 1
        loss = ((self.model(inputs) - targets) ** 2).sum() * weight
        loss.backward()
        return loss.detach()

    def capture(self, run):
        out = run()
        gradients = [p.grad for p in self.model.parameters()]

        def replay():
            self.replays += 1
            self.eager -= 1
            self.model.zero_grad(set_to_none=True)
            out.copy_(run())
            for old, p in zip(gradients, self.model.parameters(), strict=True):
                old.copy_(p.grad)

        self.eager -= 1
        return replay, out


def batch(n=4):
    return torch.randn(n, 3), torch.randn(n, 2)


def test_replays_what_most_steps_look_like_with_the_same_numbers():
    r = Recorded()
    step = StepGraph(r.run, r.model, r.capture)
    assert not step.holds_memory
    losses = []
    for i in range(8):
        inputs, targets = batch()
        r.model.zero_grad(set_to_none=True)
        losses.append((step(inputs, targets, 0.25), ((r.model(inputs) - targets) ** 2).sum() * 0.25))
        got = [p.grad.clone() for p in r.model.parameters()]
        want = torch.autograd.grad(losses[-1][1], list(r.model.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), i
    assert r.replays == 5
    assert r.eager == 3
    assert step.holds_memory
    assert all(torch.equal(a, b) for a, b in losses), "a loss kept from an earlier step was written over"


def test_another_shape_runs_as_it_is():
    r = Recorded()
    step = StepGraph(r.run, r.model, r.capture)
    for n in (2, 4, 4, 4, 4, 2, 4):
        r.model.zero_grad(set_to_none=True)
        step(*batch(n), 1.0)
    assert (r.eager, r.replays) == (5, 2)


def test_other_time_steps_are_captured_anew():
    r = Recorded()
    captured = []

    def capture(run):
        captured.append(r.model.time_steps)
        return r.capture(run)

    step = StepGraph(r.run, r.model, capture)
    for time_steps in (1,) * 5 + (4,) * 5:
        r.model.time_steps = time_steps
        r.model.zero_grad(set_to_none=True)
        step(*batch(), 1.0)
    assert captured == [1, 4]
    assert (r.eager, r.replays) == (6, 4)


def test_a_hook_is_called_at_every_step():
    r = Recorded()
    step = StepGraph(r.run, r.model, r.capture)
    calls = []
    for i in range(8):
        if i == 6:
            r.model[0].register_forward_hook(lambda *_: calls.append(1))
        r.model.zero_grad(set_to_none=True)
        step(*batch(), 1.0)
    assert len(calls) == 2


@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError])
def test_what_cannot_be_captured_runs_on(kind, caplog):
    """Whether a graph cannot hold the step or memory cannot hold the graph."""
    r = Recorded()

    def refuse(run):
        raise kind("operation not permitted when stream is capturing\nmore")

    step = StepGraph(r.run, r.model, refuse)
    with caplog.at_level(logging.WARNING, "spikingformer"):
        for _ in range(6):
            r.model.zero_grad(set_to_none=True)
            step(*batch(), 1.0)
    assert r.eager == 6
    assert not step.holds_memory
    assert caplog.text.count("the training step runs without a CUDA graph: operation not permitted") == 1


def test_a_failed_capture_leaves_nothing_behind():
    """No gradients, which the step would add to, and no memory."""
    r = Recorded()
    held = []

    def out_of_memory_at_the_end(run):
        pool = torch.zeros(100)
        held.append(weakref.ref(pool))
        run()
        held.extend(weakref.ref(p.grad) for p in r.model.parameters())
        raise torch.OutOfMemoryError("full")

    step = StepGraph(r.run, r.model, out_of_memory_at_the_end)
    for _ in range(3):
        r.model.zero_grad(set_to_none=True)
        step(*batch(), 1.0)
    r.model.zero_grad(set_to_none=True)
    inputs, targets = batch()
    step(inputs, targets, 1.0)
    assert len(held) == 3
    assert all(reference() is None for reference in held)
    want = torch.autograd.grad(((r.model(inputs) - targets) ** 2).sum(), list(r.model.parameters()))
    assert all(torch.equal(p.grad, g) for p, g in zip(r.model.parameters(), want, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_a_run_has_the_same_weights_with_and_without(precision, drop_path, tmp_path):
    kwargs: dict = {"precision": precision, "model__drop_path_rate": drop_path}
    for name, graph in (("with", True), ("without", False)):
        recipe = tiny_recipe(device="cuda", cuda_graph=graph, deterministic=True, batch_size=100, **kwargs)
        train(recipe, tmp_path / name)
    assert_same_tensors(tmp_path / "with" / LAST_FILE, tmp_path / "without" / LAST_FILE)
