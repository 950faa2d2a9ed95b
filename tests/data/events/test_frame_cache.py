"""The frame cache: right frames, resumed after a kill, never taken for whole when it is not."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spikingformer.data.events import EventFileError, frame_cache, make_events, write_aedat20
from spikingformer.data.events.event_set import load_event_parts, split_validation
from spikingformer.data.events.frame_cache import FrameCacheError, FrameFormat, build_frame_cache, open_frame_cache
from spikingformer.data.events.frames import events_to_frames
from spikingformer.data.events.samples import EventSample, fingerprint
from tests.data.events.event_recordings import random_events

FORMAT = FrameFormat("test", "aedat20", (128, 128), (128, 128), 3, "number")


@pytest.fixture
def samples(tmp_path: Path) -> list[EventSample]:
    """Seven recordings; the third is empty, in the fifth one pixel fires 301 times in the last frame."""
    made = []
    for i in range(7):
        events = random_events(0 if i == 2 else 200, seed=i)
        if i == 4:
            events = make_events([5] * 903, [6] * 903, range(903), [1] * 903)
        path = tmp_path / "data" / f"{i}.aedat"
        path.parent.mkdir(exist_ok=True)
        write_aedat20(path, events)
        made.append(EventSample(path, i % 3, "train"))
    return made


def build(samples: list[EventSample], tmp_path: Path, **options) -> Path:
    return build_frame_cache(tmp_path / "cache", samples, FORMAT, tmp_path / "data", shard_samples=2, **options)


def frames_of(path: Path) -> np.ndarray:
    return np.concatenate([shard.astype(np.int64) for shard in open_frame_cache(path, verify=True)[0]])


@pytest.mark.parametrize("workers", [0, 2])
def test_cache_holds_the_frames(samples, tmp_path: Path, workers: int) -> None:
    seen = []
    path = build(samples, tmp_path, workers=workers, progress=lambda done, total: seen.append((done, total)))
    shards, description = open_frame_cache(path)
    assert [shard.dtype for shard in shards] == [np.uint8, np.uint8, np.uint16, np.uint8]
    assert [shard["empty"] for shard in description["shards"]] == [0, 1, 0, 0]
    assert description["labels"] == [0, 1, 2, 0, 1, 2, 0]
    assert seen[0] == (0, 7)
    assert seen[-1] == (7, 7)
    for frames, sample in zip(frames_of(path), samples, strict=True):
        np.testing.assert_array_equal(frames, events_to_frames(frame_cache_events(sample), 3))


def frame_cache_events(sample: EventSample) -> np.ndarray:
    from spikingformer.data.events import read_aedat20

    return read_aedat20(sample.path)


def test_an_interrupted_build_goes_on(samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = frames_of(build(samples, tmp_path))
    folder = tmp_path / "second"
    real, built = frame_cache._build_shard, []

    def build_two_then_die(*job):
        if len(built) == 2:
            raise KeyboardInterrupt
        built.append(job[1])
        return real(*job)

    monkeypatch.setattr(frame_cache, "_build_shard", build_two_then_die)
    arguments = (folder, samples, FORMAT, tmp_path / "data")
    with pytest.raises(KeyboardInterrupt):
        build_frame_cache(*arguments, shard_samples=2)
    key = FORMAT.key(fingerprint(samples, tmp_path / "data"))
    with pytest.raises(FrameCacheError, match="no complete frame cache"):
        open_frame_cache(folder / key)
    # one of the two shards is damaged meanwhile, and a half-written file lies about
    shard = folder / key / "frames-0000002.raw"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x07")
    (folder / key / "frames-0000004.raw").write_bytes(b"half")
    monkeypatch.setattr(frame_cache, "_build_shard", lambda *job: built.append(job[1]) or real(*job))
    path = build_frame_cache(*arguments, shard_samples=2)
    assert built == [0, 2, 2, 4, 6]
    np.testing.assert_array_equal(frames_of(path), whole)


@pytest.mark.parametrize("damage", ["truncate", "remove", "flip", "json"])
def test_a_damaged_cache_is_refused(samples, tmp_path: Path, damage: str) -> None:
    path = build(samples, tmp_path)
    shard = path / "frames-0000004.raw"
    if damage == "truncate":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "remove":
        shard.unlink()
    elif damage == "flip":
        shard.write_bytes(shard.read_bytes()[:-1] + b"\x07")
    else:
        (path / "cache.json").write_text('{"samples": 7}')
    with pytest.raises(FrameCacheError, match="Delete the folder"):
        open_frame_cache(path, verify=True)


def test_key_changes_with_recordings_labels_and_format(samples, tmp_path: Path) -> None:
    root = tmp_path / "data"
    first = fingerprint(samples, root)
    relabelled = [EventSample(s.path, 1 - s.label % 2, s.part) for s in samples]
    assert fingerprint(relabelled, root) != first
    write_aedat20(samples[0].path, random_events(201))
    assert fingerprint(samples, root) != first
    keys = {
        FrameFormat("a", "aedat20", (128, 128), size, t, by).key("f")
        for size in ((128, 128), (64, 64))
        for t in (10, 16)
        for by in ("number", "time")
    }
    assert len(keys) == 8


def test_a_damaged_recording_stops_the_build_and_is_named(samples, tmp_path: Path) -> None:
    samples[5].path.write_bytes(samples[5].path.read_bytes()[:-3])
    with pytest.raises(EventFileError, match=r"5\.aedat.*not a multiple"):
        build(samples, tmp_path)


def test_errors_cross_process_borders() -> None:
    error = pickle.loads(pickle.dumps(EventFileError("a.aedat", "is empty.", "Get it again.")))
    assert str(error) == "a.aedat: is empty. Get it again."


def test_full_disk_is_a_clear_error(samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(FrameCacheError, match=r"needs .* GB, .* free"):
        build(samples, tmp_path)


def test_batches_of_the_real_recordings(real_events_dir: Path, tmp_path: Path) -> None:
    parts = load_event_parts("gesture", real_events_dir / "dvsgesture", 16, cache=tmp_path)
    assert (len(parts.train), len(parts.test)) == (10, 10)
    frames, labels = parts.test.batch([3, 0])
    assert frames.shape == (2, 16, 2, 128, 128)
    assert labels.tolist() == [3, 0]
    single, label = parts.test[3]
    assert label == 3
    assert (single == frames[0]).all()
    assert frames.sum() > 50_000
    assert not parts.test.simulated
    part = parts.test.subset([4, 3])
    assert part.labels.tolist() == [4, 3]
    assert (part[1][0] == frames[0]).all()


def test_nmnist_samples(real_events_dir: Path, tmp_path: Path) -> None:
    parts = load_event_parts(
        "nmnist", real_events_dir / "nmnist_slayer", 10, split="slayer", frame_size=(32, 32), cache=tmp_path
    )
    assert (len(parts.train), len(parts.test)) == (100, 100)
    assert parts.train.labels[:4].tolist() == [5, 0, 4, 1]
    train, validation = split_validation(parts.train.labels, 0.2)
    assert len(train) + len(validation) == 100
    assert set(parts.train.labels[validation].tolist()) == set(range(10))


def test_cache_description_is_plain_json(samples, tmp_path: Path) -> None:
    description = json.loads((build(samples, tmp_path) / "cache.json").read_text())
    assert description["format"]["decoder_version"] == 1


def test_numpys_whole_numbers_describe_the_same_cache(samples, tmp_path: Path) -> None:
    numpys = replace(FORMAT, time_steps=np.int64(3), frame_size=(np.int16(128), np.int16(128)))
    path = build_frame_cache(tmp_path / "numpys", samples, numpys, tmp_path / "data", shard_samples=2)
    plain = build(samples, tmp_path)
    assert path.name == plain.name
    assert (path / "cache.json").read_text() == (plain / "cache.json").read_text()


@pytest.mark.parametrize("size", [1, 4096, 65_536, 65_537, 1_000_000])
def test_the_fingerprint_sees_changes_all_over_a_file(tmp_path: Path, size: int) -> None:
    """Of files up to 64 KB any byte, of larger ones their ends and what lies in the blocks between."""
    path = tmp_path / "a.bin"
    content = bytes(size)
    path.write_bytes(content)
    sample = [EventSample(path, 0, "train")]
    found = {fingerprint(sample, tmp_path)}
    blocks = [round(i * (size - 4096) / 15) for i in range(16)]
    places = range(0, size, 4095) if size <= 65_536 else [p + at for p in blocks for at in (0, 2000, 4095)]
    for place in {0, size - 1, *places}:
        path.write_bytes(content[:place] + b"x" + content[place + 1 :])
        found.add(fingerprint(sample, tmp_path))
    path.write_bytes(content + b"\0")
    found.add(fingerprint(sample, tmp_path))
    assert len(found) == 2 + len({0, size - 1, *places})


@pytest.mark.skipif(sys.platform != "linux", reason="workers ask Linux to end with their parent")
def test_a_killed_build_leaves_no_worker_behind(tmp_path: Path) -> None:
    script = tmp_path / "build.py"
    script.write_text(
        "import multiprocessing, os, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from spikingformer.data.events.frame_cache import _end_with_parent\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    pool = ProcessPoolExecutor(1, context, _end_with_parent, (os.getpid(),))\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    pool.submit(time.sleep, 600).result()\n"
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
    for _ in range(100):
        try:
            state = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":  # ended, and nobody has collected it yet
            return
        time.sleep(0.1)
    pytest.fail(f"worker {worker} outlived its parent")


def test_frames_without_time_steps_leave_nothing_on_disk(tmp_path: Path) -> None:
    with pytest.raises(FrameCacheError, match="expected at least 1 time step, got 0"):
        replace(FORMAT, time_steps=0)
