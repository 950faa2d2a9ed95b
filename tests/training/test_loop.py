"""The loop's rules: non-finite losses, accumulation, folders, schedule, what is recorded."""

import fcntl
import json
import shutil

import pytest
import torch

from spikingformer.data.loading import Batch, MemoryTraining, Step
from spikingformer.data.mixing import soft_targets
from spikingformer.training import out_of_memory
from spikingformer.training.checkpoint import read_model_file
from spikingformer.training.distributed import World, read_world
from spikingformer.training.gradient_step import GradientStep
from spikingformer.training.inputs import create_inputs
from spikingformer.training.loop import NonFiniteLoss, Trainer
from spikingformer.training.run import train
from spikingformer.training.run_folder import LAST_FILE, METRICS_FILE, has_run, locked
from spikingformer.training.setup import LearningRate, build_model, build_optimizer, choose_device
from spikingformer.training.state import (
    STATE_FILE,
    Progress,
    RunState,
    load_state,
    pack_optimizer,
    save_state,
    unpack_optimizer,
)
from spikingformer.training.tensor_file import read_tensors
from tests.training.helpers import assert_same_tensors, tiny_recipe

CPU = torch.device("cpu")


def poison(monkeypatch, steps: set[int]) -> list[int]:
    """Makes the loss NaN the first time each of these global steps is tried."""
    plain, tried, left = Trainer._loss, [], set(steps)

    def loss(self, step):
        value = plain(self, step)
        tried.append(self.progress.global_step)
        if self.progress.global_step in left:
            left.discard(self.progress.global_step)
            return value * float("nan")
        return value

    monkeypatch.setattr(Trainer, "_loss", loss)
    return tried


def test_nan_stops_with_what_to_try_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    poison(monkeypatch, {7})
    with pytest.raises(NonFiniteLoss, match=r"loss is nan in epoch 2, step 2(.|\n)*clip_norm=1(.|\n)*nonfinite=skip"):
        train(tiny_recipe(), tmp_path)
    state = load_state(tmp_path)[0]
    assert (state.progress.epoch, state.progress.step) == (1, 0)
    assert all(t.isfinite().all() for t in state.tensors.values())


def records(folder, kind: str) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def test_nan_is_skipped_and_counted_as_neither_loss_nor_sample(tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {1, *range(5, 10)})
    result = train(tiny_recipe(nonfinite="skip", log__every_steps=1), tmp_path)
    assert result.skipped_steps == 6
    first, second = records(tmp_path, "epoch")
    assert (first["skipped_steps"], second["skipped_steps"]) == (1, 6)
    losses = [record.get("loss") for record in records(tmp_path, "step")]
    assert [i for i, loss in enumerate(losses) if loss is None] == [1, 5, 6, 7, 8, 9]
    assert first["train_loss"] == pytest.approx(sum(losses[i] for i in (0, 2, 3, 4)) / 4)
    assert "train_loss" not in second, "no step of this epoch has a loss"
    assert "epoch 2/2  train loss none" in capsys.readouterr().err


@pytest.fixture
def nan_pixel(monkeypatch):
    """One pixel of step 2 of the first epoch is NaN, once: spikes keep the loss finite."""
    plain, left = MemoryTraining.steps, {(0, 2)}

    def steps(self, epoch, first_step):
        for number, step in enumerate(plain(self, epoch, first_step), first_step):
            if (epoch, number) in left:
                left.discard((epoch, number))
                step.parts[0].inputs[0, 0, 3, 3] = float("nan")
            yield step

    monkeypatch.setattr(MemoryTraining, "steps", steps)


def not_finite(file) -> list[str]:
    return [name for name, t in read_tensors(file)[0].items() if not t.isfinite().all()]


def test_nan_that_spikes_hide_from_the_loss_stops(tmp_path, nan_pixel):
    with pytest.raises(
        NonFiniteLoss, match=r"stem\.stages\.0\.bn\.running_mean is not finite \(.*\) in epoch 1, step 2"
    ):
        train(tiny_recipe(epochs=1, checkpoint__every_steps=1), tmp_path)
    assert load_state(tmp_path)[0].progress.global_step == 2
    assert not not_finite(tmp_path / STATE_FILE)


def test_nan_that_spikes_hide_from_the_loss_is_skipped(tmp_path, nan_pixel):
    result = train(tiny_recipe(epochs=1, nonfinite="skip"), tmp_path)
    state = load_state(tmp_path)[0]
    assert (result.skipped_steps, state.progress.updates) == (1, 4)
    assert not not_finite(tmp_path / STATE_FILE)
    counts = [int(t) for name, t in state.tensors.items() if name.endswith("num_batches_tracked")]
    assert set(counts) == {4}, "BatchNorm's statistics of the skipped step stayed"


@pytest.mark.parametrize("policy", ["skip", "step_back"])
def test_a_gradient_that_is_not_finite(tmp_path, monkeypatch, policy):
    """The loss is finite, so only the gradients tell."""
    plain, left = Trainer._loss, {2}

    def loss(self, step):
        value = plain(self, step)
        if self.progress.global_step in left:
            left.clear()
            next(self.model.parameters()).grad[0, 0, 0, 0] = float("inf")
        return value

    monkeypatch.setattr(Trainer, "_loss", loss)
    result = train(tiny_recipe(epochs=1, nonfinite=policy, checkpoint__every_steps=1), tmp_path)
    state = load_state(tmp_path)[0]
    assert not left
    assert (result.skipped_steps, state.progress.step_backs) == ((1, 0) if policy == "skip" else (0, 1))
    assert not not_finite(tmp_path / STATE_FILE)


def test_nan_that_spikes_hide_from_the_loss_steps_back(tmp_path, nan_pixel):
    train(tiny_recipe(epochs=1, nonfinite="step_back", checkpoint__every_steps=1), tmp_path)
    assert load_state(tmp_path)[0].progress.step_backs == 1
    assert not not_finite(tmp_path / STATE_FILE)


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    plain = Trainer._update

    def update(self):
        plain(self)
        if self.progress.global_step == 9:  # the last step: no later loss can tell
            next(self.model.head.parameters()).data[0, 0] = float("inf")

    monkeypatch.setattr(Trainer, "_update", update)
    with pytest.raises(NonFiniteLoss, match=r"model/head\.weight is not finite in epoch 2, step 5(.|\n)*--resume"):
        train(tiny_recipe(), tmp_path)
    assert load_state(tmp_path)[0].progress.global_step == 5
    assert not [f.name for f in tmp_path.glob("*.safetensors") if not_finite(f)]


def test_a_run_does_not_start_from_weights_that_are_not_finite(tmp_path, monkeypatch):
    def build(*args):
        model = build_model(*args)
        model.head.bias.data[0] = float("nan")
        return model

    monkeypatch.setattr("spikingformer.training.run.build_model", build)
    with pytest.raises(NonFiniteLoss, match=r"model/head\.bias is not finite") as caught:
        train(tiny_recipe(), tmp_path)
    assert "--resume" not in str(caught.value), "there is no checkpoint to go on from"


def test_nan_steps_back_with_half_the_rate(tmp_path, monkeypatch):
    tried = poison(monkeypatch, {7})
    train(tiny_recipe(nonfinite="step_back"), tmp_path)
    assert tried == [0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8, 9]
    progress = load_state(tmp_path)[0].progress
    assert (progress.step_backs, progress.learning_rate_factor) == (1, 0.5)


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    """In eval mode (BatchNorm then does not depend on how the batch is cut), float64: 1e-12 is a few thousand ulps."""
    gradients = []
    for parts in (1, 3):
        recipe = tiny_recipe(accumulation_steps=parts, precision="fp64", label_smoothing=0.1)
        inputs = create_inputs(recipe, CPU, World())
        model = build_model(recipe, 10, "pictures").double().eval()
        gradient = GradientStep(recipe, model, build_optimizer(recipe, model), 10, CPU, World())
        gradient.loss(next(iter(inputs.train.steps(0, 0))), 0, 0)
        gradients.append([p.grad for p in model.parameters()])
    for one, three in zip(*gradients, strict=True):
        torch.testing.assert_close(one, three, rtol=0, atol=1e-12)


def test_folder_with_a_run_is_refused_and_kept(tmp_path):
    train(tiny_recipe(epochs=1), tmp_path)
    before = (tmp_path / "state.safetensors").read_bytes()
    with pytest.raises(ValueError, match="already holds a run; add --resume"):
        train(tiny_recipe(epochs=1), tmp_path)
    assert (tmp_path / "state.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("there", "written", "left"),
    [
        pytest.param(False, False, False, id="a new folder"),
        pytest.param(False, True, True, id="a folder with a file"),
        pytest.param(True, False, True, id="the user's folder"),
    ],
)
def test_a_refused_run_leaves_no_empty_folder(tmp_path, there, written, left):
    folder = tmp_path / "run"
    if there:
        folder.mkdir()

    def refused():
        with locked(folder):
            if written:
                (folder / "recipe.yaml").write_text("seed: 0")
            raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        refused()
    assert folder.exists() == left
    with locked(folder):  # and the next one can begin
        assert folder.exists()


def test_the_error_of_a_refused_run_is_the_one_that_is_seen(tmp_path):
    def refused():
        with locked(tmp_path / "run"):
            shutil.rmtree(tmp_path / "run")
            raise ValueError("the real reason")

    with pytest.raises(ValueError, match="the real reason"):
        refused()
    with pytest.raises(ValueError, match="cannot write there"), locked(tmp_path / ("n" * 300)):
        pass


def test_a_lock_file_taken_away_by_its_holder_is_made_anew(tmp_path, monkeypatch):
    folder, flock, taken = tmp_path / "run", fcntl.flock, []

    def take_away_first(file, how):
        if not taken:  # as if the run before had failed between this one's opening and locking
            taken.append((folder / ".lock").unlink())
            folder.rmdir()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", take_away_first)
    with locked(folder):
        assert "process" in (folder / ".lock").read_text()
        with pytest.raises(ValueError, match="another run is writing there"), locked(folder):
            pass


def test_two_runs_cannot_share_a_folder(tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match=r"another run is writing there \(process \d+ on"):
        train(tiny_recipe(epochs=1), tmp_path)


def test_folder_says_how_it_was_made_and_makes_it_again(tmp_path):
    recipe = tiny_recipe(epochs=1, seed=5)
    first = train(recipe, tmp_path / "a")
    from spikingformer.training.recipe import load_recipe

    again = train(load_recipe(tmp_path / "a" / "recipe.yaml"), tmp_path / "b")
    assert first.last_top1 == again.last_top1
    noted = json.loads((tmp_path / "a" / "run.json").read_text())
    assert noted.keys() == {"command", "started", "machine"}, "versions and machine stand there once"
    assert "torch" in noted["machine"]["versions"]


def test_published_schedule():
    """Rates in the published CIFAR-10 log: epochs 0, 1, 20, 100 and 400 on of 400, 20 of warm-up, 5e-4 to 1e-5."""
    recipe = tiny_recipe(
        epochs=400,
        optimizer__learning_rate=5e-4,
        schedule__warmup_epochs=20,
        schedule__warmup_learning_rate=1e-5,
        schedule__min_learning_rate=1e-5,
        schedule__cooldown_epochs=10,
    )
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=5e-4)
    schedule = LearningRate(recipe, optimizer, steps_per_epoch=781)
    rates = [schedule.set(epoch, 3, 1.0) for epoch in (0, 1, 20, 100, 200, 400, 409)]
    assert rates == pytest.approx([1e-5, 3.45e-5, 4.97e-4, 4.282e-4, 2.55e-4, 1e-5, 1e-5], rel=1e-3)
    assert schedule.set(1, 0, 0.5) == pytest.approx(3.45e-5 / 2)
    assert recipe.total_epochs == 410


def test_soft_targets_sum_to_one():
    targets = soft_targets(torch.tensor([0, 2]), 4, 0.1)
    torch.testing.assert_close(targets, torch.tensor([[0.925, 0.025, 0.025, 0.025], [0.025, 0.025, 0.925, 0.025]]))


def test_cuda_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="finds no CUDA device here; use device=cpu"):
        choose_device("cuda")


def test_a_card_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert choose_device("auto", local_rank=3) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="got cuda:2, but there are 2 here, from cuda:0 to cuda:1"):
        choose_device("cuda:2")


def test_unknown_optimiser_names_the_nearest():
    recipe = tiny_recipe(optimizer__name="adamwx")
    with pytest.raises(ValueError, match="no optimiser 'adamwx'; did you mean 'adamw'"):
        build_optimizer(recipe, torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("environment", "world"),
    [
        ({}, World()),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "TORCHELASTIC_RESTART_COUNT": "2"}, World(3, 4, 1, 2)),
        (
            {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "MASTER_ADDR": "n0"},
            World(5, 8, 1, 0),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, World()),
    ],
    ids=["alone", "torchrun", "slurm", "slurm-one-task"],
)
def test_world_from_the_environment(environment, world):
    assert read_world(environment) == world


def test_slurm_without_an_address_says_what_to_export():
    with pytest.raises(ValueError, match="export MASTER_ADDR="):
        read_world({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"})


def every_optimiser() -> list[str]:
    """timm's optimisers that a recipe's settings are enough for, one of each kind."""
    return [
        "adamw",
        "sgd",
        "lamb",
        "nadamw",
        "radam",
        "rmsprop",
        "adafactor",
        "lion",
        "adan",
        "laprop",
        "muon",
        "adopt",
    ]


@pytest.mark.parametrize("name", every_optimiser())
def test_optimiser_goes_on_as_if_never_stopped(tmp_path, name):
    """Three steps in a row against one step, state written and read back, two steps: bit-equal."""

    def fresh(weights=None):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3))
        if weights is not None:
            model.load_state_dict(weights)
        return model, build_optimizer(tiny_recipe(optimizer__name=name, optimizer__learning_rate=0.01), model)

    def steps(model, optimizer, numbers):
        for number in numbers:
            optimizer.zero_grad()
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(number))
            model(x).square().sum().backward()
            optimizer.step()

    whole, optimizer = fresh()
    steps(whole, optimizer, range(3))
    model, optimizer = fresh()
    steps(model, optimizer, range(1))
    tensors, numbers = pack_optimizer(optimizer)
    save_state(tmp_path, RunState(tensors, numbers, {}, Progress(), {}, 1, {}))
    model, optimizer = fresh(model.state_dict())
    unpack_optimizer(optimizer, load_state(tmp_path)[0])
    steps(model, optimizer, range(1, 3))
    for one, other in zip(whole.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_early_epochs_train_with_fewer_time_steps_and_evaluate_with_all(tmp_path, monkeypatch):
    seen = []
    own = GradientStep._one_part

    def watched(self, inputs, targets, weight):
        seen.append(self.model.time_steps)
        return own(self, inputs, targets, weight)

    monkeypatch.setattr(GradientStep, "_one_part", watched)
    evaluated = []
    own_evaluate = Trainer.evaluate

    def watched_evaluation(self, model, loader):
        evaluated.append(model.time_steps)
        return own_evaluate(self, model, loader)

    monkeypatch.setattr(Trainer, "evaluate", watched_evaluation)
    recipe = tiny_recipe(epochs=3, model__time_steps=3, schedule__early_epochs=2, schedule__early_time_steps=1)
    train(recipe, tmp_path / "run")
    assert seen == [1] * (2 * len(seen) // 3) + [3] * (len(seen) // 3)
    assert evaluated == [3, 3, 3]
    assert read_model_file(tmp_path / "run" / LAST_FILE)[1].kwargs["time_steps"] == 3


def test_early_epochs_are_those_of_a_run_with_that_many_time_steps(tmp_path):
    early = tiny_recipe(epochs=2, schedule__early_epochs=1, schedule__early_time_steps=1, schedule__name="constant")
    other = tiny_recipe(epochs=1, model__time_steps=1, schedule__name="constant")
    train(early, tmp_path / "early")
    train(other, tmp_path / "other")

    def first_loss(folder):
        lines = map(json.loads, (folder / METRICS_FILE).read_text().splitlines())
        return next(line for line in lines if line["kind"] == "epoch")["train_loss"]

    assert first_loss(tmp_path / "early") == first_loss(tmp_path / "other")


def test_early_epochs_that_cannot_be_are_refused_before_a_run_begins(tmp_path):
    with pytest.raises(ValueError, match="some must run with all 2 time steps"):
        train(tiny_recipe(schedule__early_epochs=2), tmp_path / "run")
    assert not has_run(tmp_path / "run")
    with pytest.raises(ValueError, match="event frames bring their own time steps"):
        build_model(tiny_recipe(schedule__early_epochs=1), 10, "events")


def test_a_step_that_does_not_fit_is_tried_with_all_time_steps(tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(
        out_of_memory, "largest_fitting", lambda model, inputs, autocast: tried.append(model.time_steps) or 100
    )

    def no_memory(self, step, epoch, number):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(GradientStep, "loss", no_memory)
    with pytest.raises(out_of_memory.OutOfMemory, match="accumulation_steps=3"):
        train(tiny_recipe(model__time_steps=4, schedule__early_epochs=1), tmp_path / "run")
    assert tried == [4]


def test_the_rehearsal_with_all_time_steps_leaves_no_trace(tmp_path, monkeypatch):
    recipe = tiny_recipe(model__time_steps=3, schedule__early_epochs=1, model__drop_path_rate=0.2)
    train(recipe, tmp_path / "plain")
    seen = []
    plain, own = Trainer.__init__, GradientStep._one_part

    def rehearsing(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        self._rehearsed = False  # as on a GPU

    def watched(self, *args):
        seen.append(self.model.time_steps)
        return own(self, *args)

    monkeypatch.setattr(Trainer, "__init__", rehearsing)
    monkeypatch.setattr(GradientStep, "_one_part", watched)
    train(recipe, tmp_path / "rehearsed")
    assert seen[:3] == [3, 1, 1]
    assert_same_tensors(tmp_path / "plain" / LAST_FILE, tmp_path / "rehearsed" / LAST_FILE)


class HalfUnreadable(MemoryTraining):
    """Gives each part of a step half of its samples, as if the rest could not be read."""

    def steps(self, epoch, first_step):
        for step in super().steps(epoch, first_step):
            half = [len(part.labels) // 2 for part in step.parts]
            yield Step(
                [Batch(p.inputs[:n], p.labels[:n], len(p.labels) - n) for p, n in zip(step.parts, half, strict=True)],
                step.samples,
            )


@pytest.mark.parametrize("parts", [1, 2])
def test_loss_and_gradients_are_means_over_the_readable_samples(tmp_path, monkeypatch, parts):
    """Else they shrink with every file that cannot be read."""
    recipe = tiny_recipe(
        data__unreadable="skip",
        accumulation_steps=parts,
        precision="fp64",
        epochs=1,
        batch_size=1438,
        log__every_steps=1,
    )
    monkeypatch.setattr("spikingformer.training.inputs.MemoryTraining", HalfUnreadable)
    inputs = create_inputs(recipe, CPU, World())
    (step,) = inputs.train.steps(0, 0)
    model = build_model(recipe, 10, "pictures").double()
    losses = []
    for part in step.parts:
        targets = soft_targets(part.labels, 10, recipe.label_smoothing).double()
        losses.append(-(targets * model(part.inputs.double()).log_softmax(1)).sum())
    loss = sum(losses) / sum(len(part.labels) for part in step.parts)
    loss.backward()
    expected, seen = loss.item(), {}
    monkeypatch.setattr(Trainer, "_update", lambda self: seen.update(self.model.named_parameters()))
    result = train(recipe, tmp_path / "run")
    (record,) = records(tmp_path / "run", "step")
    assert result.unreadable == sum(part.unreadable for part in step.parts) > 700
    assert record["loss"] == pytest.approx(expected, rel=1e-12)
    assert records(tmp_path / "run", "epoch")[0]["train_loss"] == pytest.approx(expected, rel=1e-12)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(seen[name].grad, parameter.grad, rtol=1e-9, atol=1e-12)


def test_skipping_changes_no_bit_where_all_is_readable(tmp_path):
    for unreadable in ("stop", "skip"):
        train(tiny_recipe(data__unreadable=unreadable, accumulation_steps=2), tmp_path / unreadable)
    assert_same_tensors(tmp_path / "stop" / LAST_FILE, tmp_path / "skip" / LAST_FILE)
