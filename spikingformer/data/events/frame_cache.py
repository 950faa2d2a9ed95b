"""Ready frames on disk: shards of uint8 or uint16 counts [n, T, 2, H, W], memory-mapped when they are used.

A shard is written beside its final name, synced and renamed, then described by a small json file. cache.json, written
last, is the only sign of a complete cache: a build that was killed continues from the shards that are there.
The folder's name is the key: data set, T, split mode, frame size, decoder version and a fingerprint of the recordings.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import shutil
import signal
import sys
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spikingformer.files import write_atomic

from .arrays import SensorSize, as_whole_number, check_sensor_size
from .frames import DECODER_VERSION, SplitBy, compact, events_to_frames
from .samples import EventSample, fingerprint, read_samples

SHARD_SAMPLES = 64
_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
Progress = Callable[[int, int], None]  # (samples done, samples in all)


class FrameCacheError(ValueError):
    """The frame cache on disk cannot be used or built; the text says what to do."""


@dataclass(frozen=True)
class FrameFormat:
    """How recordings become frames.

    data_set     name of the data set, for the key
    reader       key of READERS
    sensor_size  (height, width) of the camera
    frame_size   (H, W) of the frames, at most the sensor's
    time_steps   T
    split_by     "number" or "time"
    """

    data_set: str
    reader: str
    sensor_size: SensorSize
    frame_size: SensorSize
    time_steps: int
    split_by: SplitBy

    def __post_init__(self) -> None:
        steps = as_whole_number(self.time_steps)
        if steps is None or steps < 1:
            raise FrameCacheError(f"frames: expected at least 1 time step, got {self.time_steps}")
        # NumPy's numbers cannot be written to cache.json.
        object.__setattr__(self, "time_steps", steps)
        object.__setattr__(self, "frame_size", check_sensor_size(self.frame_size, "frame_size"))

    def key(self, recordings: str) -> str:
        """Folder name of the cache; `recordings` is their fingerprint."""
        rows, columns = self.frame_size
        size = f"{rows}x{columns}"
        return f"{self.data_set}-T{self.time_steps}-{self.split_by}-{size}-v{DECODER_VERSION}-{recordings}"


@dataclass(frozen=True)
class _Shard:
    """Samples first .. first + count - 1, as its json file describes it."""

    first: int
    count: int
    dtype: str
    bytes: int
    crc32: int
    empty: int  # samples without a single event


def build_frame_cache(
    folder: Path,
    samples: Sequence[EventSample],
    frame_format: FrameFormat,
    root: Path,
    workers: int = 0,
    progress: Progress | None = None,
    shard_samples: int = SHARD_SAMPLES,
) -> Path:
    """Build the cache of `samples` under `folder`, or finish or find the one that is there; its path.

    root           folder that the samples' names are relative to, for the fingerprint
    workers        processes that decode; 0 or 1: this one
    progress       called with (samples done, all) after every shard
    Raises EventFileError for a damaged recording, FrameCacheError for a full disk or a worker that died.
    """
    if not samples:
        raise FrameCacheError(f"there are no samples to cache under {root}.")
    path = folder / frame_format.key(fingerprint(samples, root))
    if (path / "cache.json").is_file():
        return path
    path.mkdir(parents=True, exist_ok=True)
    starts = list(range(0, len(samples), shard_samples))
    done = {first: shard for first in starts if (shard := _finished_shard(path, first, samples, shard_samples))}
    missing = [first for first in starts if first not in done]
    _check_space(path, frame_format, sum(min(shard_samples, len(samples) - first) for first in missing))
    finished = sum(shard.count for shard in done.values())
    if progress:
        progress(finished, len(samples))
    jobs = [(path, first, list(samples[first : first + shard_samples]), frame_format) for first in missing]
    for shard in _run_jobs(jobs, workers):
        done[shard.first] = shard
        finished += shard.count
        if progress:
            progress(finished, len(samples))
    description = {
        "format": {**asdict(frame_format), "decoder_version": DECODER_VERSION},
        "samples": len(samples),
        "labels": [sample.label for sample in samples],
        "shards": [asdict(done[first]) for first in starts],
    }
    _write(path / "cache.json", json.dumps(description).encode())
    return path


def open_frame_cache(path: Path, verify: bool = False) -> tuple[list[NDArray[Any]], dict[str, Any]]:
    """The shards [n, T, 2, H, W] as read-only memory maps, in sample order, and the content of cache.json.

    verify  also compare every shard's checksum (reads the whole cache)
    Raises FrameCacheError if the cache is not complete or a shard has changed.
    """
    advice = f"Delete the folder {path} and build it again (spikingformer data ...)."
    try:
        description = json.loads((path / "cache.json").read_bytes())
        shards = [_Shard(**shard) for shard in description["shards"]]
        fmt = description["format"]
        shape = (fmt["time_steps"], 2, *fmt["frame_size"])
        total = description["samples"]
    except FileNotFoundError:
        raise FrameCacheError(f"{path} holds no complete frame cache (no cache.json). Run the command again.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise FrameCacheError(f"{path}/cache.json cannot be read ({error}). {advice}") from None
    maps: list[NDArray[Any]] = []
    for shard in shards:
        file = path / _shard_name(shard.first)
        if not file.is_file() or file.stat().st_size != shard.bytes:
            raise FrameCacheError(f"{file} is missing or not {shard.bytes} bytes long. {advice}")
        if verify and zlib.crc32(file.read_bytes()) != shard.crc32:
            raise FrameCacheError(f"{file} has changed (another checksum). {advice}")
        maps.append(np.memmap(file, dtype=np.dtype(shard.dtype), mode="r", shape=(shard.count, *shape)))
    if sum(shard.count for shard in shards) != total or len(description["labels"]) != total:
        raise FrameCacheError(f"{path}/cache.json does not add up to {total} samples. {advice}")
    return maps, description


def _shard_name(first: int) -> str:
    return f"frames-{first:07d}.raw"


def _finished_shard(path: Path, first: int, samples: Sequence[EventSample], shard_samples: int) -> _Shard | None:
    """The shard that starts at `first`, if an earlier run finished it: description, size and checksum agree."""
    file = path / _shard_name(first)
    try:
        shard = _Shard(**json.loads(file.with_suffix(".json").read_bytes()))
        whole = shard.first == first and shard.count == min(shard_samples, len(samples) - first)
        if whole and file.stat().st_size == shard.bytes and zlib.crc32(file.read_bytes()) == shard.crc32:
            return shard
    except (OSError, ValueError, TypeError):
        pass
    return None


def _build_shard(path: Path, first: int, samples: list[EventSample], frame_format: FrameFormat) -> _Shard:
    fmt = frame_format
    frames, empty = [], 0
    for _, events in read_samples(samples, fmt.reader, fmt.sensor_size):
        counts = events_to_frames(events, fmt.time_steps, fmt.split_by, fmt.sensor_size, fmt.frame_size)
        frames.append(compact(counts))
        empty += len(events) == 0
    data = np.stack(frames).astype(max((f.dtype for f in frames), key=lambda dtype: dtype.itemsize), copy=False)
    raw = data.tobytes()
    shard = _Shard(first, len(samples), data.dtype.str, len(raw), zlib.crc32(raw), empty)
    file = path / _shard_name(first)
    _write(file, raw)
    _write(file.with_suffix(".json"), json.dumps(asdict(shard)).encode())
    return shard


def _write(file: Path, data: bytes) -> None:
    try:
        write_atomic(file, data)
    except OSError as error:
        raise FrameCacheError(
            f"cannot write {file} ({error.strerror}). Make room or choose another folder, then run the command again: "
            "it continues from what is there."
        ) from None


def _check_space(path: Path, frame_format: FrameFormat, samples: int) -> None:
    rows, columns = frame_format.frame_size
    needed = samples * frame_format.time_steps * 2 * rows * columns
    free = shutil.disk_usage(path).free
    if needed > free:
        raise FrameCacheError(
            f"the frame cache needs {needed / 1e9:.1f} GB, {path} has {free / 1e9:.1f} GB free: "
            "make room, choose another folder, or use fewer time steps."
        )


def _run_jobs(jobs: list[tuple[Path, int, list[EventSample], FrameFormat]], workers: int) -> Any:
    """Shards as they are finished, built here or in `workers` processes."""
    if workers <= 1 or len(jobs) <= 1:
        for job in jobs:
            yield _build_shard(*job)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy PyTorch's threads in an unknown state
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)), mp_context=context, initializer=_end_with_parent, initargs=(os.getpid(),)
    )
    pending: set[Future[_Shard]] = set()
    try:
        pending = {pool.submit(_build_shard, *job) for job in jobs}
        while pending:
            ready, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in ready:
                yield future.result()
    except BrokenProcessPool:
        raise FrameCacheError(
            "a decoding process was killed (out of memory?). Run the command again with fewer workers: "
            'it continues from what is there. In a script of your own, call it under `if __name__ == "__main__":`, '
            "or with workers=0."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent(parent: int) -> None:
    """Asks Linux to end this worker when its parent is killed, which the parent can no longer do itself."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before
            os.kill(os.getpid(), signal.SIGKILL)


def default_cache_folder(root: Path) -> Path:
    """<root>/frame_cache, or spikingformer/frame_cache in the user's cache folder where `root` cannot be written."""
    if os.access(root, os.W_OK):
        return root / "frame_cache"
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "spikingformer" / "frame_cache"
