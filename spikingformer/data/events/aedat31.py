"""AEDAT 3.1 as DVS128 Gesture uses it: an ASCII header ended by '#!END-HEADER', then little-endian packets.

Packet header, 28 bytes: u16 type (1 = polarity), u16 source, u32 event size (8), u32 time offset (4),
u32 time overflow, u32 capacity, u32 number, u32 valid;
then capacity * size bytes, of which the first `number` events count.
Polarity event: u32 data (bit 0 valid, bit 1 polarity, 2-16 y, 17-31 x), u32 time in us, of which 31 bits count.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Literal, NamedTuple

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
from .headers import header_lines, split_header

END_HEADER = b"#!END-HEADER"
PACKET_HEADER = struct.Struct("<HHIIIIII")
POLARITY, EVENT_BYTES, TIME_OFFSET = 1, 8, 4
RECORD = np.dtype([("data", "<u4"), ("t", "<u4")])


class PacketHeader(NamedTuple):
    """What counts of a packet's header."""

    events: int  # polarity events; 0 in a packet of another type
    event_bytes: int
    body_bytes: int  # after the header; the events come first
    overflow: int


class _Packets(NamedTuple):
    """Polarity packets in file order: where the events start, how many, and the time overflow counter."""

    starts: list[int]
    counts: list[int]
    overflows: list[int]


def read_aedat31(
    path: str | Path,
    sensor_size: SensorSize = (128, 128),
    truncated: Literal["error", "keep"] = "error",
) -> NDArray[np.void]:
    """Valid polarity events of an AEDAT 3.1 recording, sorted by time (stably).

    sensor_size  (height, width); an event outside it is an error
    truncated    a file that ends inside a packet: "error", or "keep" the whole events before the cut
    Raises EventFileError for a wrong header, impossible packet sizes, times with the sign bit set, or a cut-off file.
    """
    check_sensor_size(sensor_size)
    data = read_bytes(path)
    _, offset = split_header(data, path, "3.1", end_line=END_HEADER)
    packets = _walk_packets(data, offset, path, keep_truncated=truncated == "keep")
    view = memoryview(data)
    chunks = [view[a : a + n * EVENT_BYTES] for a, n in zip(packets.starts, packets.counts, strict=True)]
    records = np.frombuffer(b"".join(chunks), RECORD)
    overflows = np.repeat(np.array(packets.overflows, np.int64), packets.counts) if any(packets.overflows) else 0
    events = decode_records(records, overflows, path)
    check_on_sensor(events, sensor_size, path)
    return sort_by_time(events)


def decode_records(records: NDArray[np.void], overflow: int | NDArray[np.int64], path: str | Path) -> NDArray[np.void]:
    """The valid events among polarity records, in file order.

    overflow  the time overflow of their packets, one for all or one each
    Raises EventFileError for a valid event's time with the sign bit set.
    """
    valid = (records["data"] & 1).astype(bool)
    if not valid.all():
        records = records[valid]
        overflow = overflow[valid] if isinstance(overflow, np.ndarray) else overflow
    word, time = records["data"], records["t"]
    if len(time) and int(time.max()) >> 31:
        raise EventFileError(path, f"has the event time {int(time.max())} us; 31 bits are allowed (2147483647).")
    events = np.zeros(len(records), EVENT_DTYPE)
    events["x"] = (word >> 17) & 0x7FFF
    events["y"] = (word >> 2) & 0x7FFF
    events["p"] = (word >> 1) & 1
    events["t"] = time
    if np.any(overflow):
        events["t"] |= np.asarray(overflow, np.int64) << 31
    return events


def packet_header(header: bytes, offset: int, path: str | Path) -> PacketHeader:
    """The PACKET_HEADER.size bytes at `offset` of a file. Raises EventFileError where no such packet can be."""
    kind, _, size, time_offset, overflow, capacity, number, valid = PACKET_HEADER.unpack(header)
    sized = 0 < size <= 1 << 28 or (kind != POLARITY and size == capacity == 0)
    if not sized or number > capacity or valid > number or not any(header):
        raise EventFileError(
            path,
            f"has an impossible packet at byte {offset}: type {kind}, {size} bytes an event, "
            f"capacity {capacity}, number {number}, valid {valid}.",
        )
    if kind != POLARITY:
        number = 0
    if number and (size != EVENT_BYTES or time_offset != TIME_OFFSET):
        raise EventFileError(
            path,
            f"has polarity events of {size} bytes with the time at byte {time_offset} "
            f"(packet at byte {offset}); expected {EVENT_BYTES} and {TIME_OFFSET}.",
        )
    if number and overflow >> 31:
        raise EventFileError(path, f"has the time overflow {overflow} in the packet at byte {offset}.")
    return PacketHeader(number, size, capacity * size, overflow)


def _walk_packets(data: bytes, offset: int, path: str | Path, keep_truncated: bool) -> _Packets:
    packets = _Packets([], [], [])
    total = len(data)
    while offset < total:
        start = offset + PACKET_HEADER.size
        if start > total:
            if keep_truncated:
                break
            raise EventFileError(path, f"ends inside a packet header at byte {offset} of {total}: it was cut off.")
        packet = packet_header(data[offset:start], offset, path)
        events, end = packet.events, start + packet.body_bytes
        if end > total:
            if not keep_truncated:
                raise EventFileError(
                    path, f"ends at byte {total} inside a packet that should run to byte {end}: it was cut off."
                )
            events = min(events, (total - start) // packet.event_bytes)
        if events:
            packets.starts.append(start)
            packets.counts.append(events)
            packets.overflows.append(packet.overflow)
        offset = end
    return packets


def write_aedat31(
    path: str | Path,
    events: NDArray[np.void],
    comments: list[str] | None = None,
    packet_events: int = 4096,
) -> None:
    """Write `events` (sorted, x and y below 32768, t of 62 bits at most) so that read_aedat31 gives them back.

    comments       header lines after the version line, without the '#'
    packet_events  events a packet at most; a packet never spans a change of the time overflow
    Raises ValueError if an event does not fit the format.
    """
    check_writable(events, {"x": 0x7FFF, "y": 0x7FFF, "p": 1, "t": 2**62 - 1}, "AEDAT 3.1")
    if packet_events < 1:
        raise ValueError(f"packet_events is {packet_events}; expected at least 1.")
    records = np.zeros(len(events), RECORD)
    x, y, p = (events[name].astype(np.uint32) for name in ("x", "y", "p"))
    records["data"] = x << 17 | y << 2 | p << 1 | 1
    records["t"] = events["t"] & 0x7FFFFFFF
    overflow = events["t"] >> 31
    run_ends = [*(np.flatnonzero(np.diff(overflow)) + 1).tolist(), len(events)]
    parts = [header_lines("3.1", ["Format: RAW", "Source 1: DVS128", *(comments or [])]) + END_HEADER + b"\r\n"]
    start = 0
    for run_end in run_ends:
        while start < run_end:
            end = min(start + packet_events, run_end)
            count = end - start
            turn = int(overflow[start])
            parts.append(PACKET_HEADER.pack(POLARITY, 1, EVENT_BYTES, TIME_OFFSET, turn, count, count, count))
            parts.append(records[start:end].tobytes())
            start = end
    Path(path).write_bytes(b"".join(parts))
