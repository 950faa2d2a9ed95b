"""Damaged files of every kind: a clear error or valid events; never a crash, a hang or memory out of proportion."""

from __future__ import annotations

import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from spikingformer.data.events import (
    EVENT_DTYPE,
    EventFileError,
    read_aedat20,
    read_aedat31,
    read_nmnist,
    write_aedat20,
    write_aedat31,
    write_nmnist,
)
from spikingformer.data.events.frames import events_to_frames
from spikingformer.data.events.gesture_trials import read_trials
from spikingformer.data.events.recording import read_recording
from tests.data.events.event_recordings import random_events

FILE_EVENTS = 300
SECONDS, MEMORY = 1.0, 4 << 20  # a file here has 1.5 to 3 kB; the frames below take 2 MB


def mutate(data: bytes, draw: np.random.Generator) -> bytes:
    """One to four random damages."""
    for _ in range(draw.integers(1, 5)):
        raw = bytearray(data)
        at = int(draw.integers(0, max(1, len(raw))))
        kind = draw.integers(0, 12)
        if kind == 0:  # cut off
            raw = raw[:at]
        elif kind == 1:  # bits flipped
            for i in draw.integers(0, max(1, len(raw)), 8):
                if i < len(raw):
                    raw[i] ^= 1 << int(draw.integers(0, 8))
        elif kind == 2:  # a huge or negative 32-bit number, in either byte order
            number = int(draw.choice([0xFFFFFFFF, 0x80000000, 0x7FFFFFFF, 0x00FFFFFF, 1 << 28]))
            raw[at : at + 4] = number.to_bytes(4, str(draw.choice(["little", "big"])))
        elif kind == 3:  # bytes shuffled
            part = np.frombuffer(bytes(raw[at : at + 64]), np.uint8).copy()
            draw.shuffle(part)
            raw[at : at + 64] = part.tobytes()
        elif kind == 4:  # blocks swapped
            raw = raw[at:] + raw[:at]
        elif kind == 5:  # a piece left out
            del raw[at : at + int(draw.integers(1, 40))]
        elif kind == 6:  # random bytes put in
            raw[at:at] = draw.bytes(int(draw.integers(1, 40)))
        elif kind == 7:  # a piece twice
            raw[at:at] = raw[at : at + 200]
        elif kind == 8:  # another header
            headers = [
                b"#!AER-DAT2.0\r\n",
                b"#!AER-DAT3.1\r\n",
                b"#!AER-DAT4.0\r\n",
                b"#!END-HEADER\r\n",
                b"#",
                b"GIF89a",
            ]
            raw[0 : int(draw.integers(0, 40))] = headers[draw.integers(0, len(headers))]
        elif kind == 9:  # zeros
            raw[at : at + 100] = bytes(len(raw[at : at + 100]))
        elif kind == 10:  # all ones
            raw[at : at + 100] = b"\xff" * len(raw[at : at + 100])
        else:  # in the packet header or the first events, where the counts are
            at = int(draw.integers(0, min(200, max(1, len(raw)))))
            raw[at : at + 1] = bytes([int(draw.integers(0, 256))])
        data = bytes(raw)
    return data


def check_events(events: np.ndarray, size: tuple[int, int] = (128, 128)) -> None:
    assert events.dtype == EVENT_DTYPE
    assert (np.diff(events["t"]) >= 0).all()
    if len(events):
        assert events["t"][0] >= 0
        assert events["p"].max() <= 1
    assert events_to_frames(events, 4, "time", size).sum() == len(events)


def aedat20(path: Path) -> None:
    check_events(read_aedat20(path))


def aedat31(path: Path) -> None:
    check_events(read_aedat31(path))


def aedat31_cut(path: Path) -> None:
    check_events(read_aedat31(path, truncated="keep"))


def nmnist(path: Path) -> None:
    check_events(read_nmnist(path), (34, 34))


def any_recording(path: Path) -> None:
    check_events(*read_recording(path))


def trials(path: Path) -> None:
    for trial in read_trials(path):
        assert 0 <= trial.label < 11
        assert 0 <= trial.start_us < trial.end_us


def _write_trials(path: Path) -> None:
    path.write_text("class,startTime_usec,endTime_usec\n" + "".join(f"{c},{c}000000,{c}900000\n" for c in range(1, 12)))


EVENTS = random_events(FILE_EVENTS, start_us=10**6)
SMALL_EVENTS = random_events(FILE_EVENTS, height=34, width=34, span_us=300_000)
READERS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    "aedat20": (lambda path: write_aedat20(path, EVENTS), aedat20),
    "aedat31": (lambda path: write_aedat31(path, EVENTS, packet_events=50), aedat31),
    "aedat31 keeping what precedes a cut": (lambda path: write_aedat31(path, EVENTS, packet_events=50), aedat31_cut),
    "nmnist": (lambda path: write_nmnist(path, SMALL_EVENTS), nmnist),
    "any recording": (lambda path: write_aedat31(path, EVENTS), any_recording),
    "label file": (_write_trials, trials),
}


def read_mutants(reader: str, count: int, folder: Path, seed: int = 0) -> Counter[str]:
    """Outcomes of `count` mutated files: "read" or "refused"."""
    write, read = READERS[reader]
    path = folder / "recording.aedat"
    write(path)
    read(path)  # the file before any damage is right
    whole, draw = path.read_bytes(), np.random.default_rng(seed)
    outcomes: Counter[str] = Counter()
    tracemalloc.start()
    try:
        for i in range(count):
            path.write_bytes(mutate(whole, draw))
            tracemalloc.reset_peak()
            before, start = tracemalloc.get_traced_memory()[0], time.process_time()
            try:
                read(path)
                outcomes["read"] += 1
            except EventFileError as error:
                outcomes["refused"] += 1
                text = str(error)
            else:
                text = str(path)
            assert str(path) in text
            assert len(text) < 600
            assert time.process_time() - start < SECONDS, f"mutant {i} took too long"
            used = tracemalloc.get_traced_memory()[1] - before
            assert used < MEMORY, f"mutant {i} took {used} bytes"
    finally:
        tracemalloc.stop()
    return outcomes


@pytest.mark.parametrize("reader", READERS)
def test_mutated_files(reader: str, tmp_path: Path) -> None:
    outcomes = read_mutants(reader, 300, tmp_path)
    assert outcomes["refused"] > 30  # the damage is real


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_ten_thousand_mutated_files(reader: str, tmp_path: Path) -> None:
    print(reader, dict(read_mutants(reader, 10_000, tmp_path, seed=1)))
