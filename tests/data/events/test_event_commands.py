"""`spikingformer data gesture|nmnist|show|simulate` as people type them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spikingformer.cli.data_events import add_data_parsers
from spikingformer.data.events import make_events, write_aedat20, write_aedat31, write_nmnist
from spikingformer.data.events.event_set import load_event_parts
from spikingformer.data.events.recording import load_recording_as_frames, read_recording
from spikingformer.data.events.show import colour_frames
from spikingformer.data.events.simulate import SensorModel
from spikingformer.data.events.simulated_set import write_simulated_set
from tests.data.events.event_recordings import random_events


def call(*words: object) -> int:
    parser = argparse.ArgumentParser()
    add_data_parsers(parser.add_subparsers(required=True))
    args = parser.parse_args([str(word) for word in words])
    return args.run(args)


def test_gesture_from_the_official_layout(real_events_dir: Path, tmp_path: Path, capsys) -> None:
    words = ("gesture", "--from", real_events_dir / "dvsgesture", "--cache", tmp_path, "--time-steps", 4, 10)
    assert call(*words, "--workers", 1, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["train"], said["test"], said["complete"]) == (10, 10, False)
    assert [cache["time_steps"] for cache in said["caches"]] == [4, 10]
    assert call(*words, "--workers", 1, "--verify") == 0  # again: the cache is found
    assert "NOT COMPLETE" in capsys.readouterr().out


def test_show_writes_a_strip_and_an_animation(real_events_dir: Path, tmp_path: Path, capsys) -> None:
    file = real_events_dir / "dvsgesture" / "DvsGesture" / "user01_led.aedat"
    assert call("show", file, "--trial", 2, "--output", tmp_path, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    with Image.open(said["strip"]) as strip, Image.open(said["animation"]) as animation:
        assert strip.width > 800
        assert animation.n_frames == said["animation_frames"] == 18
        assert len(set(np.asarray(strip.convert("RGB")).reshape(-1, 3)[:, 0].tolist())) > 50
    with pytest.raises(ValueError, match="rows 1 to 10"):
        call("show", file, "--trial", 11, "--output", tmp_path)
    with pytest.raises(ValueError, match="It spans"):
        call("show", file, "--start", 1, "--end", 2, "--output", tmp_path)


def test_options_of_show_that_would_not_be_read_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "r.aedat"
    write_aedat20(file, make_events([1, 2], [3, 4], [5, 6], [0, 1]))
    with pytest.raises(ValueError, match="--sensor 34x34: recordings of this format are 128x128"):
        call("show", file, "--sensor", "34x34", "--output", tmp_path)
    with pytest.raises(ValueError, match="--start 3: --trial has its own start and end"):
        call("show", file, "--trial", 1, "--start", 3, "--output", tmp_path)


def test_colours_tell_polarity_apart() -> None:
    frames = np.zeros((1, 2, 2, 2), int)
    frames[0, 1, 0, 0] = frames[0, 0, 0, 1] = 3
    picture = colour_frames(frames)[0]
    assert picture[1, 1].tolist() == [255, 255, 255]
    assert picture[0, 0, 0] > picture[0, 0, 2]  # ON is red
    assert picture[0, 1, 2] > picture[0, 1, 0]  # OFF is blue


def test_any_recording_becomes_model_input(tmp_path: Path) -> None:
    write_aedat31(tmp_path / "a.aedat", random_events(1000))
    write_nmnist(tmp_path / "b.bin", random_events(1000, height=34, width=34, span_us=1000))
    whole = random_events(1000)
    frames, seconds = load_recording_as_frames(tmp_path / "a.aedat", 5)
    assert frames.shape == (1, 5, 2, 128, 128)
    assert seconds == (whole["t"][-1] - whole["t"][0]) / 1e6
    frames, _ = load_recording_as_frames(tmp_path / "b.bin", 3, frame_size=(32, 32), start_us=0, end_us=500)
    assert frames.shape == (1, 3, 2, 32, 32)
    assert 0 < frames.sum() < 1000
    assert read_recording(tmp_path / "b.bin")[1] == (34, 34)
    (tmp_path / "c.aedat").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=r"Expected AEDAT 2\.0 or 3\.1"):
        load_recording_as_frames(tmp_path / "c.aedat", 5)
    (tmp_path / "d.aedat").write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        load_recording_as_frames(tmp_path / "d.aedat", 5)


def test_simulated_sets_are_marked_and_never_mixed_with_real_ones(tmp_path: Path, capsys) -> None:
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    pictures = torch.rand(100, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = [i % 10 for i in range(100)]
    model = SensorModel(loops=1, loop_us=40_000, step_us=10_000)
    assert write_simulated_set(pictures, labels, names, tmp_path / "made", model=model) > 1000
    assert write_simulated_set(pictures, labels, names, tmp_path / "made", model=model) == 0  # all there
    parts = load_event_parts("cifar10dvs", tmp_path / "made", 2, frame_size=(32, 32))
    assert parts.train.simulated
    assert parts.train.title == "CIFAR10-DVS (simulated)"
    assert (len(parts.train), len(parts.test)) == (90, 10)
    assert b"simulated" in next((tmp_path / "made").rglob("*.aedat")).read_bytes()[:300]
    capsys.readouterr()
    call("show", tmp_path / "made" / "cat" / "cifar10_cat_0.aedat", "--output", tmp_path)
    assert "cifar10_cat_0.aedat (simulated): " in capsys.readouterr().out
    (tmp_path / "made" / "SIMULATED.txt").unlink()
    with pytest.raises(ValueError, match="not marked as simulated"):
        write_simulated_set(pictures, labels, names, tmp_path / "made", model=model)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--frame-size", 0], "--frame-size must be from 1 to 128, the sensor's size, got 0"),
        (["--frame-size", -8], "--frame-size must be from 1 to 128, the sensor's size, got -8"),
        (["--frame-size", 256], "--frame-size must be from 1 to 128, the sensor's size, got 256"),
        (["--time-steps", 4, 0], "expected at least 1 time step, got 0"),
        (["--workers", 0], "--workers must be at least 1, got 0"),
    ],
    ids=str,
)
def test_numbers_that_make_no_frames_are_refused_before_anything_is_unpacked(tmp_path: Path, words, message) -> None:
    with pytest.raises(ValueError, match=message):
        call("gesture", "--from", tmp_path, *words)


@pytest.mark.parametrize("milliseconds", [0, -1, "nan"])
def test_an_animation_needs_time_for_each_picture(tmp_path: Path, milliseconds) -> None:
    write_aedat31(tmp_path / "a.aedat", random_events(1000))
    with pytest.raises(ValueError, match="--frame-ms must be above 0, got"):
        call("show", tmp_path / "a.aedat", "--output", tmp_path, "--frame-ms", milliseconds)
