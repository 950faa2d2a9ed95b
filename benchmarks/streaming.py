"""An event camera's stream on one core: real-time factor, latency a window, and memory over an hour.

    taskset -c 0 python -m benchmarks.streaming FOLDER --seconds 3600 --output FILE

FOLDER holds real DVS128 Gesture recordings (*.aedat), which are played one after the other in a loop. The model is
spikingformer_cml_2_256 for 128x128 and T = 16, unless --checkpoint names another: random weights, its BatchNorms
calibrated on frames of the recordings. Parity comes first, on the first window: steps fed one by one give the whole
call's logits, the int8 engine equals its integer definition. Then the forms take turns, a window each, in one process,
so that all see the same load of the machine. Two figures of speed: the model's computation alone, and with decoding and
frames (`x_real_time_all`). Resident memory holds what calibration and parity left behind: read how it grows.
"""

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import timm
import torch

from benchmarks.cpu_models import resident_mb
from benchmarks.machine import describe_machine
from spikingformer.benchmarks import calibrate, firing_rate
from spikingformer.data.events import EventFileError
from spikingformer.engine import Engine, build_program, int8_reference
from spikingformer.export import describe, load_predictor
from spikingformer.export.event_source import event_chunks, looped
from spikingformer.export.runtime import EnginePredictor, ModulePredictor
from spikingformer.export.stream import Events, FrameCutter, StreamSettings, Window, classify_stream, settings_for

MODEL = "spikingformer_cml_2_256"
FORMS = ("steps", "int8", "engine-float32")
WARM_UP = 2  # windows of each form that are left out


def load_recordings(folder: Path) -> Events:
    """All recordings of a folder as one, without pauses between them."""
    parts, end = [], 0
    for path in sorted(folder.glob("*.aedat")):
        events = np.concatenate(list(event_chunks(path)))
        events["t"] += end - events["t"][0]
        end = int(events["t"][-1]) + 1
        parts.append(events)
    if not parts:
        raise EventFileError(folder, "has no *.aedat recordings.", "Give the folder of DVS128 Gesture.")
    return np.concatenate(parts)


def first_windows(events: Events, settings: StreamSettings, count: int) -> torch.Tensor:
    """(count, T, 2, H, W) of the stream's start."""
    frames = itertools.islice(FrameCutter(settings).add(events), count * settings.steps)
    return torch.stack([torch.from_numpy(f[2]) for f in frames if f]).unflatten(0, (count, settings.steps))


def make_model(checkpoint: str | None, events: Events) -> ModulePredictor:
    if checkpoint is not None:
        found = load_predictor(checkpoint)
        if not isinstance(found, ModulePredictor):
            raise ValueError(f"{checkpoint} holds no float weights: give a checkpoint or folded weights")
        return found
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=11).eval()
    settings = settings_for(ModulePredictor(model, describe(model)))
    calibrate(model, first_windows(events, settings, 4))
    return ModulePredictor(model.eval(), describe(model))


def checked_forms(names: list[str], predictor: ModulePredictor, window: torch.Tensor) -> dict:
    """The predictors by name, after parity on `window` (1, T, 2, H, W)."""
    program = build_program(predictor.model)
    made = {"steps": lambda: predictor, "int8": lambda: EnginePredictor(Engine(program, "int8"), predictor.metadata)}
    made["engine-float32"] = lambda: EnginePredictor(Engine(program), predictor.metadata)
    forms = {name: made[name]() for name in names}
    state = None
    for frame in window.unbind(1):
        stepped, state = predictor.step(frame, state)
    # the same spikes: only the head's mean over time is summed in another order
    torch.testing.assert_close(stepped, predictor.logits(window), rtol=0, atol=1e-4)
    if "int8" in forms:
        assert torch.equal(forms["int8"].logits(window), int8_reference.run(program, window)[-1].float())
    return forms


def play(streams: dict[str, Iterator[Window]], total: int) -> tuple[dict[str, list[Window]], dict[str, float], list]:
    """(windows, seconds of everything by form, [[share of the hour, resident MB] ...]), the forms in turns."""
    windows: dict[str, list[Window]] = {name: [] for name in streams}
    spent = dict.fromkeys(streams, 0.0)
    memory: list[list[float]] = []
    for number in range(total):
        for name, stream in streams.items():
            begin = time.perf_counter()
            windows[name].append(next(stream))
            spent[name] += time.perf_counter() - begin if number >= WARM_UP else 0.0
        if number in (WARM_UP, total // 2, total - 1):
            memory.append([number / max(total - 1, 1), round(resident_mb("VmRSS"), 1)])
    return windows, spent, memory


def row(name: str, windows: list[Window], spent: float) -> dict:
    kept = windows[WARM_UP:]
    length = (kept[0].end_us - kept[0].start_us) / 1e6
    latency = np.array([w.latency_s for w in kept]) * 1e3
    compute = np.array([w.compute_s for w in kept])
    median, p99 = np.percentile(latency, (50, 99))
    return {"form": name, "windows": len(kept), "window_s": length, "latency_ms": {"median": median, "p99": p99,
            "worst": latency.max()}, "x_real_time": length / float(np.median(compute)), "x_real_time_worst":
            length / compute.max(), "x_real_time_all": length * len(kept) / spent}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="DVS128 Gesture recordings, *.aedat")
    parser.add_argument("--seconds", type=float, default=3600, help="of events to play")
    parser.add_argument("--checkpoint", help="trained on 128x128 event frames; default: random weights")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["steps", "int8"])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    events = load_recordings(args.folder)
    predictor = make_model(args.checkpoint, events)
    settings = settings_for(predictor)
    sample = first_windows(events, settings, 1)
    forms = checked_forms(args.forms, predictor, sample)
    total = int(args.seconds * 1e6 // settings.window_us)
    if total <= 2 * WARM_UP:
        raise SystemExit(f"--seconds {args.seconds:g}: expected at least {2 * WARM_UP + 1} windows of a second")
    streams = {n: classify_stream(p, looped(events, args.seconds + 1), settings) for n, p in forms.items()}
    windows, spent, memory = play(streams, total)
    with torch.no_grad():
        rate = firing_rate(predictor.model, sample)
    result = {**describe_machine(), "threads": 1, "model": args.checkpoint or MODEL, "frame": list(settings.frame_size),
              "time_steps": settings.steps, "seconds": args.seconds, "events_per_second": len(events) * 1e6 /
              int(events["t"][-1] - events["t"][0]), "firing_rate": rate, "memory_mb": memory,
              "rows": [row(n, windows[n], spent[n]) for n in forms]}  # fmt: skip
    for r in result["rows"]:
        print(f"{r['form']}: {r['x_real_time']:.2f}x real time (all: {r['x_real_time_all']:.2f}x), latency "
              f"{r['latency_ms']['median']:.1f} ms, worst {r['latency_ms']['worst']:.1f} ms")  # fmt: skip
    print("resident MB: " + ", ".join(f"{mb:.0f} after {share:.0%}" for share, mb in memory))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
