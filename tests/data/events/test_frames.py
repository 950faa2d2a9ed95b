"""Events to frames: the published cuts, and the cases they leave open."""

from __future__ import annotations

import numpy as np
import pytest

from spikingformer.data.events import EVENT_DTYPE, make_events
from spikingformer.data.events.frames import compact, events_to_frames, slice_index
from tests.data.events.event_recordings import random_events


def frames_by_definition(events, time_steps, split_by, size):
    """The definition written out, one slice after the other."""
    height, width = size
    count, t = len(events), events["t"]
    frames = np.zeros((time_steps, 2, height, width), int)
    for i in range(time_steps):
        last = i == time_steps - 1
        if split_by == "number":
            d = count // time_steps
            chosen = events[i * d : count if last else (i + 1) * d]
        else:
            d = (t[-1] - t[0]) // time_steps if count else 0
            low = t[0] + i * d if count else 0
            chosen = events[(t >= low) & ((t < low + d) | last)]
        for event in chosen:
            frames[i, event["p"], event["y"], event["x"]] += 1
    return frames


@pytest.mark.parametrize("split_by", ["number", "time"])
@pytest.mark.parametrize("count", [0, 1, 3, 10, 997])
@pytest.mark.parametrize("time_steps", [1, 4, 10, 16])
def test_frames_equal_the_definition(split_by: str, count: int, time_steps: int) -> None:
    events = random_events(count, seed=count, height=5, width=7, span_us=1234)
    frames = events_to_frames(events, time_steps, split_by, (5, 7))
    np.testing.assert_array_equal(frames, frames_by_definition(events, time_steps, split_by, (5, 7)))
    assert frames.sum() == count


def test_last_frame_by_number_takes_the_remainder() -> None:
    index = slice_index(np.arange(100_007), 10, "number")
    assert np.bincount(index).tolist() == [10_000] * 9 + [10_007]


def test_an_empty_time_slice_is_an_empty_frame() -> None:
    events = make_events([1, 1, 1], [1, 1, 1], [0, 1, 1000], [0, 0, 0])
    assert events_to_frames(events, 4, "time", (2, 2)).sum((1, 2, 3)).tolist() == [2, 0, 0, 1]


def test_smaller_frames_sum_the_pixels_that_share_a_cell() -> None:
    events = random_events(5000, height=34, width=34)
    small = events_to_frames(events, 3, "number", (34, 34), (17, 17))
    full = events_to_frames(events, 3, "number", (34, 34))
    np.testing.assert_array_equal(small, full.reshape(3, 2, 17, 2, 17, 2).sum((3, 5)))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"time_steps": 0}, "time_steps is 0"),
        ({"time_steps": np.array([4, 4])}, "time_steps is array"),
        ({"sensor_size": (128, True)}, "sensor_size is"),
        ({"split_by": "events"}, "expected 'number' or 'time'"),
        ({"sensor_size": (64, 64)}, "outside the 64x64 sensor"),
        ({"frame_size": (256, 256)}, "larger than the sensor"),
        ({"frame_size": (0, 128)}, "frame_size is"),
        ({"time_steps": 10**9}, "cells"),
    ],
    ids=["T", "several T", "size", "split", "sensor", "frame", "no frame", "memory"],
)
def test_frame_errors(change: dict, text: str) -> None:
    arguments = {"time_steps": 4, "split_by": "number", "sensor_size": (128, 128), **change}
    with pytest.raises(ValueError, match=text):
        events_to_frames(random_events(100), **arguments)


def test_whole_numbers_may_be_numpys() -> None:
    events = random_events(100)
    frames = events_to_frames(events, np.int64(4), "number", (np.int16(128), np.int16(128)))
    np.testing.assert_array_equal(frames, events_to_frames(events, 4, "number", (128, 128)))


@pytest.mark.parametrize(("highest", "dtype"), [(255, np.uint8), (256, np.uint16), (65535, np.uint16)])
def test_compact_never_overflows(highest: int, dtype: type) -> None:
    frames = np.array([[0, highest]])
    assert compact(frames).dtype == dtype
    np.testing.assert_array_equal(compact(frames), frames)
    with pytest.raises(ValueError, match="65536 events"):
        compact(np.array([65536]))


def test_event_type_is_aligned() -> None:
    assert EVENT_DTYPE.names == ("x", "y", "t", "p")
    assert EVENT_DTYPE["t"] == np.int64
    assert all(offset % dtype.itemsize == 0 for dtype, offset, *_ in EVENT_DTYPE.fields.values())
