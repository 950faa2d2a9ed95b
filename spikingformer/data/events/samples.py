"""One sample of an event data set: a recording, or a time span of one, with its label; and how it is read."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .aedat20 import read_aedat20
from .aedat31 import read_aedat31
from .arrays import EVENT_DTYPE, SensorSize, crop_time
from .nmnist_bin import read_nmnist


@dataclass(frozen=True)
class EventSample:
    """start_us <= t < end_us of `path` (None: the whole recording) shows class `label`.

    part   "train" or "test"
    group  who or what was recorded ("user01"), so that samples of one group can be kept together; "" if unknown
    """

    path: Path
    label: int
    part: str
    start_us: int | None = None
    end_us: int | None = None
    group: str = ""


def _aedat20(path: Path, sensor_size: SensorSize) -> NDArray[np.void]:
    if sensor_size != (128, 128):
        raise ValueError(f"{path}: AEDAT 2.0 is read for the 128x128 DVS only; got sensor_size {sensor_size}.")
    return read_aedat20(path)


READERS: dict[str, Callable[[Path, SensorSize], NDArray[np.void]]] = {
    "aedat20": _aedat20,
    "aedat31": read_aedat31,
    "nmnist": read_nmnist,
}


def read_samples(
    samples: Iterable[EventSample], reader: str, sensor_size: SensorSize
) -> Iterable[tuple[EventSample, NDArray[np.void]]]:
    """Each sample with its events, sorted by time. A recording that several samples share in a row is read once."""
    last_path: Path | None = None
    recording: NDArray[np.void] = np.zeros(0, EVENT_DTYPE)
    for sample in samples:
        if sample.path != last_path:
            recording, last_path = READERS[reader](sample.path, sensor_size), sample.path
        if sample.start_us is None or sample.end_us is None:
            yield sample, recording
        else:
            yield sample, crop_time(recording, sample.start_us, sample.end_us)


def cut_windows(samples: Iterable[EventSample], window_us: int, stride_us: int) -> list[EventSample]:
    """Each sample with a time span -> windows of `window_us` that start every `stride_us` and lie wholly inside it."""
    windows = []
    for sample in samples:
        if sample.start_us is None or sample.end_us is None:
            raise ValueError(f"{sample.path}: only samples with a time span can be cut into windows.")
        for start in range(sample.start_us, sample.end_us - window_us + 1, stride_us):
            windows.append(EventSample(sample.path, sample.label, sample.part, start, start + window_us, sample.group))
    return windows


_BLOCKS, _BLOCK_BYTES = 16, 4096


def fingerprint(samples: Iterable[EventSample], root: Path) -> str:
    """Twelve hex digits that change with a recording's name, size or looked-at blocks, a label or a time span."""
    digest = 0
    looked_at: dict[Path, tuple[int, int]] = {}
    count = 0
    for sample in samples:
        if sample.path not in looked_at:
            looked_at[sample.path] = _size_and_blocks(sample.path)
        name = sample.path.relative_to(root).as_posix()
        row = (name, *looked_at[sample.path], sample.label, sample.start_us, sample.end_us)
        digest = zlib.crc32(repr(row).encode(), digest)
        count += 1
    return f"{count:04x}{digest:08x}"


def _size_and_blocks(path: Path) -> tuple[int, int]:
    """Bytes, and a checksum of 16 blocks spread evenly from the first byte to the last (of all of a small file)."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size <= _BLOCKS * _BLOCK_BYTES:
            file.seek(0)
            return size, zlib.crc32(file.read())
        digest = 0
        for number in range(_BLOCKS):
            file.seek(round(number * (size - _BLOCK_BYTES) / (_BLOCKS - 1)))
            digest = zlib.crc32(file.read(_BLOCK_BYTES), digest)
        return size, digest
