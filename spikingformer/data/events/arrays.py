"""Events as one structured numpy array: what every reader returns and every other module takes.

x, y  pixel column and row, int16, origin top left of an upright picture
t     time in microseconds, int64, not decreasing
p     polarity, uint8: 1 = ON (brighter), 0 = OFF (darker)
"""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

# 16 bytes an event with t first in memory, so that every field is aligned; the names keep the order x, y, t, p.
EVENT_DTYPE = np.dtype(
    {
        "names": ["x", "y", "t", "p"],
        "formats": ["<i2", "<i2", "<i8", "u1"],
        "offsets": [8, 10, 0, 12],
        "itemsize": 16,
    }
)

SensorSize = tuple[int, int]  # (height, width) in pixels


class EventFileError(ValueError):
    """A recording or a label file is not what its format says: names the file, what was read and what to do."""

    def __init__(self, path: str | Path, problem: str, advice: str = "") -> None:
        self.path = str(path)
        self.problem = problem
        self.advice = advice or "The file is damaged or of another format: get it again and check its checksum."
        super().__init__(f"{path}: {problem} {self.advice}")

    def __reduce__(self) -> tuple[type[EventFileError], tuple[str, str, str]]:
        return type(self), (self.path, self.problem, self.advice)  # so that it crosses process borders


def make_events(x: ArrayLike, y: ArrayLike, t: ArrayLike, p: ArrayLike) -> NDArray[np.void]:
    """Four equally long sequences -> one structured array of EVENT_DTYPE (no checks, no sorting)."""
    t = np.asarray(t)
    events = np.zeros(t.shape, EVENT_DTYPE)
    events["x"], events["y"], events["t"], events["p"] = x, y, t, p
    return events


def sort_by_time(events: NDArray[np.void]) -> NDArray[np.void]:
    """Order by time, events of the same microsecond staying in file order; the same array if it is sorted already."""
    t = events["t"]
    if len(t) < 2 or bool(np.all(t[1:] >= t[:-1])):
        return events
    return events[np.argsort(t, kind="stable")]


def as_whole_number(value: Any) -> int | None:
    """`value` as an int if it is a whole number, of Python or NumPy; else None. A bool is none."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_sensor_size(sensor_size: SensorSize, name: str = "sensor_size") -> SensorSize:
    """(height, width) as two ints of 1..32768, or ValueError, which calls it `name`."""
    sides = [as_whole_number(n) or 0 for n in sensor_size]
    if len(sides) != 2 or not all(1 <= side <= 32768 for side in sides):
        raise ValueError(f"{name} is {sensor_size!r}; expected (height, width), two whole numbers of 1 to 32768.")
    return sides[0], sides[1]


def check_on_sensor(events: NDArray[np.void], sensor_size: SensorSize, path: str | Path) -> None:
    """Raise EventFileError unless every event lies on a sensor of (height, width)."""
    height, width = check_sensor_size(sensor_size)
    if not len(events):
        return
    x, y = events["x"], events["y"]
    if int(x.min()) < 0 or int(y.min()) < 0 or int(x.max()) >= width or int(y.max()) >= height:
        outside = int(np.count_nonzero((x < 0) | (x >= width) | (y < 0) | (y >= height)))
        raise EventFileError(
            path,
            f"{outside} of {len(events)} events lie outside the {width}x{height} sensor "
            f"(x {x.min()}..{x.max()}, y {y.min()}..{y.max()}).",
            "Pass sensor_size=(height, width) if the recording comes from another camera; otherwise it is damaged.",
        )


def crop_time(events: NDArray[np.void], start_us: int, end_us: int) -> NDArray[np.void]:
    """The events with start_us <= t < end_us (a view; events are sorted by time)."""
    start, end = np.searchsorted(events["t"], [start_us, end_us], side="left")
    return events[start:end]


def read_bytes(path: str | Path) -> bytes:
    """The whole file; a missing file, a folder or an unreadable file is an EventFileError."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise EventFileError(path, f"cannot be read ({error.strerror}).", "Check the path.") from None


def check_writable(events: NDArray[np.void], highest: dict[str, int], format_name: str) -> None:
    """Raise ValueError unless each field of `events` lies in 0..highest[field] and t does not decrease."""
    if events.dtype.names != EVENT_DTYPE.names:
        raise ValueError(f"events have the fields {events.dtype.names}; {format_name} needs x, y, t, p (make_events).")
    for field, limit in highest.items():
        values = events[field]
        if len(values) and (int(values.min()) < 0 or int(values.max()) > limit):
            raise ValueError(
                f"{field} spans {values.min()}..{values.max()}, but {format_name} can hold 0..{limit}. "
                "Crop or shift the events first."
            )
    if len(events) > 1 and bool(np.any(np.diff(events["t"]) < 0)):
        raise ValueError("events are not sorted by time: pass sort_by_time(events).")
