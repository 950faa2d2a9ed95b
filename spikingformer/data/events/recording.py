"""One raw recording of any format here: found out by its content, cut to a time span, turned into model input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from .aedat20 import read_aedat20
from .aedat31 import read_aedat31
from .arrays import EventFileError, SensorSize, crop_time
from .frames import SplitBy, events_to_frames
from .nmnist_bin import NMNIST_SUFFIXES, read_nmnist
from .simulate import SIMULATED


def read_recording(path: str | Path, sensor_size: SensorSize | None = None) -> tuple[NDArray[np.void], SensorSize]:
    """(events, sensor size (height, width)) of an AEDAT 2.0, AEDAT 3.1, N-MNIST .bin or .bs2 file.

    sensor_size  None: 128x128 for AEDAT; for the 5-byte formats 34x34 if all events lie inside, else 128x128
    Raises EventFileError.
    """
    path = Path(path)
    if path.suffix.lower() in NMNIST_SUFFIXES:
        if sensor_size:
            return read_nmnist(path, sensor_size), sensor_size
        events = read_nmnist(path, (128, 128))
        inside = not len(events) or max(int(events["x"].max()), int(events["y"].max())) < 34
        return events, (34, 34) if inside else (128, 128)
    try:
        with path.open("rb") as file:
            start = file.read(12)
    except OSError as error:
        raise EventFileError(path, f"cannot be read ({error.strerror}).", "Check the path.") from None
    if start == b"#!AER-DAT3.1":
        return read_aedat31(path, sensor_size or (128, 128)), sensor_size or (128, 128)
    if start == b"#!AER-DAT2.0":
        return read_aedat20(path), (128, 128)
    raise EventFileError(
        path,
        f"starts with {start!r}." if start else "is empty (0 bytes).",
        "Expected AEDAT 2.0 or 3.1 (#!AER-DAT...), or a name that ends with .bin or .bs2.",
    )


def is_simulated(path: str | Path) -> bool:
    """True if the file's header says that no camera took the recording."""
    with Path(path).open("rb") as file:
        return SIMULATED.encode() in file.read(4096)


def load_recording_as_frames(
    path: str | Path,
    time_steps: int,
    split_by: SplitBy = "number",
    frame_size: SensorSize | None = None,
    sensor_size: SensorSize | None = None,
    start_us: int | None = None,
    end_us: int | None = None,
) -> tuple[torch.Tensor, float]:
    """A recording as model input, [1, T, 2, H, W] float32 counts; and the seconds from its first to its last event.

    frame_size        (H, W) the model was trained with; None: the sensor's
    start_us, end_us  only the events with start_us <= t < end_us (None: from the first, to the last)
    Raises EventFileError for a damaged file or a time span without events.
    """
    events, size = read_recording(path, sensor_size)
    events = cut(events, start_us, end_us, path)
    frames = events_to_frames(events, time_steps, split_by, size, frame_size)
    return torch.from_numpy(frames).float()[None], int(events["t"][-1] - events["t"][0]) / 1e6


def cut(events: NDArray[np.void], start_us: int | None, end_us: int | None, path: str | Path) -> NDArray[np.void]:
    """Events of start_us <= t < end_us; EventFileError that states the recording's span if there are none."""
    if not len(events):
        raise EventFileError(path, "holds no events.")
    first, last = int(events["t"][0]), int(events["t"][-1])
    chosen = crop_time(events, first if start_us is None else start_us, last + 1 if end_us is None else end_us)
    if not len(chosen):
        raise EventFileError(path, f"has no events from {start_us} to {end_us} us.", f"It spans {first} to {last} us.")
    return chosen
