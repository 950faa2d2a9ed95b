"""A run that is stopped anywhere and resumed equals the unbroken one, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from spikingformer.data.loading import MemoryTraining
from spikingformer.reproduce.runs import check_overrides
from spikingformer.training.checkpoint import HELD_OUT, read_model_file
from spikingformer.training.gradient_step import GradientStep
from spikingformer.training.loop import StoppedBySignal, Trainer
from spikingformer.training.recipe import save_recipe
from spikingformer.training.run import train
from spikingformer.training.signals import SAVED_AND_LEFT
from spikingformer.training.state import PREVIOUS_FILE, STATE_FILE, load_state, save_state
from tests.training.helpers import assert_same_tensors, tiny_recipe

EVERYTHING = {
    "ema__decay": 0.9,
    "ema__warmup": True,
    "model__drop_path_rate": 0.2,
    "mixing__mixup_alpha": 0.5,
    "mixing__cutmix_alpha": 1.0,
    "augment__rand_augment": "rand-m9-n1-mstd0.5-inc1",
    "augment__erase_probability": 0.25,
    "data__validation_fraction": 0.1,
    "label_smoothing": 0.1,
    "schedule__warmup_epochs": 1,
    "schedule__every_step": True,
    "schedule__early_epochs": 1,
    "accumulation_steps": 2,
    "optimizer__clip_norm": 1.0,
}
PER_SAMPLE = {
    "augment__engine": "per_sample",
    "augment__rand_augment": "rand-m9-n1-mstd0.4-inc1",
    "augment__erase_probability": 0.25,
    "mixing__mixup_alpha": 0.5,
    "optimizer__name": "lamb",
    "batch_size": 400,
    "augment__crop_padding": 1,
}
SGD = {"optimizer__name": "sgd", "optimizer__learning_rate": 0.05, "precision": "bf16", "drop_last": False}


def stop_at(monkeypatch, step: int) -> None:
    """Asks the run to leave after so many optimiser steps."""
    plain = Trainer.train_step

    def train_step(self, batch):
        _, due = plain(self, batch)
        return self.progress.global_step == step, due

    monkeypatch.setattr(Trainer, "train_step", train_step)


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        pytest.param(EVERYTHING, "inside-first-epoch", id="everything-inside-first-epoch"),
        pytest.param(EVERYTHING, "inside-last-epoch", id="everything-inside-last-epoch"),
        pytest.param(PER_SAMPLE, "inside-last-epoch", id="per-sample-inside-last-epoch"),
        pytest.param(SGD, "at-an-epochs-end", id="sgd-bf16-at-an-epochs-end"),
    ],
)
def test_stopped_and_resumed_equals_unbroken(tmp_path, monkeypatch, settings, place):
    recipe = tiny_recipe(**settings)
    whole = train(recipe, tmp_path / "whole")
    steps = load_state(tmp_path / "whole")[0].progress.global_step // 2
    where = {"inside-first-epoch": 1, "inside-last-epoch": steps + 1, "at-an-epochs-end": steps}[place]
    with monkeypatch.context() as patch:
        stop_at(patch, where)
        with pytest.raises(StoppedBySignal):
            train(recipe, tmp_path / "parts")
    resumed = train(recipe, tmp_path / "parts", resume=True)
    for name in ("state", "best", "last"):
        assert_same_tensors(tmp_path / "whole" / f"{name}.safetensors", tmp_path / "parts" / f"{name}.safetensors")
    assert (whole.best_top1, whole.best_epoch, whole.test_top1) == (
        resumed.best_top1,
        resumed.best_epoch,
        resumed.test_top1,
    )
    losses = [
        [json.loads(line).get("train_loss") for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "parts")
    ]
    assert losses[0] == losses[1]


def test_states_of_some_epochs_are_enough_to_go_on_after_a_kill(tmp_path, monkeypatch):
    recipe = tiny_recipe(epochs=5, checkpoint__every_epochs=2, evaluate_every=5)
    train(recipe, tmp_path / "whole")
    ends = []
    end = Trainer._end_epoch

    def killed(self):
        end(self)
        ends.append(self.progress.epoch)
        if len(ends) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        saved = states_written(patch)
        patch.setattr(Trainer, "_end_epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "parts")
        train(recipe, tmp_path / "parts", resume=True)
    assert saved == [0, 2, 4, 5]
    assert ends == [1, 2, 3, 3, 4, 5]
    for name in ("state", "best", "last"):
        assert_same_tensors(tmp_path / "whole" / f"{name}.safetensors", tmp_path / "parts" / f"{name}.safetensors")
    lines = (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    assert [r["epoch"] for r in map(json.loads, lines) if r["kind"] == "epoch"] == [0, 1, 2, 3, 4]


def states_written(monkeypatch) -> list[int]:
    """Epochs done at each state that is written from now on."""
    saved: list[int] = []
    write = Trainer._write_state

    def watched(self):
        saved.append(self.progress.epoch)
        write(self)

    monkeypatch.setattr(Trainer, "_write_state", watched)
    return saved


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"every_seconds": 1e-6}, [0, 1, 2, 3]),
        ({"every_steps": 2}, [0, 2, 3]),
        ({"every_steps": 1}, [0, 1, 2, 3]),
        ({}, [0, 3]),
    ],
    ids=["seconds", "every second step", "every step", "neither"],
)
def test_one_step_an_epoch_is_saved_by_time_and_steps_too(tmp_path, monkeypatch, settings, expected):
    checkpoint = {f"checkpoint__{name}": value for name, value in settings.items()}
    recipe = tiny_recipe(epochs=3, batch_size=1400, checkpoint__every_epochs=100, evaluate_every=3, **checkpoint)
    saved = states_written(monkeypatch)
    train(recipe, tmp_path / "run")
    assert saved == expected


def test_the_best_weights_are_those_that_the_state_knows(tmp_path, monkeypatch):
    """A step back goes to a state that knows of every best.safetensors that was written."""
    accuracies, poisoned = iter([40.0, 70.0, 50.0, 45.0]), []
    evaluate, loss = Trainer.evaluate, GradientStep.loss

    def scripted(self, model, loader):
        return replace(evaluate(self, model, loader), top1=next(accuracies))

    def nan_in_the_third_epoch(self, step, epoch, number):
        value = loss(self, step, epoch, number)
        if epoch == 2 and not poisoned:
            poisoned.append(epoch)
            return value * float("nan")
        return value

    monkeypatch.setattr(Trainer, "evaluate", scripted)
    monkeypatch.setattr(GradientStep, "loss", nan_in_the_third_epoch)
    recipe = tiny_recipe(epochs=4, checkpoint__every_epochs=10, nonfinite="step_back")
    result = train(recipe, tmp_path / "run")
    info = read_model_file(tmp_path / "run" / "best.safetensors")[1]
    assert (result.best_top1, result.best_epoch) == (70.0, 1) == (info.metrics["top1"], info.epoch)


def test_a_state_of_an_earlier_version_goes_on_with_the_defaults_of_new_fields(tmp_path, monkeypatch):
    recipe = tiny_recipe(epochs=2)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(StoppedBySignal):
            train(recipe, tmp_path / "run")
    state = load_state(tmp_path / "run")[0]
    del state.recipe["schedule"]["early_epochs"], state.recipe["schedule"]["early_time_steps"]
    save_state(tmp_path / "run", state)
    train(recipe, tmp_path / "run", resume=True)
    assert load_state(tmp_path / "run")[0].progress.finished


def test_seed_changes_the_run(tmp_path):
    """Shows that the comparisons above can fail."""
    for seed in (0, 1):
        train(tiny_recipe(seed=seed, epochs=1), tmp_path / str(seed))
    with pytest.raises(AssertionError, match="tensors differ"):
        assert_same_tensors(tmp_path / "0/last.safetensors", tmp_path / "1/last.safetensors")


def test_workers_do_not_change_the_run(tmp_path):
    for workers in (0, 2):
        train(tiny_recipe(**PER_SAMPLE | {"epochs": 1, "workers": workers}), tmp_path / str(workers))
    assert_same_tensors(tmp_path / "0/last.safetensors", tmp_path / "2/last.safetensors")


def command(folder, recipe, *more: str) -> list[str]:
    return [sys.executable, "-m", "spikingformer", "train", str(recipe), "--output", str(folder), *more]


def wait_for(process, test, seconds=60):
    end = time.monotonic() + seconds
    while not test():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


@pytest.fixture
def slow_run(tmp_path):
    """A recipe file with many small steps, a checkpoint after each second one."""
    recipe = tiny_recipe(batch_size=24, epochs=3, checkpoint__every_steps=2, threads=1)
    save_recipe(recipe, tmp_path / "recipe.yaml")
    return recipe, tmp_path / "recipe.yaml"


def test_kill_and_term_then_resume_in_other_processes(tmp_path, slow_run):
    recipe, file = slow_run
    folder = tmp_path / "run"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    start = {"env": environment, "stderr": subprocess.PIPE, "text": True}
    steps = []
    for number, resume in ((signal.SIGKILL, ()), (signal.SIGTERM, ("--resume",))):
        before = (folder / STATE_FILE).stat().st_mtime_ns if resume else 0
        with subprocess.Popen(command(folder, file, *resume), **start) as process:
            state = folder / STATE_FILE
            wait_for(
                process,
                lambda s=state, b=before: (
                    s.exists() and s.stat().st_mtime_ns > b and load_state(folder)[0].progress.global_step
                ),
            )
            process.send_signal(number)
            process.wait(60)
        assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else SAVED_AND_LEFT)
        steps.append(load_state(folder)[0].progress.global_step)
    assert 0 < steps[0] < steps[1] < 3 * 59
    torch.set_num_threads(1)
    train(recipe, folder, resume=True)
    train(recipe, tmp_path / "whole")
    assert_same_tensors(tmp_path / "whole/state.safetensors", folder / "state.safetensors")


def test_second_signal_leaves_at_once(tmp_path, slow_run, monkeypatch):
    code = (
        "import os, signal, time\n"
        "from spikingformer.training.signals import stop_on_signals\n"
        "with stop_on_signals() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    assert stop\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(30)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signal.SIGINT
    assert "saving, then stopping" in done.stderr


def test_damaged_state_falls_back_to_the_one_before(tmp_path, capsys):
    recipe = tiny_recipe()
    train(recipe, tmp_path / "run")
    whole = (tmp_path / "run" / STATE_FILE).read_bytes()
    (tmp_path / "run" / STATE_FILE).write_bytes(whole[: len(whole) // 2])
    train(recipe, tmp_path / "run", resume=True)
    text = capsys.readouterr().err
    assert "state.safetensors: not a complete safetensors file" in text
    assert f"Continuing from {PREVIOUS_FILE}" in text
    assert (tmp_path / "run" / STATE_FILE).stat().st_size == len(whole)


def test_no_whole_state_is_an_error(tmp_path):
    train(tiny_recipe(epochs=1), tmp_path)
    for name in (STATE_FILE, PREVIOUS_FILE):
        (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="No intact checkpoint in"):
        train(tiny_recipe(epochs=1), tmp_path, resume=True)


def test_resume_on_other_data_is_refused(tmp_path):
    root = tmp_path / "pictures"
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for i in range(4):
                Image.fromarray(np.full((16, 16), 20 * i, np.uint8)).save(root / part / name / f"{i}.png")
    recipe = tiny_recipe(epochs=2, batch_size=4, data__name="folder", data__root=str(root), data__channels=1,
                         augment__engine="per_sample")  # fmt: skip
    train(recipe, tmp_path / "run")
    state = load_state(tmp_path / "run")[0]
    save_state(tmp_path / "run", replace(state, progress=replace(state.progress, epoch=1, finished=False)))
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(root / "train" / "dog" / "new.png")
    with pytest.raises(ValueError, match="its run was trained on other data: training_samples was 8, is 9 now"):
        train(recipe, tmp_path / "run", resume=True)
    (root / "train" / "dog" / "new.png").unlink()
    for part in ("train", "val"):
        (root / part / "dog").rename(root / part / "wolf")
    with pytest.raises(ValueError, match="class_names was cat, dog, is cat, wolf now"):
        train(recipe, tmp_path / "run", resume=True)
    save_state(tmp_path / "run", replace(load_state(tmp_path / "run")[0], data=None))  # as older versions did
    with pytest.raises(ValueError, match="class_names was cat, dog, is cat, wolf now"):
        train(recipe, tmp_path / "run", resume=True)
    for part in ("train", "val"):
        (root / part / "wolf").rename(root / part / "dog")
    train(recipe, tmp_path / "run", resume=True)


def test_resume_with_another_recipe_is_refused(tmp_path):
    train(tiny_recipe(epochs=1), tmp_path)
    with pytest.raises(ValueError, match=r"holds a run with another recipe:\n  batch_size: was 240, is 120 now"):
        train(tiny_recipe(epochs=1, batch_size=120), tmp_path, resume=True)


def test_resume_may_change_where_and_how_a_run_is_computed(tmp_path, monkeypatch):
    """And what it does about a loss that is not finite, which a row of the ledger may not."""
    train(tiny_recipe(epochs=1), tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(StoppedBySignal):
            train(tiny_recipe(epochs=1), tmp_path / "parts")
    elsewhere = {"data__root": "elsewhere", "data__cache": "c", "cuda_graph": False, "grad_checkpointing": True}
    other = tiny_recipe(epochs=1, nonfinite="skip", data__unreadable="skip", log__every_steps=3, workers=1, **elsewhere)
    train(other, tmp_path / "parts", resume=True)
    assert_same_tensors(tmp_path / "whole" / "last.safetensors", tmp_path / "parts" / "last.safetensors")
    check_overrides(["data.cache=c", "cuda_graph=false", "grad_checkpointing=true", "log.every_steps=3", "workers=1"])
    with pytest.raises(ValueError, match="would change what the row runs"):
        check_overrides(["nonfinite=skip"])


def test_a_checkpoint_that_is_not_finite_is_refused(tmp_path, monkeypatch):
    """Older versions saved such states."""
    stop_at(monkeypatch, 2)
    with pytest.raises(StoppedBySignal):
        train(tiny_recipe(epochs=1), tmp_path)
    state = load_state(tmp_path)[0]
    state.tensors["model/stem.stages.0.bn.running_var"][1] = float("nan")
    save_state(tmp_path, state)
    with pytest.raises(ValueError, match=r"holds NaN or infinity in model/stem\.stages\.0\.bn\.running_var"):
        train(tiny_recipe(epochs=1), tmp_path, resume=True)


def test_finished_run_is_not_repeated(tmp_path, monkeypatch, capsys):
    recipe = tiny_recipe(epochs=1, data__validation_fraction=0.1)
    first = train(recipe, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    said = capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr(MemoryTraining, "steps", None)
    assert train(recipe, tmp_path, resume=True) == first
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before
    assert capsys.readouterr().err.splitlines() == [f"{tmp_path}: already finished (1 epochs)", said]
    assert f"chosen on the held-out training samples): {first.best_top1:.2f} %" in said
    assert read_model_file(tmp_path / "best.safetensors")[1].metrics_part == HELD_OUT
    (tmp_path / "result.json").unlink()
    again = train(recipe, tmp_path, resume=True)
    assert (again.test_top1, again.best_top1) == (first.test_top1, first.best_top1)
