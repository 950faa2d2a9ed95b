"""`spikingformer report`: writes one HTML page about a run."""

import argparse
import json
from pathlib import Path

from spikingformer.cli.device import add_device_argument


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to the parser."""
    parser = subparsers.add_parser(
        "report",
        help="write a page about a run: curves, confusion, firing rates, energy, spikes, attention",
        description=(
            "Evaluates a trained model on the test split and writes one self-contained HTML page: learning curves, "
            "confusion matrix, accuracy after each time step, firing rates, energy, spikes and attention of chosen "
            "samples, recipe, versions, hardware. It can be read without a network."
        ),
    )
    parser.add_argument(
        "target",
        metavar="RUN|CHECKPOINT",
        help="a run's folder (its best model), a .safetensors file, a hub folder, or MODEL.TAG of weights that come "
        "with the package",
    )
    parser.add_argument(
        "--data", nargs="?", const="", default="", metavar="NAME", help="data set (default: the run's own)"
    )
    parser.add_argument("--root", metavar="DIR", help="folder that holds the data set")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: report.html beside the model file")
    parser.add_argument(
        "--samples", type=int, default=1000, metavar="N", help="samples counted for energy (default 1000)"
    )
    parser.add_argument("--show", type=int, default=6, metavar="N", help="samples to show in detail (default 6)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="B", help="samples per batch (default 64)")
    add_device_argument(parser)
    parser.add_argument("--figure", type=Path, metavar="FILE.svg", help="also write one overview figure")
    parser.add_argument("--json", action="store_true", help="print the path of the page, accuracy and energy as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    for name in ("samples", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.show < 0:
        raise ValueError(f"--show must be at least 0, got {args.show}")
    from rich.console import Console

    from spikingformer.reports.collect import collect
    from spikingformer.reports.page import render
    from spikingformer.training.checkpoint import checkpoint_file

    output = args.output or checkpoint_file(args.target).parent / "report.html"
    with Console(stderr=True).status("evaluating, counting, drawing"):
        data = collect(args.target, args.data, args.root, args.samples, args.show, args.batch_size, args.device)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(render(data), encoding="utf-8")
        if args.figure is not None:
            from spikingformer.reports.overview import overview

            args.figure.parent.mkdir(parents=True, exist_ok=True)
            args.figure.write_text(overview(data), encoding="utf-8")
    energy = data.energy["totals"]["energy_mj"]
    if args.json:
        print(json.dumps({"report": str(output), "top1": data.top1, "energy_mj": energy, "samples": data.samples}))
    else:
        print(f"{output}  ({output.stat().st_size / 1e6:.1f} MB): top-1 {data.top1:.2f} %, {energy:.4g} mJ per sample")
    return 0
