"""AEDAT 2.0 as the DVS128 of CIFAR10-DVS wrote it (jAER): big-endian records of u32 address, u32 time in us.

Address bits: 0 polarity, 1-7 column, 8-14 row, 15 external (a trigger, not a pixel). The header has no end marker.
Decoded as the published results do: x = 127 - row, y = 127 - column, p = 1 - polarity, an upright picture with ON = 1.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .arrays import EVENT_DTYPE, EventFileError, check_writable, read_bytes, sort_by_time
from .headers import header_lines, split_header

_RECORD = np.dtype([("address", ">u4"), ("t", ">u4")])
_EXTERNAL_BIT = 1 << 15
_SENSOR_MAX = 127  # the address holds seven bits of column and of row


def read_aedat20(path: str | Path) -> NDArray[np.void]:
    """Events of an AEDAT 2.0 recording of a 128x128 DVS, sorted by time (stably).

    External (trigger) records are dropped. Raises EventFileError if the header is of another format, if the data are
    not a whole number of records, or if an address has bits that a DVS128 does not use.
    """
    data = read_bytes(path)
    _, offset = split_header(data, path, "2.0", end_line=None)
    size = len(data) - offset
    if size % _RECORD.itemsize:
        raise EventFileError(
            path, f"has {size} bytes of events, not a multiple of {_RECORD.itemsize}: it was cut off or is damaged."
        )
    records = np.frombuffer(data, _RECORD, offset=offset)
    address = records["address"].astype(np.uint32)
    if len(address) and int(address.max()) >= 2 * _EXTERNAL_BIT:
        raise EventFileError(
            path,
            f"has the address 0x{int(address.max()):08x}; a DVS128 uses 16 bits (0x0000ffff at most).",
            "It is damaged, or a recording of another camera than the DVS128.",
        )
    time = records["t"]
    external = address & _EXTERNAL_BIT != 0
    if external.any():
        address, time = address[~external], time[~external]
    events = np.zeros(len(address), EVENT_DTYPE)
    events["x"] = _SENSOR_MAX - ((address >> 8) & 127)
    events["y"] = _SENSOR_MAX - ((address >> 1) & 127)
    events["p"] = 1 - (address & 1)
    events["t"] = time
    return sort_by_time(events)


def write_aedat20(path: str | Path, events: NDArray[np.void], comments: list[str] | None = None) -> None:
    """Write `events` (128x128, sorted, t in 0..2^32-1) so that read_aedat20 gives them back.

    comments  header lines after the version line, without the '#'
    Raises ValueError if an event does not fit the format.
    """
    check_writable(events, {"x": _SENSOR_MAX, "y": _SENSOR_MAX, "p": 1, "t": 2**32 - 1}, "AEDAT 2.0 of a DVS128")
    records = np.zeros(len(events), _RECORD)
    row, column = _SENSOR_MAX - events["x"].astype(np.uint32), _SENSOR_MAX - events["y"].astype(np.uint32)
    records["address"] = row << 8 | column << 1 | (1 - events["p"].astype(np.uint32))
    records["t"] = events["t"]
    standard = [" Data format is int32 address, int32 timestamp (8 bytes total), repeated for each event"]
    header = header_lines("2.0", [*standard, *(comments or [])])
    Path(path).write_bytes(header + records.tobytes())
