"""`spikingformer evaluate CHECKPOINT`: accuracy and loss on the test split."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from spikingformer.cli.device import add_device_argument, refuse_other_than_cpu
from spikingformer.cli.unread import refuse_given

if TYPE_CHECKING:
    import torch
    from torch import nn

    from spikingformer.training.checkpoint import ModelInfo


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="measure accuracy and loss of a checkpoint or an exported file",
        description="Measures top-1, top-5, loss, and the accuracy of each class and after each time step, on the test "
        "split of the data set that the checkpoint was trained on (or of --data). An exported file does not name "
        "its data set, so it needs --data; it runs on the CPU.",
        epilog="examples: spikingformer evaluate runs/a/best.safetensors --json; "
        "spikingformer evaluate runs/a/best-int8.safetensors --data cifar10",
    )
    parser.add_argument(
        "checkpoint",
        help="a run's folder (its best model), a checkpoint in it, a converted or exported file, or MODEL.TAG of "
        "weights that come with the package",
    )
    parser.add_argument("--data", metavar="NAME", help="data set, e.g. cifar10 (default: the one it was trained on)")
    parser.add_argument("--root", metavar="DIR", help="folder of the data set (default: that of the training)")
    parser.add_argument("--img-size", type=int, metavar="PIXELS", help="evaluate at another picture size")
    parser.add_argument("--batch-size", type=int, default=128, help="samples per batch (default 128)")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode pictures (default 2)")
    add_device_argument(parser)
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="bf16 and fp16 run under autocast"
    )
    parser.add_argument(
        "--anytime", action="store_true", help="also measure stopping early, at several softmax margins"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def _open(args: argparse.Namespace) -> tuple[nn.Module, ModelInfo, torch.device]:
    """The model in eval mode, its description, and the device to run it on."""
    import torch

    from spikingformer.export.opened import is_exported, open_exported
    from spikingformer.models import SpikingTransformer
    from spikingformer.training.checkpoint import load_model
    from spikingformer.training.setup import choose_device

    if not is_exported(args.checkpoint):
        model, info = load_model(args.checkpoint, args.img_size)
        if args.anytime and not isinstance(model, SpikingTransformer):
            raise ValueError(f"--anytime: {info.name} has no time steps to stop after; it is for spiking models")
        device = choose_device(args.device)
        return model.to(device), info, device
    exported = f"{args.checkpoint} is an exported file"
    refuse_other_than_cpu(args.device, f"{exported}, which runs on the CPU here")
    refuse_given(args, ["img_size"], f"{exported}, which has a fixed picture size: omit it")
    if args.precision != "fp32":
        refuse_given(args, ["precision"], f"{exported}, which has its own precision: omit it")
    model, info = open_exported(args.checkpoint)
    if args.anytime and not isinstance(model, SpikingTransformer):
        raise ValueError(f"--anytime: {exported}, which is evaluated with all its time steps: give the checkpoint")
    return model, info, torch.device("cpu")


def run(args: argparse.Namespace) -> int:
    import json
    import math
    import time
    from dataclasses import asdict

    import torch

    from spikingformer.cli import anytime
    from spikingformer.data.loading import ReportedEvaluation
    from spikingformer.models import SpikingTransformer
    from spikingformer.reports.inputs import checkpoint_data
    from spikingformer.training.distributed import World
    from spikingformer.training.evaluation import evaluate
    from spikingformer.training.inputs import class_names_of, create_test_loader
    from spikingformer.training.reporting import make_console, progress_bar
    from spikingformer.training.setup import autocast_factory

    if args.batch_size < 1 or args.workers < 0:
        raise ValueError(
            f"--batch-size {args.batch_size}, --workers {args.workers}: expected at least 1 and at least 0"
        )
    model, info, device = _open(args)
    settings = checkpoint_data(info, args.data, args.root, args.img_size)
    classes = int(info.kwargs["num_classes"])
    loader, class_names = create_test_loader(
        settings, args.batch_size, args.workers, device, World(), class_names_of(info), classes
    )
    passes = 2 if args.anytime else 1
    began = time.monotonic()
    with (
        progress_bar(make_console(), passes * math.ceil(loader.samples / args.batch_size), 0, "batches") as bar,
        autocast_factory(args.precision, device)(),
    ):
        loader = ReportedEvaluation(loader, lambda: bar.advance(settings.name))
        found = evaluate(model, loader, classes, every_step=isinstance(model, SpikingTransformer))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.monotonic() - began
        points = anytime.curve(model, loader) if args.anytime and isinstance(model, SpikingTransformer) else []
    if args.json:
        per_class = [
            {"name": n, "right": r, "samples": a} for n, (r, a) in zip(class_names, found.per_class, strict=True)
        ]
        values = {**asdict(found), "per_class": per_class, "seconds": seconds, "checkpoint": args.checkpoint}
        values |= {"model": info.name, "data": settings.name, "image_size": settings.image_size, "epoch": info.epoch}
        if points:
            values["anytime"] = anytime.as_json(points)
        print(json.dumps(values))
        return 0
    print(f"{info.name} on {settings.name}, {found.samples} test samples, {settings.image_size}x{settings.image_size}")
    print(
        f"top-1 {found.top1:.2f} %   top-5 {found.top5:.2f} %   loss {found.loss:.4f}   "
        f"{found.samples / seconds:.0f} samples/s"
    )
    if found.top1_after_step:
        print("top-1 after each time step: " + "  ".join(f"{value:.2f} %" for value in found.top1_after_step))
    if found.unreadable:
        print(f"{found.unreadable} unreadable pictures were skipped")
    if points:
        print(anytime.text(points))
    rows = sorted(zip(class_names, found.per_class, strict=True), key=lambda row: row[1][0] / max(row[1][1], 1))
    shown = rows if len(rows) <= 20 else rows[:10]
    print("per class" + ("" if len(rows) <= 20 else f", the 10 worst of {len(rows)} (all of them: --json)") + ":")
    for name, (right, samples) in shown:
        print(f"  {name:<24} {right:>5}/{samples:<5} {100 * right / max(samples, 1):6.2f} %")
    return 0
