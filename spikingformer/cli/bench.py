"""`spikingformer bench`: how fast a model runs here, and in how much memory."""

import argparse
import json
from dataclasses import asdict

from spikingformer.cli.device import add_device_argument

# short name, as in other commands: torch's name
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "bench",
        help="time a model on this machine: pictures/s, peak memory, firing rate",
        description="Times a model on random input. The firing rate is printed too, because the speed depends on it. "
        "A model without trained weights gets random ones with calibrated BatchNorm, so that its neurons fire.",
    )
    parser.add_argument(
        "model",
        help="a name (see `spikingformer models`), MODEL.TAG of weights that come with the package, "
        "a checkpoint file or a run's folder",
    )
    parser.add_argument("--mode", choices=("inference", "training"), default="inference",
                        help="training: forward, loss and backward (default inference)")  # fmt: skip
    add_device_argument(parser)
    parser.add_argument("--precision", "--dtype", choices=(*PRECISIONS, *PRECISIONS.values()), default="fp32",
                        help="bf16 and fp16 run under autocast (--dtype is an alias)")  # fmt: skip
    parser.add_argument("--batch-size", "--batch", type=int, nargs="+", metavar="B",
                        help="one or more (default: 1, 2, 4, ... to the limit; --batch is an alias)")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5, help="timed runs per batch size (default 5)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--backend", choices=("auto", "reference", "native", "triton"), default="auto")
    parser.add_argument("--compile", action="store_true", help="compile the model with torch.compile")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import torch

    import spikingformer
    from spikingformer.benchmarks import calibrate, example_input, sweep
    from spikingformer.neurons import use_backend
    from spikingformer.reports.inputs import open_model
    from spikingformer.training.machine import processor
    from spikingformer.training.setup import choose_device

    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    device, dtype = choose_device(args.device), PRECISIONS.get(args.precision, args.precision)
    opened = open_model(args.model)
    model = opened.model
    if not opened.trained:
        calibrate(model, example_input(model, 2, torch.device("cpu"), seed=1))
    if args.compile:
        model.compile()  # in place: it stays a model of this package
    header = {
        "model": args.model,
        "weights": "trained" if opened.trained else "random, calibrated",
        "machine": f"{processor()}, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "backend": args.backend,
        "compiled": args.compile,
        "versions": {"spikingformer": spikingformer.__version__, "torch": torch.__version__},
    }
    rows = []
    with use_backend(args.backend):
        results = sweep(model, args.batch_size, args.mode, str(device), getattr(torch, dtype), args.repeats)
        if not args.json:
            where = header["gpu"] or header["machine"]
            print(f"{args.model} ({header['weights']} weights), {args.mode}, {dtype} on {where}")
            print(f"{'batch':>6} {'samples/s':>10} {'ms':>9} {'spread':>7} {'memory MB':>10} {'firing':>7}")
        for r in results:
            rows.append(asdict(r))
            if not args.json:
                print(
                    f"{r.batch:6d} {r.samples_per_second:10.1f} {r.milliseconds:9.1f} {r.spread:7.0%}"
                    f" {r.peak_memory_mb:10.0f} {r.firing_rate:7.1%}",
                    flush=True,
                )
    if args.json:
        print(json.dumps({**header, "results": rows}, indent=2))
    return 0
