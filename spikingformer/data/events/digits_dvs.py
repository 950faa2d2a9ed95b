"""digits_dvs: scikit-learn's handwritten digits as simulated event recordings, made in memory in a few seconds.

Simulated: for demonstrations and tests, not for comparison with results on recordings of a camera.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .arrays import SensorSize
from .event_set import EventFrames, EventParts
from .frames import SplitBy, compact, events_to_frames
from .simulate import SensorModel, simulate

TITLE = "digits_dvs (simulated)"
CLASS_NAMES = tuple("0123456789")
CAMERA = SensorModel(sensor_size=(32, 32), amplitude=2.0, loop_us=100_000, loops=1, step_us=2_500)
SPLITS = ("published",)
_BATCH = 256


class DigitRecordings(NamedTuple):
    """All 1,797 recordings, their labels, and how many of them, the first ones, are for training."""

    recordings: list[NDArray[np.void]]
    labels: NDArray[np.int64]
    training: int


@functools.lru_cache(maxsize=1)
def digit_recordings() -> DigitRecordings:
    """Recordings of the training digits, then of the test digits; the division is that of the digits data set."""
    from spikingformer.data.digits import load_digits

    parts = [load_digits(part, 8) for part in ("train", "test")]
    pictures = torch.cat([part.pictures[:, 0] for part in parts]).float() / 255.0
    labels = torch.cat([part.labels for part in parts]).numpy()
    recordings: list[NDArray[np.void]] = []
    for start in range(0, len(pictures), _BATCH):
        chunk = pictures[start : start + _BATCH]
        recordings += simulate(chunk, list(range(start, start + len(chunk))), CAMERA)
    return DigitRecordings(recordings, labels, len(parts[0]))


def load_digits_dvs(
    time_steps: int, split_by: SplitBy = "number", split: str = "published", frame_size: SensorSize | None = None
) -> EventParts:
    """Training (four fifths) and test part as frames [T, 2, 32, 32] or smaller."""
    if split not in SPLITS:
        raise ValueError(f"digits_dvs has no split {split!r}; expected {SPLITS[0]!r}.")
    made = digit_recordings()
    counts = [events_to_frames(r, time_steps, split_by, CAMERA.sensor_size, frame_size) for r in made.recordings]
    frames = compact(np.stack(counts))
    parts = []
    for indices in (np.arange(made.training), np.arange(made.training, len(frames))):
        parts.append(EventFrames([frames], indices, made.labels, TITLE, CLASS_NAMES, simulated=True))
    return EventParts(*parts)
