"""A training run in legs: `spikingformer train --resume`, stopped by a signal and started again until it is done."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from spikingformer.training.run_folder import METRICS_FILE, RESULT_FILE
from spikingformer.training.signals import SAVED_AND_LEFT

LegIsOver = Callable[[float, Path], bool]  # (seconds since the leg began, the run's folder)


@dataclass(frozen=True)
class Legs:
    """finished: the run is complete. legs: started by this call (0: it was complete before)."""

    finished: bool
    legs: int


def seconds_limit(seconds: float | None) -> LegIsOver:
    """Ends a leg after so many seconds; None: when the run ends."""
    return lambda passed, _: seconds is not None and passed >= seconds


def is_finished(folder: Path) -> bool:
    return (folder / RESULT_FILE).is_file()


def epoch_records(folder: Path) -> list[dict]:
    """The records of whole epochs in metrics.jsonl, in order; the last attempt's where an epoch was repeated."""
    path = folder / METRICS_FILE
    if not path.is_file():
        return []
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # being written, or cut off by a kill
            continue
        if record.get("kind") == "epoch":
            found[record["epoch"]] = record
    return [found[epoch] for epoch in sorted(found)]


def train_in_legs(
    recipe: str,
    overrides: Sequence[str],
    folder: Path,
    leg_is_over: LegIsOver,
    max_legs: int | None = None,
    grace_seconds: float = 60.0,
) -> Legs:
    """Trains a recipe into `folder`, leg after leg; a complete run is left alone.

    Args:
        leg_is_over: asked twice a second; then the run is told to save and leave.
        max_legs: return after so many, finished or not; None: continue to the end.
        grace_seconds: how long saving may take before the leg is killed.

    Raises:
        ValueError: training failed, or two legs in a row ended before they could train.
    """
    command = [sys.executable, "-m", "spikingformer", "train", recipe, *overrides, "--output", str(folder), "--resume"]
    legs, idle = 0, 0
    while not is_finished(folder) and (max_legs is None or legs < max_legs):
        legs += 1
        before = _position(folder)
        status = _run_leg(command, folder, leg_is_over, grace_seconds)
        if status not in (0, SAVED_AND_LEFT, -signal.SIGTERM):
            raise ValueError(f"training ended with status {status} in leg {legs}: {' '.join(command)}")
        idle = idle + 1 if _position(folder) == before else 0
        if idle == 2 and not is_finished(folder):
            raise ValueError(f"two legs in a row trained nothing in {folder}: make the legs longer")
    return Legs(is_finished(folder), legs)


def _run_leg(command: list[str], folder: Path, leg_is_over: LegIsOver, grace_seconds: float) -> int:
    began = time.monotonic()
    process = subprocess.Popen(command)
    try:
        while True:
            try:
                return process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                if leg_is_over(time.monotonic() - began, folder):
                    break
        process.send_signal(signal.SIGTERM)
        return process.wait(timeout=grace_seconds)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _position(folder: Path) -> int:
    """Optimiser steps done, -1 before the first checkpoint."""
    from spikingformer.training.state import load_state

    state, _ = load_state(folder)
    return -1 if state is None else state.progress.global_step
