"""2 and 4 processes with gloo give the single process's loss, gradients, averages and evaluation."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks.run_processes import SMALL, complete, final_state, finish, start, words

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")

# 1,438 training samples: five batches of 255 and one of 163, so neither 2 nor 4 processes share a batch evenly;
# 359 test samples. SGD with momentum: the optimiser's state is a weighted sum of every step's gradient.
EXACT = (
    *SMALL,
    "precision=fp64",
    "epochs=1",
    "batch_size=255",
    "drop_last=false",
    "ema.decay=0.9",
    "optimizer.name=sgd",
    "optimizer.learning_rate=0.05",
    "evaluation_batch_size=50",
)
# float64 sums in another order differ by about n * 2**-53 (n = 255 * 64 terms: 2e-12); six steps amplify that
TOLERANCE = 1e-9


def records(folder: Path, kind: str) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single") / "run"
    assert complete(folder, EXACT) == [0], words(folder)
    return folder


def largest_difference(a: Path, b: Path, leave_out: str = "\0") -> float:
    first, second = final_state(a), final_state(b)
    assert set(first) == set(second)
    names = [n for n in first if first[n].is_floating_point() and leave_out not in n]
    assert any("optimizer/" in n for n in names)
    return max(float((first[n] - second[n]).abs().max()) for n in names)


@pytest.mark.parametrize("ranks", [2, 4])
def test_synchronised_ranks_equal_one_process(single, tmp_path, ranks):
    folder = tmp_path / "run"
    codes = complete(folder, (*EXACT, "sync_batchnorm=true"), ranks=ranks)
    assert codes == [0] * ranks, words(folder, 0)
    losses = [[record["loss"] for record in records(f, "step")] for f in (single, folder)]
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=TOLERANCE)
    assert largest_difference(single, folder) < TOLERANCE
    (alone,), (together,) = records(single, "epoch"), records(folder, "epoch")
    assert together["top1"] == alone["top1"]
    assert together["top5"] == alone["top5"]
    assert together["loss"] == pytest.approx(alone["loss"], rel=TOLERANCE)
    for rank in range(1, ranks):
        assert "epoch" not in words(folder, rank), "one process speaks"


def fail_to_read_threes() -> None:
    """Training samples of class 3 cannot be read, wherever they are dealt to."""
    from spikingformer.data.loading import Batch, MemoryTraining, Step

    steps = MemoryTraining.steps

    def without_threes(self, epoch, first_step):
        for step in steps(self, epoch, first_step):
            kept = [part.labels != 3 for part in step.parts]
            pairs = zip(step.parts, kept, strict=True)
            parts = [Batch(p.inputs[k], p.labels[k], len(k) - int(k.sum())) for p, k in pairs]
            yield Step(parts, step.samples)

    MemoryTraining.steps = without_threes


def test_ranks_divide_by_what_all_of_them_could_read(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    skip = (*EXACT, "data.unreadable=skip")
    assert complete(one, skip, prepare=fail_to_read_threes) == [0], words(one)
    codes = complete(two, (*skip, "sync_batchnorm=true"), ranks=2, prepare=fail_to_read_threes)
    assert codes == [0, 0], words(two, 0)
    (alone,), (together,) = records(one, "epoch"), records(two, "epoch")
    assert alone["unreadable"] == together["unreadable"] > 100
    assert together["train_loss"] == pytest.approx(alone["train_loss"], rel=TOLERANCE)
    assert largest_difference(one, two) < TOLERANCE


def test_the_comparison_can_fail(single, tmp_path):
    """Without SyncBatchNorm each process normalises with its own share: another result."""
    folder = tmp_path / "run"
    assert complete(folder, EXACT, ranks=2) == [0, 0], words(folder, 0)
    assert largest_difference(single, folder) > 1e-6


def count_reductions() -> None:
    """Plants a counter of gradient exchanges: one line a bucket in reductions.txt of the working folder."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    from spikingformer.training.loop import Trainer

    plain = Trainer.__init__

    def counting(self, *args, **kwargs):
        plain(self, *args, **kwargs)

        def hook(state, bucket):
            if self.world.rank == 0:
                with open(f"{self.folder}.reductions", "a") as file:
                    file.write(f"{self.progress.global_step} {bucket.index()}\n")
            return allreduce_hook(state, bucket)

        self.gradient.forward.register_comm_hook(None, hook)

    Trainer.__init__ = counting


def test_accumulation_is_ranks_one_after_another_and_exchanges_once_a_step(tmp_path):
    """Two ranks with two parts each see the parts of one process with four; gradients meet once a step."""
    one, two = tmp_path / "one", tmp_path / "two"
    even = (*EXACT, "batch_size=256", "drop_last=true")
    assert complete(one, (*even, "accumulation_steps=4")) == [0], words(one)
    codes = complete(two, (*even, "accumulation_steps=2"), ranks=2, prepare=count_reductions)
    assert codes == [0, 0], words(two, 0)
    losses = [[record["loss"] for record in records(f, "step")] for f in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=TOLERANCE)
    assert largest_difference(one, two, leave_out="running_") < TOLERANCE  # statistics: of the first process's parts
    lines = Path(f"{two}.reductions").read_text().split("\n")[:-1]
    assert len(lines) == len(set(lines)), "a bucket was exchanged twice in a step"
    assert {int(line.split()[0]) for line in lines} == set(range(5))


def test_uneven_accumulation_with_synchronised_batchnorm_ends(tmp_path):
    """Three samples for two processes of three parts: without the same number of parts they would wait for ever."""
    folder = tmp_path / "run"
    overrides = (*EXACT, "sync_batchnorm=true", "batch_size=1435", "accumulation_steps=3")  # the last batch: 3 samples
    assert complete(folder, overrides, ranks=2) == [0, 0], words(folder, 0)
    assert len(records(folder, "step")) == 2


def wait_for_steps(folder: Path, count: int, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if (folder / "metrics.jsonl").exists() and len((folder / "metrics.jsonl").read_text().splitlines()) >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"{folder}: fewer than {count} steps after {seconds} s: {words(folder, 0)}")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_rank_that_dies_ends_the_others_with_a_clear_message(tmp_path, parallel):
    folder = tmp_path / "run"
    overrides = (*EXACT, "epochs=50", "checkpoint.every_steps=2", f"parallel={parallel}")
    processes = start(folder, overrides, ranks=2)
    wait_for_steps(folder, 4)
    processes[1].kill()
    assert finish(processes, 60) == [2, -signal.SIGKILL]
    text = words(folder, 0)
    assert "process 0 of 2: another process of this run has ended" in text
    assert "The last checkpoint is intact: start again with --resume" in text
    assert "Traceback" not in text


def test_one_rank_asked_to_stop_stops_all_after_saving(tmp_path):
    folder, whole = tmp_path / "run", tmp_path / "whole"
    overrides = (*EXACT, "epochs=2")
    processes = start(folder, overrides, ranks=2)
    wait_for_steps(folder, 3)
    assert processes[1].pid is not None
    os.kill(processes[1].pid, signal.SIGTERM)
    assert finish(processes, 60) == [75, 75]
    assert complete(folder, overrides, ranks=2, resume=True) == [0, 0], words(folder, 0)
    assert complete(whole, overrides, ranks=2) == [0, 0]
    first, second = final_state(folder), final_state(whole)
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_all_ranks_hear_why_the_first_refuses(single, tmp_path):
    assert finish(start(single, EXACT, ranks=2), 60) == [2, 2]
    for rank in (0, 1):
        assert "already holds a run; add --resume" in words(single, rank)
