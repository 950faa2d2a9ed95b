"""`spikingformer data gesture|cifar10dvs|nmnist|show|simulate`: prepares and shows event-camera data."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spikingformer.cli.unread import refuse_given

_SETS = {
    "gesture": "DVS128 Gesture: check, unpack, and build the frame cache",
    "cifar10dvs": "CIFAR10-DVS: check, unpack, and build the frame cache",
    "nmnist": "N-MNIST: check, unpack, and build the frame cache",
}


def add_data_parsers(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the event-camera sub-commands to `spikingformer data`; each sets `run`."""
    for name, text in _SETS.items():
        _add_set_parser(subparsers.add_parser(name, help=text, description=_set_description(text)), name)
    _add_show_parser(subparsers.add_parser("show", help="draw a recording: pictures, event rate and an animation"))
    _add_simulate_parser(
        subparsers.add_parser(
            "simulate",
            help="turn pictures into simulated recordings in the CIFAR10-DVS layout",
            description="Turns pictures into simulated event recordings. They are marked as simulated everywhere "
            "and do not replace CIFAR10-DVS.",
        )
    )


def _set_description(text: str) -> str:
    return (
        f"{text}. Looks in --from DIR for the official archives or their unpacked files, and says what to download "
        "if there are none. If it is interrupted, run it again: it continues from the files already written."
    )


def _add_set_parser(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument(
        "--from", dest="source", type=Path, required=True, metavar="DIR", help="folder of the downloaded files"
    )
    parser.add_argument("--to", type=Path, metavar="DIR", help="where to unpack to (default: the folder of --from)")
    parser.add_argument(
        "--time-steps", type=int, nargs="+", default=[16], metavar="T", help="frames per recording (default 16)"
    )
    parser.add_argument(
        "--split-by",
        choices=("number", "time"),
        default="number",
        help="frames of equally many events, or of equal length (default number)",
    )
    parser.add_argument(
        "--split", default="published", help="which division into training and test samples (default published)"
    )
    parser.add_argument("--frame-size", type=int, metavar="N", help="frames of NxN pixels (default: the sensor's size)")
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="folder for the frame cache (default: beside the data)"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="decoding processes")
    parser.add_argument(
        "--skip-checksums", action="store_true", help="also unpack archives whose MD5 is not the official one"
    )
    parser.add_argument("--verify", action="store_true", help="also check the checksums of an existing cache")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run_prepare, data_set=name)


def _add_show_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a recording: .aedat (2.0 or 3.1), .bin or .bs2")
    parser.add_argument(
        "--output", type=Path, default=Path(), metavar="DIR", help="folder for the pictures (default: the current one)"
    )
    parser.add_argument("--time-steps", type=int, default=8, metavar="T", help="pictures in the strip (default 8)")
    parser.add_argument(
        "--split-by",
        choices=("number", "time"),
        default="time",
        help="pictures of equally many events, or of equal length (default time)",
    )
    parser.add_argument("--start", type=int, metavar="US", help="start at this microsecond")
    parser.add_argument("--end", type=int, metavar="US", help="stop before this microsecond")
    parser.add_argument(
        "--trial",
        type=int,
        metavar="N",
        help="show trial N: a row, counted from 1, of the gesture label file beside FILE",
    )
    parser.add_argument("--sensor", metavar="HxW", help="sensor size, for example 128x128 (default: detected)")
    parser.add_argument(
        "--frame-ms", type=float, default=40.0, metavar="MS", help="time per picture of the animation (default 40)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run_show)


def _add_simulate_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", dest="source", type=Path, required=True, metavar="DIR",
                        help="folder that holds cifar-10-batches-py")  # fmt: skip
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--per-class", type=int, default=1000, metavar="N", help="pictures per class (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default 0)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run_simulate)


def run_prepare(args: argparse.Namespace) -> int:
    """Unpack, check and cache one event data set."""
    from spikingformer.data.events.catalogue import CATALOGUE
    from spikingformer.data.events.frame_cache import (
        FrameFormat,
        build_frame_cache,
        default_cache_folder,
        open_frame_cache,
    )
    from spikingformer.data.events.prepare import prepare, simulated_note

    row = CATALOGUE[args.data_set]
    largest = min(row.sensor_size)
    if args.frame_size is not None and not 1 <= args.frame_size <= largest:
        raise ValueError(f"--frame-size must be from 1 to {largest}, the sensor's size, got {args.frame_size}")
    if args.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {args.workers}")
    size = row.sensor_size if args.frame_size is None else (args.frame_size, args.frame_size)
    formats = [FrameFormat(row.name, row.reader, row.sensor_size, size, t, args.split_by) for t in args.time_steps]
    target = args.to or args.source
    report = _say(args.json)
    samples = prepare(row, args.source, target, args.split, report, args.skip_checksums)
    root = target if _inside(samples[0].path, target) else args.source
    caches = []
    for frame_format in formats:
        steps, start = frame_format.time_steps, time.perf_counter()
        folder = args.cache or default_cache_folder(root)
        with _Progress(f"T={steps}", quiet=args.json) as progress:
            path = build_frame_cache(folder, samples, frame_format, root, args.workers, progress)
        shards, description = open_frame_cache(path, verify=args.verify)
        empty = sum(shard["empty"] for shard in description["shards"])
        result = {
            "path": str(path),
            "time_steps": steps,
            "samples": len(samples),
            "empty_samples": empty,
            "bytes": sum(shard.nbytes for shard in shards),
            "seconds": round(time.perf_counter() - start, 2),
        }
        caches.append(result)
        report(f"T={steps}: {len(samples)} samples, {result['bytes'] / 1e6:.1f} MB in {path} ({result['seconds']} s)")
        if empty:
            report(f"T={steps}: {empty} samples have no events")
    train = sum(sample.part == "train" for sample in samples)
    if args.json:
        summary: dict[str, Any] = {
            "data_set": row.name,
            "split": args.split,
            "train": train,
            "test": len(samples) - train,
            "complete": row.counts.get(args.split) == (train, len(samples) - train),
            "simulated": simulated_note(root) is not None,
            "caches": caches,
        }
        print(json.dumps(summary))
    return 0


def run_show(args: argparse.Namespace) -> int:
    """Draw one recording."""
    from spikingformer.data.events.recording import cut, is_simulated, read_recording
    from spikingformer.data.events.show import save_gif, save_strip

    if not args.frame_ms > 0:
        raise ValueError(f"--frame-ms must be above 0, got {args.frame_ms:g}")
    sensor = _sensor(args.sensor)
    events, size = read_recording(args.file, sensor)
    if sensor not in (None, size):
        raise ValueError(f"--sensor {args.sensor}: recordings of this format are {size[0]}x{size[1]}: omit it")
    start, end, what = args.start, args.end, ""
    if args.trial is not None:
        refuse_given(args, ("start", "end"), "--trial has its own start and end: omit it")
        start, end, what = _trial_span(args.file, args.trial)
    events = cut(events, start, end, args.file)
    simulated = is_simulated(args.file)
    span = float(events["t"][-1] - events["t"][0]) / 1e6
    on = float(events["p"].mean())
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.file.stem + (f"_trial{args.trial}" if args.trial is not None else "")
    strip, animation = args.output / f"{stem}.png", args.output / f"{stem}.gif"
    name = f"{args.file.name}{what}" + (" (simulated)" if simulated else "")
    title = f"{name}: {len(events):,} events in {span:.3f} s, {on:.0%} ON, {size[1]}x{size[0]} pixels"
    save_strip(events, size, strip, args.time_steps, args.split_by, title)
    pictures = save_gif(events, size, animation, args.frame_ms)
    if args.json:
        result = {
            "events": len(events),
            "seconds": span,
            "on_share": on,
            "simulated": simulated,
            "sensor_size": size,
            "strip": str(strip),
            "animation": str(animation),
            "animation_frames": pictures,
        }
        print(json.dumps(result))
    else:
        print(f"{title}\n{strip}\n{animation} ({pictures} pictures)")
    return 0


def run_simulate(args: argparse.Namespace) -> int:
    """Write simulated recordings of CIFAR-10's training pictures."""
    import torch

    from spikingformer.data.cifar import load_cifar
    from spikingformer.data.events.simulated_set import write_simulated_set

    if args.per_class < 1:
        raise ValueError(f"--per-class is {args.per_class}; expected at least 1.")
    cifar = load_cifar("cifar10", args.source, "train")
    chosen = torch.cat([torch.nonzero(cifar.labels == label)[: args.per_class, 0] for label in range(10)])
    grey = (cifar.pictures[chosen].float() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1) / 255
    start = time.perf_counter()
    with _Progress("simulating", quiet=args.json) as progress:
        events = write_simulated_set(
            grey.clamp(0, 1), cifar.labels[chosen].tolist(), cifar.class_names, args.to, args.seed, progress=progress
        )
    seconds = round(time.perf_counter() - start, 1)
    if args.json:
        print(json.dumps({"simulated": True, "recordings": len(chosen), "events": events, "seconds": seconds}))
    else:
        print(f"{len(chosen)} simulated recordings in {args.to}, {events:,} new events, {seconds} s")
    return 0


def _sensor(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise ValueError(f"--sensor is {text!r}; expected HEIGHTxWIDTH, for example 128x128.")
    return int(height), int(width)


def _trial_span(recording: Path, number: int) -> tuple[int, int, str]:
    from spikingformer.data.events.catalogue import CATALOGUE
    from spikingformer.data.events.gesture_trials import read_trials

    trials = read_trials(recording.with_name(f"{recording.stem}_labels.csv"))
    if not 1 <= number <= len(trials):
        raise ValueError(f"--trial is {number}; the label file has rows 1 to {len(trials)}.")
    trial = trials[number - 1]
    return trial.start_us, trial.end_us, f", {CATALOGUE['gesture'].class_names[trial.label]}"


def _inside(path: Path, folder: Path) -> bool:
    return path.is_relative_to(folder)


def _say(quiet: bool) -> Callable[[str], None]:
    """Progress lines go to the error stream, so that --json prints nothing else."""
    return (lambda text: print(text, file=sys.stderr)) if quiet else print


class _Progress:
    """A progress bar that is called with (done, all)."""

    def __init__(self, label: str, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn(label),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=quiet,
        )
        self._task = self._bar.add_task(label, total=None)

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)
