"""Readers and writers: exact bytes, round trips, the real recordings, and errors that say what to do."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import numpy as np
import pytest

from spikingformer.data.events import (
    EventFileError,
    crop_time,
    make_events,
    read_aedat20,
    read_aedat31,
    read_nmnist,
    write_aedat20,
    write_aedat31,
    write_nmnist,
)
from spikingformer.data.events.gesture_trials import Trial, read_trials
from tests.data.events.event_recordings import random_events

HEADER31 = b"#!AER-DAT3.1\r\n#Format: RAW\r\n#!END-HEADER\r\n"
HEADER20 = b"#!AER-DAT2.0\r\n# made by hand\r\n"


def packet31(words, kind=1, size=8, offset=4, overflow=0, capacity=None, number=None, valid=None):
    number = len(words) if number is None else number
    capacity = len(words) if capacity is None else capacity
    head = struct.pack(
        "<HHIIIIII", kind, 0, size, offset, overflow, capacity, number, number if valid is None else valid
    )
    return head + b"".join(struct.pack("<II", *word) for word in words)


def word31(x, y, p, valid=1):
    return x << 17 | y << 2 | p << 1 | valid


def test_aedat20_bytes_decode_as_published(tmp_path: Path) -> None:
    # row 5, column 100, polarity bit 1 (OFF); then a trigger record, which is no pixel
    records = struct.pack(">II", 5 << 8 | 100 << 1 | 1, 2**32 - 1) + struct.pack(">II", 1 << 15, 7)
    path = tmp_path / "a.aedat"
    path.write_bytes(HEADER20 + records)
    assert read_aedat20(path).tolist() == [(122, 27, 2**32 - 1, 0)]


def test_aedat31_bytes_decode(tmp_path: Path) -> None:
    path = tmp_path / "a.aedat"
    special = packet31([(1, 1), (3, 2)], kind=0) + packet31([(1, 1)], kind=300) + packet31([], kind=7, size=0)
    invalid = word31(4, 8, 0, valid=0), 2**31 + 51  # dropped before anything else of it is looked at
    first = packet31([(word31(3, 7, 1), 50), invalid, (99, 99)], number=2, valid=1)
    late = packet31([(word31(127, 0, 0), 5)], overflow=2)
    path.write_bytes(HEADER31 + special + first + late)
    assert read_aedat31(path).tolist() == [(3, 7, 50, 1), (127, 0, 5 + (2 << 31), 0)]


def test_nmnist_bytes_decode(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(bytes([33, 2, 0x80 | 0x01, 0x02, 0x03, 0, 240, 0, 0, 0, 4, 5, 0x01, 0x02, 0x04]))
    # after the clock-wrap event in row 240 the times grow by 2^13 us
    assert read_nmnist(path).tolist() == [(33, 2, 0x010203, 1), (4, 5, 0x010204 + 8192, 0)]


@pytest.mark.parametrize("count", [0, 1, 2, 4097, 20_001])
def test_round_trips(tmp_path: Path, count: int) -> None:
    events = random_events(count, start_us=2**31 - 500_000)  # across the 31-bit border of AEDAT 3.1
    write_aedat31(tmp_path / "c", events, packet_events=1000)
    np.testing.assert_array_equal(read_aedat31(tmp_path / "c"), events)
    write_aedat20(tmp_path / "b", events, ["# a comment"])
    np.testing.assert_array_equal(read_aedat20(tmp_path / "b"), events)
    small = random_events(count, height=34, width=34, span_us=300_000)
    write_nmnist(tmp_path / "n", small)
    np.testing.assert_array_equal(read_nmnist(tmp_path / "n"), small)


def test_times_that_go_backwards_are_sorted_stably(tmp_path: Path) -> None:
    path = tmp_path / "a"
    stamps = [30, 10, 30, 10]
    path.write_bytes(HEADER20 + b"".join(struct.pack(">II", i << 1, t) for i, t in enumerate(stamps)))
    events = read_aedat20(path)
    assert events["t"].tolist() == [10, 10, 30, 30]
    assert (127 - events["y"]).tolist() == [1, 3, 0, 2]


def test_official_layout_equals_the_raw_samples(real_events_dir: Path) -> None:
    folder = real_events_dir / "dvsgesture"
    recording = read_aedat31(folder / "DvsGesture" / "user01_led.aedat")
    for trial in read_trials(folder / "DvsGesture" / "user01_led_labels.csv"):
        raw = read_nmnist(folder / "slayer_bs2" / f"{trial.label + 1}.bs2", sensor_size=(128, 128))
        events = crop_time(recording, trial.start_us, trial.end_us)
        count = len(events)
        assert count > 20_000
        for field in ("x", "y", "p"):
            np.testing.assert_array_equal(events[field], raw[field][:count])
        np.testing.assert_array_equal(np.diff(events["t"]), np.diff(raw["t"][:count]))


def test_a_genuine_label_file(real_events_dir: Path) -> None:
    trials = read_trials(real_events_dir / "dvsgesture" / "official_user01_natural_labels.csv")
    assert len(trials) == 12
    assert trials[0] == Trial(0, 53036986, 59508469)


def test_aedat31_reads_five_million_events_a_second(tmp_path: Path) -> None:
    events = random_events(1_000_000)
    write_aedat31(tmp_path / "big", events)
    best = min(_seconds(lambda: read_aedat31(tmp_path / "big")) for _ in range(3))
    assert len(events) / best > 5e6  # about 40 M/s when the machine is idle


def _seconds(call) -> float:
    start = time.process_time()  # other jobs on the machine do not count
    call()
    return time.process_time() - start


ERRORS_31 = {
    "empty": (b"", "empty"),
    "other version": (b"#!AER-DAT2.0\r\n", "another version"),
    "no end of header": (b"#!AER-DAT3.1\r\n#Format: RAW\r\n", "no '#!END-HEADER'"),
    "line without end": (b"#!AER-DAT3.1" + b"x" * 50, "without an end"),
    "cut in a packet header": (HEADER31 + b"\x01\x00" * 5, "inside a packet header"),
    "cut in a packet": (HEADER31 + packet31([(1, 1)] * 3)[:-4], "was cut off"),
    "huge capacity": (HEADER31 + packet31([(1, 1)], capacity=2**32 - 1), "was cut off"),
    "number above capacity": (HEADER31 + packet31([(1, 1)], number=2), "impossible packet"),
    "no event size": (HEADER31 + packet31([(1, 1)], size=0), "impossible packet"),
    "zeros where a crash left them": (HEADER31 + packet31([(word31(1, 1, 1), 1)]) + bytes(56), "impossible packet"),
    "odd event size": (HEADER31 + packet31([(1, 1)], size=4, capacity=2, number=2), "polarity events of 4 bytes"),
    "sign bit in a time": (HEADER31 + packet31([(1, 2**31)]), "31 bits"),
    "pixel off the sensor": (HEADER31 + packet31([(word31(128, 0, 1), 2)]), "outside the 128x128 sensor"),
}


@pytest.mark.parametrize("case", ERRORS_31)
def test_aedat31_errors(tmp_path: Path, case: str) -> None:
    data, text = ERRORS_31[case]
    path = tmp_path / "bad.aedat"
    path.write_bytes(data)
    with pytest.raises(EventFileError, match=text) as error:
        read_aedat31(path)
    assert "bad.aedat" in str(error.value)


def test_aedat31_keeps_what_came_before_a_cut_if_asked(tmp_path: Path) -> None:
    path = tmp_path / "cut"
    path.write_bytes(HEADER31 + packet31([(word31(1, 1, 1), 5), (word31(2, 2, 1), 6)])[:-3])
    assert read_aedat31(path, truncated="keep").tolist() == [(1, 1, 5, 1)]


ERRORS_20 = {
    "other version": (b"#!AER-DAT3.1\r\n", "another version"),
    "cut": (HEADER20 + b"\0" * 13, "not a multiple of 8"),
    "other camera": (HEADER20 + struct.pack(">II", 1 << 16, 0), "0x00010000"),
}


@pytest.mark.parametrize("case", ERRORS_20)
def test_aedat20_errors(tmp_path: Path, case: str) -> None:
    data, text = ERRORS_20[case]
    (tmp_path / "bad").write_bytes(data)
    with pytest.raises(EventFileError, match=text):
        read_aedat20(tmp_path / "bad")


def test_nmnist_errors(tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"\0" * 7)
    with pytest.raises(EventFileError, match="not a multiple of 5"):
        read_nmnist(tmp_path / "bad")
    (tmp_path / "bad").write_bytes(bytes([34, 0, 0, 0, 0]))
    with pytest.raises(EventFileError, match="outside the 34x34 sensor"):
        read_nmnist(tmp_path / "bad")


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    for reader in (read_aedat20, read_aedat31, read_nmnist):
        for path in (tmp_path, tmp_path / "none"):
            with pytest.raises(EventFileError, match="cannot be read"):
                reader(path)


@pytest.mark.parametrize(
    ("writer", "event", "text"),
    [
        (write_aedat20, (128, 0, 0, 1), "x spans 128..128"),
        (write_aedat20, (0, 0, -1, 1), "t spans -1..-1"),
        (write_aedat20, (0, 0, 0, 2), "p spans 2..2"),
        (write_aedat31, (0, 0, 2**62, 0), "t spans"),
        (write_nmnist, (0, 240, 0, 0), "y spans 240..240"),
        (write_nmnist, (0, 0, 2**23, 0), "t spans"),
    ],
    ids=["x", "negative t", "p", "late t", "overflow row", "t of 24 bits"],
)
def test_writers_refuse_what_does_not_fit(tmp_path: Path, writer, event, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        writer(tmp_path / "a", make_events(*([value] for value in event)))
    with pytest.raises(ValueError, match="not sorted"):
        writer(tmp_path / "a", make_events([1, 1], [1, 1], [2, 1], [0, 0]))


CSV_HEADER = "class,startTime_usec,endTime_usec\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has the columns"),
        ("a,b,c\n1,2,3\n", "has the columns"),
        (CSV_HEADER + "1,2\n", "three whole numbers"),
        (CSV_HEADER + "1,-2,3\n", "none negative"),
        (CSV_HEADER + "12,2,3\n", "class 12"),
        (CSV_HEADER + "1,3,3\n", "end must be after"),
    ],
    ids=["empty", "header", "two cells", "negative", "class", "span"],
)
def test_label_file_errors(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(EventFileError, match=message):
        read_trials(tmp_path / "labels.csv")
