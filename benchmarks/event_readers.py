"""How fast recordings are read and batches of frames are gathered, on one core: CPU time, so that other jobs on the
machine do not count.

python -m benchmarks.event_readers            # a table
python -m benchmarks.event_readers --json     # the same as JSON, with machine and versions
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.machine import describe_machine
from spikingformer.data.events import (
    events_to_frames,
    load_event_parts,
    make_events,
    read_aedat20,
    read_aedat31,
    read_nmnist,
    write_aedat20,
    write_aedat31,
    write_nmnist,
)
from spikingformer.data.events.augment import EventAugment

_REPEATS = 7


def seconds(call: Callable[[], object]) -> float:
    """Least CPU time of seven runs, after one that warms the caches."""
    call()
    times = []
    for _ in range(_REPEATS):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def random_recording(count: int, side: int, span_us: int) -> np.ndarray:
    draw = np.random.default_rng(0)
    time_us = np.sort(draw.integers(0, span_us, count))
    return make_events(
        draw.integers(0, side, count), draw.integers(0, side, count), time_us, draw.integers(0, 2, count)
    )


def reader_rates(folder: Path) -> dict[str, float]:
    """Million events a second of each reader."""
    events, small = random_recording(2_000_000, 128, 6_000_000), random_recording(200_000, 34, 300_000)
    write_aedat20(folder / "a20", events)
    write_nmnist(folder / "nmnist", small)
    rates = {
        "AEDAT 2.0": len(events) / seconds(lambda: read_aedat20(folder / "a20")) / 1e6,
        "N-MNIST .bin": len(small) / seconds(lambda: read_nmnist(folder / "nmnist")) / 1e6,
    }
    for size in (4096, 256, 32):
        write_aedat31(folder / "a31", events, packet_events=size)
        rate = len(events) / seconds(lambda: read_aedat31(folder / "a31")) / 1e6
        rates[f"AEDAT 3.1, packets of {size}"] = rate
    sample = events[:200_000]
    rates["events to 16 frames of 128x128"] = len(sample) / seconds(lambda: events_to_frames(sample, 16)) / 1e6
    return rates


def loading_rates(folder: Path) -> dict[str, float]:
    """Samples a second from a warm frame cache: 320 samples, T = 16, 128x128, batches of 16."""
    for name in ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"):
        (folder / "set" / name).mkdir(parents=True)
        for i in range(32):
            path = folder / "set" / name / f"cifar10_{name}_{i}.aedat"
            write_aedat20(path, random_recording(20_000, 128, 1_200_000))
    start = time.process_time()
    train = load_event_parts("cifar10dvs", folder / "set", 16).train
    build = 320 / (time.process_time() - start)
    rows = np.random.default_rng(0).permutation(len(train))[:16]
    frames, labels = train.batch(rows)
    generator = torch.Generator().manual_seed(0)
    return {
        "building the cache (20,000 events a recording)": build,
        "gathering": 16 / seconds(lambda: train.batch(rows)),
        "published augmentation": 16 / seconds(lambda: EventAugment()(frames, labels, generator)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = {
            "million_events_per_second": reader_rates(folder),
            "samples_per_second": loading_rates(folder),
            "threads": 1,
            "clock": "CPU time of the process, least of seven runs",
            "machine": describe_machine(),
        }
    if args.json:
        print(json.dumps(result, indent=1))
        return
    for title in ("million_events_per_second", "samples_per_second"):
        print(title.replace("_", " "))
        for what, rate in result[title].items():
            print(f"  {what:<50} {rate:10.1f}")


if __name__ == "__main__":
    main()
