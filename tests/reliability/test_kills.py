"""Kill -9 at any moment, then --resume: the end is bit-equal to the unbroken run. Signals: a known status."""

import json
import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from benchmarks.planted_kills import RUN, kill_at_disk_call, kill_at_step
from benchmarks.run_processes import CONTEXT, complete, differing, final_state, finish, start, words


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    assert complete(folder, RUN) == [0], words(folder)
    return folder


def epochs_recorded(folder: Path) -> list[int]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record["epoch"] for record in records if record["kind"] == "epoch"]


@pytest.mark.parametrize(
    "fault",
    [
        partial(kill_at_disk_call, 2),
        partial(kill_at_disk_call, 23),
        partial(kill_at_disk_call, 36),
        partial(kill_at_step, 7),
        partial(kill_at_step, 10),
    ],
    ids=["first-file", "while-saving", "while-saving-weights", "inside-an-epoch", "between-epochs"],
)
def test_killed_and_resumed_is_bit_equal(unbroken, tmp_path, fault):
    folder = tmp_path / "run"
    assert complete(folder, RUN, prepare=fault) == [-signal.SIGKILL], words(folder)
    assert complete(folder, RUN, resume=True) == [0], words(folder)
    assert differing(final_state(folder), final_state(unbroken)) == []
    assert epochs_recorded(folder) == [0, 1, 2], "no epoch is missing or recorded twice"
    assert not list(folder.glob(".partial*")), "what the killed process had begun to write is gone"


def test_killed_three_times_in_one_run(unbroken, tmp_path):
    folder, draw = tmp_path / "run", random.Random(5)
    for _ in range(3):
        complete(folder, RUN, resume=True, prepare=partial(kill_at_disk_call, draw.randint(3, 12)))
    assert complete(folder, RUN, resume=True) == [0], words(folder)
    assert differing(final_state(folder), final_state(unbroken)) == []


def test_the_comparison_can_fail(unbroken, tmp_path):
    folder = tmp_path / "run"
    assert complete(folder, (*RUN, "seed=1")) == [0]
    assert differing(final_state(folder), final_state(unbroken))


def test_rerun_from_the_runs_own_recipe_is_bit_equal(unbroken, tmp_path):
    folder = tmp_path / "again"
    assert complete(folder, recipe=str(unbroken / "recipe.yaml")) == [0], words(folder)
    assert differing(final_state(folder), final_state(unbroken)) == []
    made = json.loads((unbroken / "run.json").read_text())
    assert {"command", "machine", "started"} <= set(made)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_leaves_with_75(unbroken, tmp_path, number):
    folder = tmp_path / "run"
    (process,) = start(folder, (*RUN, "checkpoint.every_steps=0"))
    while process.is_alive() and not (folder / "metrics.jsonl").exists():
        time.sleep(0.005)
    assert process.pid is not None
    os.kill(process.pid, number)
    assert finish([process]) == [75], words(folder)
    assert f"{number.name}: saving, then stopping" in words(folder)
    assert complete(folder, RUN, resume=True) == [0], words(folder)
    assert "continuing from epoch" in words(folder)
    assert differing(final_state(folder), final_state(unbroken)) == []


def signal_self(launched: bool, pause: float) -> None:
    """Body of a process that gets SIGTERM twice and never reaches a step's end."""
    from spikingformer.training.signals import stop_on_signals

    with stop_on_signals(launched):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(pause)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
    os._exit(0)


@pytest.mark.parametrize(
    ("launched", "pause", "code"),
    [(False, 0.01, 143), (True, 0.01, 0), (True, 2.1, 143)],
    ids=["second-leaves-at-once", "launcher-repeats-one-signal", "launcher-sends-a-second"],
)
def test_second_signal(launched, pause, code):
    process = CONTEXT.Process(target=signal_self, args=(launched, pause))
    process.start()
    assert finish([process], 20) == [code]


def hold_folder_and_die(folder: str) -> None:
    """Locks the folder, forks a reader that outlives it, and is killed."""
    from spikingformer.training.run_folder import locked

    with locked(Path(folder)):
        if os.fork() == 0:
            time.sleep(10)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_runs_readers_do_not_keep_its_folder(tmp_path):
    from spikingformer.training.run_folder import locked

    process = CONTEXT.Process(target=hold_folder_and_die, args=(str(tmp_path),))
    process.start()
    assert finish([process], 20) == [-signal.SIGKILL]
    with locked(tmp_path):
        pass


def test_two_runs_cannot_share_a_folder(tmp_path):
    from spikingformer.training.run_folder import locked

    folder = tmp_path / "run"
    with locked(folder):
        assert complete(folder, RUN) == [2]
        (folder / "recipe.yaml").write_text("")  # as if it had begun: resuming would be the wrong advice now
        assert complete(folder, RUN) == [2]
    assert "already holds a run" not in words(folder)
    assert f"{folder}: another run is writing there (process {os.getpid()} on " in words(folder)
    assert "choose another --output or wait for it" in words(folder)


def test_resuming_a_finished_run_says_so_and_keeps_its_weights(unbroken, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    assert complete(folder, RUN, resume=True) == [0], words(folder)
    assert f"{folder}: already finished (3 epochs)" in words(folder)
    assert "continuing from" not in words(folder)
    assert differing(final_state(folder), final_state(unbroken)) == []
