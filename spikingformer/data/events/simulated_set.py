"""Pictures -> a folder of simulated recordings in the official CIFAR10-DVS layout, marked as simulated everywhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch

from spikingformer.files import replacing, write_atomic

from .aedat20 import write_aedat20
from .simulate import SIMULATED, SIMULATED_FILE, SensorModel, simulate

_BATCH = 16
_CIFAR10DVS = SensorModel()


def write_simulated_set(
    pictures: torch.Tensor,
    labels: list[int],
    class_names: tuple[str, ...],
    folder: Path,
    seed: int = 0,
    model: SensorModel = _CIFAR10DVS,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write folder/CLASS/cifar10_CLASS_NUMBER.aedat for every picture, and SIMULATED.txt; the number of events.

    pictures  [N, h, w] grey, 0 to 1; labels N numbers; number i of a class is its i-th picture
    Files that are there already are left alone, so that a killed run can be run again. Raises ValueError if the
    folder holds recordings that are not marked as simulated, or a class name is not a plain file name.
    """
    for name in class_names:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ValueError(f"class name {name!r} is not a plain file name: use letters, digits, '_' and '-'.")
    note = folder / SIMULATED_FILE
    if folder.is_dir() and not note.exists() and any(folder.rglob("*.aedat")):
        raise ValueError(f"{folder} holds recordings that are not marked as simulated: choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    warning = f"{SIMULATED}. Never compare results on these files with results on CIFAR10-DVS.\n"
    write_atomic(note, warning.encode())
    seen = [0] * len(class_names)
    jobs: list[tuple[int, Path]] = []
    for i, label in enumerate(labels):
        name = class_names[label]
        path = folder / name / f"cifar10_{name}_{seen[label]}.aedat"
        seen[label] += 1
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            jobs.append((i, path))
    total = 0
    for start in range(0, len(jobs), _BATCH):
        chunk = jobs[start : start + _BATCH]
        chosen = [i for i, _ in chunk]
        recordings = simulate(pictures[chosen], [seed * 1_000_003 + i for i in chosen], model)
        for (_, path), events in zip(chunk, recordings, strict=True):
            with replacing(path, durable=False) as partial:
                write_aedat20(partial, events, [f" {SIMULATED}"])
            total += len(events)
        if progress:
            progress(start + len(chunk), len(jobs))
    return total
