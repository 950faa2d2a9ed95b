"""Reads events in pieces from a file, a pipe or a looped recording, and holds only one piece in memory."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from spikingformer.data.events import EventFileError, read_aedat20, sort_by_time
from spikingformer.data.events.aedat31 import END_HEADER, PACKET_HEADER, RECORD, decode_records, packet_header

from .stream import Events

_LARGEST_PACKET = 1 << 28  # bytes; a larger one is damage
_LONGEST_HEADER_LINE = 1 << 16


def event_chunks(source: str | Path) -> Iterator[Events]:
    """Sorted events of a recording in pieces: AEDAT 3.1 from a file or, for "-", from standard input as it arrives;
    AEDAT 2.0 from a file. Raises EventFileError, a ValueError, for another format and for a damaged recording."""
    if str(source) == "-":
        yield from aedat31_chunks(sys.stdin.buffer, "standard input")
        return
    path = Path(source)
    try:
        file = path.open("rb")
    except OSError as error:
        raise EventFileError(path, f"cannot be read ({error.strerror}).", "Check the path.") from None
    with file:
        version = file.read(12)
        file.seek(0)
        if version == b"#!AER-DAT2.0":
            yield read_aedat20(path)
        else:
            yield from aedat31_chunks(file, str(path))


def aedat31_chunks(file: BinaryIO, name: str) -> Iterator[Events]:
    """The polarity packets of an AEDAT 3.1 stream, one piece each. Raises EventFileError if it is damaged."""
    offset = _skip_header(file, name)
    while header := _read(file, PACKET_HEADER.size, name, whole_or_nothing=True):
        packet = packet_header(header, offset, name)
        if packet.body_bytes > _LARGEST_PACKET:
            raise EventFileError(name, f"has a packet of {packet.body_bytes} bytes at byte {offset}: too large.")
        body = _read(file, packet.body_bytes, name)
        if packet.events:
            yield sort_by_time(decode_records(np.frombuffer(body, RECORD, packet.events), packet.overflow, name))
        offset += len(header) + len(body)


def looped(events: Events, seconds: float) -> Iterator[Events]:
    """A recording repeated with continuing times until `seconds` have passed; one piece per repetition."""
    if not len(events):
        raise ValueError("the recording has no events to loop")
    if not 0 < seconds < math.inf:
        raise ValueError(f"a recording can be looped for more than 0 seconds, got {seconds}")
    first, length = int(events["t"][0]), int(events["t"][-1] - events["t"][0]) + 1
    end = first + round(seconds * 1e6)
    shift = 0
    while first + shift < end:
        round_ = events.copy()
        round_["t"] += shift
        yield round_[: int(np.searchsorted(round_["t"], end))]
        shift += length


def _skip_header(file: BinaryIO, name: str) -> int:
    """Reads the text before the packets; returns its length in bytes."""
    line = file.readline(_LONGEST_HEADER_LINE)
    if not line.startswith(b"#!AER-DAT3.1"):
        raise EventFileError(
            name,
            f"starts with {line[:16]!r}, not with '#!AER-DAT3.1'.",
            "Streams are AEDAT 3.1; AEDAT 2.0 can be given as a file.",
        )
    length = len(line)
    while line.rstrip(b"\r\n") != END_HEADER:
        line = file.readline(_LONGEST_HEADER_LINE)
        length += len(line)
        if not line.startswith(b"#"):
            raise EventFileError(name, f"has no {END_HEADER.decode()!r} line.")
    return length


def _read(file: BinaryIO, count: int, name: str, whole_or_nothing: bool = False) -> bytes:
    """Exactly `count` bytes, or b"" at the end of the file with `whole_or_nothing`."""
    parts, left = [], count
    while left and (part := file.read(left)):
        parts.append(part)
        left -= len(part)
    data = b"".join(parts)
    if left and (data or not whole_or_nothing):
        raise EventFileError(name, f"ends {left} bytes before the end of a packet: it was cut off.")
    return data
