"""The optimiser's step on a device: what is replayed, what is not, and that rates and state stay what they were."""

import logging

import pytest
import torch
from torch import nn

from spikingformer.training.muon import Muon
from spikingformer.training.run import train
from spikingformer.training.run_folder import LAST_FILE
from spikingformer.training.setup import build_optimizer
from spikingformer.training.update import DeviceUpdate, is_capturable
from tests.training.helpers import allow_capturable_on_cpu, assert_same_tensors, tiny_recipe

CPU = torch.device("cpu")


class Recorded:
    """A capture's stand-in: replays run the same call again."""

    def __init__(self):
        self.captures, self.replays = 0, 0

    def capture(self, run):
        self.captures += 1

        def replay():
            self.replays += 1
            run()

        return replay, None


def optimiser(kind=Muon):
    torch.manual_seed(0)
    model = nn.Linear(4, 6)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    groups = [{"params": [model.weight], "weight_decay": 0.1}, {"params": [model.bias], "weight_decay": 0.0}]
    return model, kind(groups, lr=0.1)


def drive(update, model, optimizer, rates):
    for number, rate in enumerate(rates):
        generator = torch.Generator().manual_seed(number)
        for p in model.parameters():
            p.grad.copy_(torch.randn(p.shape, generator=generator))
        for group in optimizer.param_groups:
            group["lr"] = rate
        update()
        assert [group["lr"] for group in optimizer.param_groups] == [rate, rate]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    allow_capturable_on_cpu(monkeypatch)


def test_replays_while_gradients_keep_their_places():
    recorded = Recorded()
    model, optimizer = optimiser()
    update = DeviceUpdate(optimizer, optimizer.step, CPU, True, recorded.capture)
    drive(update, model, optimizer, [0.1] * 8)
    assert (recorded.captures, recorded.replays) == (1, 5)
    kept = model.weight.grad
    model.weight.grad = kept.clone()
    drive(update, model, optimizer, [0.1])
    assert recorded.replays == 5
    model.weight.grad = kept
    drive(update, model, optimizer, [0.1])
    assert (recorded.captures, recorded.replays) == (1, 6)


def test_gradients_that_settle_elsewhere_are_captured_there():
    """As they do when the time steps of training change."""
    recorded = Recorded()
    model, optimizer = optimiser()
    update = DeviceUpdate(optimizer, optimizer.step, CPU, True, recorded.capture)
    drive(update, model, optimizer, [0.1] * 6)
    for p in model.parameters():
        p.grad = p.grad.clone()
    drive(update, model, optimizer, [0.1] * 6)
    assert (recorded.captures, recorded.replays) == (2, 3 + 3)


def test_each_replay_has_its_own_rate():
    rates = [0.1 / (1 + i) for i in range(9)]
    model, optimizer = optimiser()
    drive(DeviceUpdate(optimizer, optimizer.step, CPU, True, Recorded().capture), model, optimizer, rates)
    plain, other = optimiser()
    drive(other.step, plain, other, rates)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_state_put_back_is_captured_anew():
    recorded = Recorded()
    model, optimizer = optimiser()
    update = DeviceUpdate(optimizer, optimizer.step, CPU, True, recorded.capture)
    drive(update, model, optimizer, [0.1] * 5)
    optimizer.load_state_dict(optimizer.state_dict())
    update.forget()
    drive(update, model, optimizer, [0.1] * 5)
    assert recorded.captures == 2


def test_without_a_graph_the_rates_are_tensors_all_the_same():
    model, optimizer = optimiser()
    seen = []

    def apply():
        seen.append([type(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()

    recorded = Recorded()
    drive(DeviceUpdate(optimizer, apply, CPU, False, recorded.capture), model, optimizer, [0.1] * 6)
    assert seen == [[torch.Tensor, torch.Tensor]] * 6
    assert recorded.captures == 0


@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError])
def test_what_cannot_be_captured_runs_on(kind, caplog):
    def refuse(run):
        raise kind("operation not permitted when stream is capturing\nmore")

    model, optimizer = optimiser()
    before = model.weight.detach().clone()
    with caplog.at_level(logging.WARNING, "spikingformer"):
        drive(DeviceUpdate(optimizer, optimizer.step, CPU, True, refuse), model, optimizer, [0.1] * 6)
    assert not torch.equal(model.weight, before)
    assert caplog.text.count("step runs without a CUDA graph: operation not permitted") == 1


def test_rates_come_back_after_an_error():
    _, optimizer = optimiser()

    def fail():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        DeviceUpdate(optimizer, fail, CPU, True)()
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]


def test_who_can():
    assert is_capturable(optimiser(torch.optim.AdamW)[1])
    assert is_capturable(optimiser()[1])
    assert not is_capturable(optimiser(torch.optim.SGD)[1])


@pytest.mark.parametrize("name", ["muon", "nmuon", "adam", "nadamw", "radam", "rmsprop", "adadelta", "adamax", "adopt"])
def test_every_kind_of_capturable_optimiser_takes_its_rates_from_the_device(name):
    ends = []
    for on_device in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
        optimizer = build_optimizer(tiny_recipe(optimizer__name=name, optimizer__learning_rate=0.01), model)
        assert is_capturable(optimizer)
        update = DeviceUpdate(optimizer, optimizer.step, CPU, False) if on_device else optimizer.step
        for number in range(4):
            optimizer.zero_grad()
            model(torch.randn(5, 4, generator=torch.Generator().manual_seed(number))).square().sum().backward()
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / (number + 1)
            update()
        ends.append([p.detach() for p in model.parameters()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)  # matrices are orthogonalised in bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_run_has_the_same_weights_with_and_without(name, tmp_path):
    for folder, graph in (("with", True), ("without", False)):
        recipe = tiny_recipe(
            device="cuda", cuda_graph=graph, deterministic=True, batch_size=100, optimizer__name=name,
            optimizer__clip_norm=1.0, precision="bf16",
        )  # fmt: skip
        train(recipe, tmp_path / folder)
    assert_same_tensors(tmp_path / "with" / LAST_FILE, tmp_path / "without" / LAST_FILE)
