"""Events to frames: counts of events for each time slice, polarity and pixel, as the published results use them.

T frames, H rows, W columns; channel 0 = OFF, 1 = ON. Raw counts: no clipping, no normalising.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .arrays import SensorSize, as_whole_number, check_sensor_size

SplitBy = Literal["number", "time"]
DECODER_VERSION = 1  # part of every cache key: raise it whenever a reader or this file gives other frames

_MAX_CELLS = 1 << 29  # T * 2 * H * W of one recording: 4 GiB of counts while they are summed


def slice_index(t: NDArray[np.int64], time_steps: int, split_by: SplitBy) -> NDArray[np.int64]:
    """Frame number 0..T-1 of each event; t are its times in us, sorted.

    number  d = N // T; frame i takes events i*d .. (i+1)*d, the last one also the remainder (N < T: all of them)
    time    d = (t[-1] - t[0]) // T; frame i takes t0 + i*d <= t < t0 + (i+1)*d, the last one runs to the end
            (d = 0, a recording shorter than T us: all events go to the last frame)
    """
    if split_by == "number":
        per_frame = len(t) // time_steps
        position = np.arange(len(t), dtype=np.int64)
    elif split_by == "time":
        per_frame = int(t[-1] - t[0]) // time_steps if len(t) else 0
        position = t - t[0] if len(t) else t
    else:
        raise ValueError(f"split_by is {split_by!r}; expected 'number' or 'time'.")
    if per_frame == 0:
        return np.full(len(t), time_steps - 1, np.int64)
    return np.minimum(position // per_frame, time_steps - 1)


def events_to_frames(
    events: NDArray[np.void],
    time_steps: int,
    split_by: SplitBy = "number",
    sensor_size: SensorSize = (128, 128),
    frame_size: SensorSize | None = None,
) -> NDArray[np.int64]:
    """Counts [T, 2, H, W] of sorted `events`.

    time_steps   T, at least 1. Without events all frames are empty.
    split_by     "number" (equally many events a frame) or "time" (equally long frames)
    sensor_size  (height, width) of the camera
    frame_size   (H, W) of the frames, at most the sensor's; None = the sensor's. Pixels that share a cell are summed.
    Raises ValueError for an event outside the sensor, a bad T or size, and frames too large to count.
    """
    height, width = check_sensor_size(sensor_size)
    rows, columns = check_sensor_size(frame_size, "frame_size") if frame_size is not None else (height, width)
    if rows > height or columns > width:
        raise ValueError(
            f"frame_size {(rows, columns)} is larger than the sensor {(height, width)}; expected at most that."
        )
    steps = as_whole_number(time_steps)
    if steps is None or steps < 1:
        raise ValueError(f"time_steps is {time_steps!r}; expected a whole number of at least 1.")
    cells = steps * 2 * rows * columns
    if cells > _MAX_CELLS:
        raise ValueError(f"{steps} frames of 2x{rows}x{columns} have {cells} cells; at most {_MAX_CELLS} are allowed.")
    x, y = events["x"].astype(np.int64), events["y"].astype(np.int64)
    if len(x) and (x.min() < 0 or y.min() < 0 or x.max() >= width or y.max() >= height):
        raise ValueError(
            f"events reach x {x.min()}..{x.max()}, y {y.min()}..{y.max()}, outside the {width}x{height} sensor: "
            "pass the sensor_size of the camera."
        )
    if (rows, columns) != (height, width):
        x, y = x * columns // width, y * rows // height
    cell = slice_index(events["t"], steps, split_by)
    cell = ((cell * 2 + events["p"]) * rows + y) * columns + x
    return np.bincount(cell, minlength=cells).reshape(steps, 2, rows, columns)


def compact(frames: NDArray[np.int64]) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """The same counts as uint8 if every one fits, else as uint16; ValueError above 65535."""
    highest = int(frames.max()) if frames.size else 0
    if highest <= 255:
        return frames.astype(np.uint8)
    if highest <= 65535:
        return frames.astype(np.uint16)
    raise ValueError(f"a pixel has {highest} events in one frame; at most 65535 fit. Use more time steps.")
