"""`spikingformer predict --stream`: classifies an event camera's recording window by window as it comes in."""

import argparse
import json
import os
from dataclasses import asdict

from spikingformer.cli.device import refuse_other_than_cpu
from spikingformer.cli.unread import refuse_given

OPTIONS = ("window", "sensor", "keep_state", "loop")  # read with --stream only
SENSOR = (128, 128)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of streaming, for `spikingformer predict`."""
    group = parser.add_argument_group("streaming (event models)")
    group.add_argument(
        "--stream", metavar="RECORDING", help='classify window by window: an AEDAT file, or "-" for AEDAT 3.1 on stdin'
    )
    group.add_argument(
        "--window",
        type=float,
        metavar="SECONDS",
        help="length of a window (default: that of the training samples, else 60 ms a step)",
    )
    group.add_argument(
        "--sensor", type=int, nargs=2, metavar=("ROWS", "COLUMNS"), help="the camera's size (default 128 128)"
    )
    group.add_argument("--keep-state", action="store_true", help="keep the membrane state from window to window")
    group.add_argument("--loop", type=float, metavar="SECONDS", help="loop the recording for this many seconds")


def run(args: argparse.Namespace) -> int:
    """Prints one line per window as soon as it is complete, and the time used at the end."""
    import numpy as np

    from spikingformer.data.events import make_events
    from spikingformer.data.events.nmnist_bin import NMNIST_SUFFIXES
    from spikingformer.export.event_source import event_chunks, looped
    from spikingformer.export.runtime import load_predictor
    from spikingformer.export.stream import FrameCutter, classify_stream, settings_for

    if args.paths or args.samples:
        what = args.paths[0] if args.paths else "--samples"
        raise ValueError(f"--stream classifies only {args.stream}, but {what} was given too: give one of the two")
    refuse_given(args, ["top"], "--stream shows the most likely class of each window (--json: all): omit it")
    refuse_given(args, ["batch_size"], "--stream takes one window at a time: omit it")
    refuse_other_than_cpu(args.device, "windows of --stream run on the CPU here: omit it")
    if args.loop is not None and args.stream == "-":
        raise ValueError("--loop repeats a file, and standard input cannot be repeated: give the recording's path")
    if args.stream.lower().endswith(NMNIST_SUFFIXES):
        raise ValueError(
            f"--stream reads AEDAT files, and {args.stream} is an N-MNIST recording, which is short: give it as a "
            f"file, `spikingformer predict {args.checkpoint} {args.stream}`"
        )
    if os.path.isfile(args.stream) and not os.path.getsize(args.stream):
        raise ValueError(f"{args.stream} is empty: give an AEDAT recording")
    predictor = load_predictor(args.checkpoint)
    settings = settings_for(predictor, args.window, tuple(args.sensor or SENSOR), args.keep_state)
    chunks = event_chunks(args.stream)
    if args.loop is not None:
        chunks = looped(np.concatenate([make_events([], [], [], []), *chunks]), args.loop)
    names = predictor.metadata.class_names
    seconds = computed = 0.0
    slowest = 0.0
    count = classified = 0
    cutter = FrameCutter(settings)
    for window in classify_stream(predictor, chunks, settings, cutter):
        count += 1
        classified += window.events
        seconds += (window.end_us - window.start_us) / 1e6
        computed += window.compute_s
        slowest = max(slowest, window.latency_s)
        found = None if window.label is None else names[window.label]
        if args.json:
            row = {**asdict(window), "class": found, "real_time_factor": window.real_time_factor}
            print(json.dumps(row), flush=True)
            continue
        share = "" if window.label is None else f"{window.probabilities[window.label]:.1%}"
        print(
            f"{window.start_us / 1e6:9.3f} s  {found or 'no events':<20} {share:>6}  "
            f"{window.events:7d} events  latency {window.latency_s * 1e3:6.1f} ms  "
            f"{window.real_time_factor:5.1f}x real time",
            flush=True,
        )
    if not count:
        raise ValueError(
            f"the recording has no events, or is shorter than one window of {settings.window_us / 1e6:g} s: give a "
            "longer one, or a shorter --window"
        )
    if not args.json:
        notes = f"; {cutter.late_events} events came late and were dropped" if cutter.late_events else ""
        if rest := cutter.taken_events - classified:
            notes += f"; {rest} events are in no complete window and were not classified"
        if cutter.restarts:
            notes += f"; restarted {cutter.restarts} times (a minute of silence, or times that went back a minute)"
        print(f"{count} windows, {seconds:.1f} s of events in {computed:.1f} s: {seconds / computed:.1f}x real time, "
              f"longest latency {slowest * 1e3:.1f} ms{notes}")  # fmt: skip
    return 0
