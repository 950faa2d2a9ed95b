"""The 5-byte event of N-MNIST (.bin) and of SLAYER's samples (.bs2): big-endian u8 x, u8 y, 1 bit p, 23 bits t in us.

An event in row 240 is not a pixel: the ATIS camera writes it when its 13-bit clock wraps; later times grow by 8192 us.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .arrays import (
    EVENT_DTYPE,
    EventFileError,
    SensorSize,
    check_on_sensor,
    check_sensor_size,
    check_writable,
    read_bytes,
    sort_by_time,
)

NMNIST_SUFFIXES = (".bin", ".bs2")
_EVENT_BYTES = 5
_OVERFLOW_ROW = 240
_OVERFLOW_US = 1 << 13


def read_nmnist(path: str | Path, sensor_size: SensorSize = (34, 34)) -> NDArray[np.void]:
    """Events of an N-MNIST .bin or a SLAYER .bs2 file, sorted by time (stably).

    sensor_size  (height, width): (34, 34) for N-MNIST, (128, 128) for the .bs2 samples of DVS128 Gesture
    Raises EventFileError if the size is not a multiple of 5 bytes or an event lies outside the sensor.
    """
    check_sensor_size(sensor_size)
    data = read_bytes(path)
    if len(data) % _EVENT_BYTES:
        raise EventFileError(path, f"has {len(data)} bytes, not a multiple of {_EVENT_BYTES}: it was cut off.")
    raw = np.frombuffer(data, np.uint8).reshape(-1, _EVENT_BYTES)
    events = np.zeros(len(raw), EVENT_DTYPE)
    events["x"], events["y"] = raw[:, 0], raw[:, 1]
    events["p"] = raw[:, 2] >> 7
    events["t"] = (raw[:, 2].astype(np.int64) & 127) << 16 | raw[:, 3].astype(np.int64) << 8 | raw[:, 4]
    overflow = raw[:, 1] == _OVERFLOW_ROW
    if sensor_size[0] <= _OVERFLOW_ROW and overflow.any():
        events["t"] += np.cumsum(overflow) * _OVERFLOW_US
        events = events[~overflow]
    check_on_sensor(events, sensor_size, path)
    return sort_by_time(events)


def write_nmnist(path: str | Path, events: NDArray[np.void]) -> None:
    """Write `events` (sorted, x 0..255, y 0..239, t in 0..2^23-1 us) so that read_nmnist gives them back.

    Raises ValueError if an event does not fit the format.
    """
    check_writable(events, {"x": 255, "y": _OVERFLOW_ROW - 1, "p": 1, "t": 2**23 - 1}, "the N-MNIST format")
    raw = np.zeros((len(events), _EVENT_BYTES), np.uint8)
    raw[:, 0], raw[:, 1] = events["x"], events["y"]
    raw[:, 2] = events["p"].astype(np.int64) << 7 | events["t"] >> 16
    raw[:, 3] = events["t"] >> 8 & 255
    raw[:, 4] = events["t"] & 255
    Path(path).write_bytes(raw.tobytes())
