"""Event streams: windows equal the model's own call on the same frames; memory flat; clear errors."""

import io
import sys
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch

from spikingformer.data.events import EventFileError, make_events, write_aedat31
from spikingformer.data.events.framing import Framing
from spikingformer.engine import Engine
from spikingformer.export import describe
from spikingformer.export.event_source import aedat31_chunks, event_chunks, looped
from spikingformer.export.runtime import EnginePredictor, ModulePredictor
from spikingformer.export.stream import FrameCutter, StreamSettings, classify_stream, settings_for
from spikingformer.native import status

from .conftest import small_model

SETTINGS = StreamSettings(step_us=1000, steps=3, sensor_size=(32, 32), frame_size=(32, 32))


@pytest.fixture
def predictor():
    model = small_model("spikformer_2_256", img_size=32, time_steps=3)
    return ModulePredictor(model, describe(model))


def random_events(count=5000, length_us=10_000, seed=0, size=32):
    rng = np.random.default_rng(seed)
    t = np.sort(rng.integers(0, length_us, count))
    return make_events(rng.integers(0, size, count), rng.integers(0, size, count), t, rng.integers(0, 2, count))


def in_pieces(events, length):
    return [events[i : i + length] for i in range(0, len(events), length)]


def frames_of(events, start, steps, step_us=1000):
    frames = np.zeros((steps, 2, 32, 32), np.float32)
    for e in events[(events["t"] >= start) & (events["t"] < start + steps * step_us)]:
        frames[(e["t"] - start) // step_us, e["p"], e["y"], e["x"]] += 1
    return torch.from_numpy(frames)


@pytest.mark.parametrize("piece", [1, 7, 5000], ids=["1-event", "7-events", "all-at-once"])
def test_windows_equal_the_models_call_on_their_frames(predictor, piece):
    events = random_events(800)
    start = int(events["t"][0])
    windows = list(classify_stream(predictor, in_pieces(events, piece), SETTINGS))
    assert [w.index for w in windows] == [0, 1, 2]
    for w in windows:
        assert (w.start_us, w.end_us) == (start + 3000 * w.index, start + 3000 * (w.index + 1))
        frames = frames_of(events, w.start_us, 3)
        assert w.events == frames.sum()
        expected = predictor.logits(frames[None]).softmax(-1)[0]
        # the same spikes; only the head's mean over time is summed in another order
        torch.testing.assert_close(torch.tensor(w.probabilities), expected, rtol=0, atol=1e-5)
        assert 0 < w.latency_s <= w.compute_s


@pytest.mark.parametrize("form", ["float32", "int8"])
def test_engine_classifies_the_same_windows_at_their_end(predictor, form):
    if not status().available:
        pytest.skip(f"no compiled kernels: {status().reason}")
    events = random_events(800)
    engine = Engine(predictor.model, form)
    windows = list(classify_stream(EnginePredictor(engine, predictor.metadata), in_pieces(events, 7), SETTINGS))
    assert [w.index for w in windows] == [0, 1, 2]
    for w in windows:
        frames = frames_of(events, w.start_us, 3)
        assert w.events == frames.sum()
        assert torch.equal(torch.tensor(w.probabilities), engine(frames[None]).softmax(-1)[0])


def test_a_long_silence_throws_away_the_gathered_frames(predictor):
    if not status().available:
        pytest.skip(f"no compiled kernels: {status().reason}")
    before, after = random_events(200, 2000), random_events(800, 4000, seed=1)
    after["t"] += 500_000_000
    engine = Engine(predictor.model, "int8")
    (window,) = classify_stream(EnginePredictor(engine, predictor.metadata), [before, after], SETTINGS)
    assert window.start_us == after["t"][0]
    expected = engine(frames_of(after, window.start_us, 3)[None]).softmax(-1)[0]
    assert torch.equal(torch.tensor(window.probabilities), expected)


def test_kept_state_goes_on_where_the_window_before_ended(predictor):
    events = random_events(800)
    settings = StreamSettings(1000, 3, (32, 32), (32, 32), keep_state=True)
    last = list(classify_stream(predictor, [events], settings))[-1]
    frames = frames_of(events, int(events["t"][0]), 9)[None]
    with torch.no_grad():
        features = predictor.model.forward_features(frames)  # membranes of all nine frames
        expected = predictor.model.forward_head(features[-3:]).softmax(-1)[0]  # the vote of the last three
        whole = predictor.model(frames).softmax(-1)[0]
    torch.testing.assert_close(torch.tensor(last.probabilities), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(expected, whole, atol=1e-4)


def test_a_clock_that_is_set_back_starts_anew(predictor):
    before, after = random_events(400, 4000), random_events(800, 4000, seed=1)
    before["t"] += 500_000_000
    cutter = FrameCutter(SETTINGS)
    first, second = classify_stream(predictor, [before, after], SETTINGS, cutter)
    assert (first.start_us, second.start_us) == (before["t"][0], after["t"][0])
    assert (cutter.restarts, cutter.late_events) == (1, 0)


def test_one_time_stamp_from_the_future_costs_no_more_than_its_window(predictor):
    events = random_events(3000, 30_000)
    events["t"][1000] = 2**31  # 10 ms on, in the middle of a packet
    cutter = FrameCutter(SETTINGS)
    windows = list(classify_stream(predictor, in_pieces(events, 10), SETTINGS, cutter))
    assert len(windows) >= 8  # of ten
    assert cutter.restarts == 2


def test_windows_are_as_long_as_the_training_samples(predictor):
    framing = replace(predictor.metadata.preprocessing, framing=Framing("time", 150_000))
    trained = ModulePredictor(predictor.model, replace(predictor.metadata, preprocessing=framing))
    assert settings_for(trained).step_us == 150_000 // predictor.metadata.time_steps
    assert settings_for(trained, window_seconds=0.3).step_us == 300_000 // predictor.metadata.time_steps
    assert settings_for(predictor).step_us == 60_000


def test_silence_gives_empty_frames_and_a_long_one_a_new_start():
    events = make_events([1, 2, 3], [1, 2, 3], [0, 3500, 9_000_000], [0, 1, 1])
    cutter = FrameCutter(StreamSettings(1000, 3, (32, 32), (32, 32), longest_gap_us=1_000_000))
    out = list(cutter.add(events))
    assert [None if f is None else (f[0], f[1]) for f in out] == [(0, 1), (1000, 0), (2000, 0), (3000, 1), None]
    assert cutter.start_us == 9_000_000


def test_late_events_are_dropped_and_counted_in_the_window_they_came_in(predictor):
    t = np.arange(0, 9500, 500)
    spots = np.zeros_like(t)
    events = make_events(spots, spots, t, spots)
    late = make_events([5, 5], [5, 5], [100, 200], [1, 1])
    pieces = [events[:10], late, events[10:]]  # the second window is under way when they come
    windows = list(classify_stream(predictor, pieces, SETTINGS))
    assert [w.late_events for w in windows] == [0, 2, 0]
    assert [w.probabilities for w in windows] == [
        w.probabilities for w in classify_stream(predictor, [events], SETTINGS)
    ]
    cutter = FrameCutter(SETTINGS)  # late events behind the last window are in no window's count
    assert sum(w.late_events for w in classify_stream(predictor, [*pieces, late, late], SETTINGS, cutter)) == 2
    assert cutter.late_events == 6


def test_larger_sensors_are_summed_into_the_models_frames():
    cutter = FrameCutter(StreamSettings(10, 1, (64, 64), (32, 32)))
    (frame, *_) = cutter.add(make_events([0, 1, 63, 5], [0, 1, 63, 5], [0, 1, 2, 50], [1, 1, 0, 0]))
    assert frame is not None
    assert frame[2][1, 0, 0] == 2
    assert frame[2][0, 31, 31] == 1


def test_memory_stays_flat_over_an_hour_of_events(predictor):
    def stream(seconds):
        # 4 s frames keep the test short: what may grow is what is kept for each event, frame and window
        settings = StreamSettings(4_000_000, 3, (32, 32), (32, 32))
        return classify_stream(predictor, looped(random_events(2000, 5_000_000), seconds), settings)

    def peak(seconds):
        tracemalloc.start()
        windows = sum(1 for _ in stream(seconds))
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return windows, highest

    peak(30)  # caches fill once
    few, before = peak(120)
    many, after = peak(3600)
    assert (few, many) == (9, 299)
    # the hour's events alone are 23 MB; what is left of 1 MB is garbage in cycles, which Python collects now and then
    assert after - before < 1_000_000


@pytest.mark.parametrize("source", ["file", "pipe"])
def test_recording_is_read_in_pieces(tmp_path, monkeypatch, source):
    events = random_events(3000)
    write_aedat31(tmp_path / "r.aedat", events, packet_events=500)
    if source == "pipe":
        data = io.BytesIO((tmp_path / "r.aedat").read_bytes())
        monkeypatch.setattr(sys, "stdin", type("Pipe", (), {"buffer": data})())
        chunks = list(event_chunks("-"))
    else:
        chunks = list(event_chunks(tmp_path / "r.aedat"))
    assert len(chunks) == 6
    assert np.array_equal(np.concatenate(chunks), events)


def test_damaged_streams_say_where(tmp_path):
    write_aedat31(tmp_path / "r.aedat", random_events(100))
    data = (tmp_path / "r.aedat").read_bytes()
    for damaged, message in (
        (data[:-5], "ends 5 bytes before the end of a packet: it was cut off"),
        (b"hello", "starts with b'hello', not with '#!AER-DAT3.1'"),
        (data[:40], "has no '#!END-HEADER' line"),
    ):
        with pytest.raises(EventFileError, match=message):
            list(aedat31_chunks(io.BytesIO(damaged), "r.aedat"))
    packet = data.index(b"#!END-HEADER\r\n") + 14
    for offset, field, message in (
        (4, b"\x00\x00\x00\x00", "impossible packet at byte .*: type 1, 0 bytes an event"),
        (12, b"\xff\xff\xff\xff", f"time overflow 4294967295 in the packet at byte {packet}"),
        (4, b"\x04\x00\x00\x00", "polarity events of 4 bytes with the time at byte 4"),
        (16, b"\xff\xff\xff\x0f", "a packet of 2147483640 bytes"),
    ):
        damaged = data[: packet + offset] + field + data[packet + offset + len(field) :]
        with pytest.raises(EventFileError, match=message):
            list(aedat31_chunks(io.BytesIO(damaged), "r.aedat"))
    with pytest.raises(EventFileError, match="cannot be read"):
        list(event_chunks(tmp_path / "none.aedat"))


def test_wrong_use_says_what_to_do(predictor):
    with pytest.raises(ValueError, match="outside the 32x32 sensor: give the camera's size"):
        list(classify_stream(predictor, [random_events(size=64)], SETTINGS))
    pictures = small_model("spikformer_4_384")
    with pytest.raises(ValueError, match="was trained on pictures"):
        list(classify_stream(ModulePredictor(pictures, describe(pictures)), [], SETTINGS))
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        StreamSettings(steps=0)
    with pytest.raises(ValueError, match="at most 3600 seconds, got 0"):
        settings_for(predictor, 0)
    assert settings_for(predictor, 0.3).step_us == 100_000
