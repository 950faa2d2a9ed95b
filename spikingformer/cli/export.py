"""`spikingformer export`: writes a checkpoint to a file that runs elsewhere."""

import argparse
import json
from pathlib import Path

FORMATS = ("onnx", "torch", "nir", "weights", "int8", "hub")
SUFFIX = {
    "onnx": ".onnx",
    "torch": ".pt2",
    "nir": ".nir",
    "weights": "-folded.safetensors",
    "int8": "-int8.safetensors",
    "hub": "-hub",
}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "export",
        help="write a trained model as ONNX, torch.export, NIR, folded or int8 weights, or a hub folder",
        description="Folds BatchNorm (checked in float64), writes the model in another format, and runs the file once "
        "to compare it with the model. Every file contains its preprocessing, class names, time steps and the "
        "checkpoint's hash. `spikingformer predict` and `spikingformer evaluate` run every format except NIR.",
    )
    parser.add_argument(
        "checkpoint",
        help="a run's folder (its best model), a checkpoint in it, a converted file, or MODEL.TAG of weights that come "
        "with the package",
    )
    parser.add_argument("--to", required=True, choices=FORMATS, help="format to write")
    parser.add_argument("-o", "--output", help="file to write (default: beside the checkpoint)")
    parser.add_argument(
        "--streaming", action="store_true", help="onnx, torch: one time step, with the state as inputs and outputs"
    )
    parser.add_argument("--spikes", action="store_true", help="onnx: add the spikes of every layer as outputs")
    parser.add_argument(
        "--compile", action="store_true", help="torch: compile for this processor (AOTInductor; needs a C++ compiler)"
    )
    parser.add_argument("--part", default="", help="nir: the module to write, for example blocks.0.mlp")
    parser.add_argument(
        "--energy",
        metavar="FILE",
        help="hub: energy estimate for the model card, from `spikingformer energy ... --data --json`",
    )
    parser.add_argument("--licence", metavar="NAME", help="hub: licence of the weights (default: apache-2.0)")
    parser.add_argument("--no-check", action="store_true", help="skip the comparison of the file with the model")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from spikingformer.export import (
        checkpoint,
        export_aot,
        export_int8,
        export_nir,
        export_onnx,
        export_torch,
        export_weights,
    )
    from spikingformer.training.checkpoint import checkpoint_file
    from spikingformer.weights import shipped_file

    _refuse_what_the_format_lacks(args)
    source = Path(args.checkpoint) if shipped_file(args.checkpoint) else checkpoint_file(args.checkpoint)
    target = Path(args.output) if args.output else _beside(source, args)
    if target.resolve() == source.resolve():
        raise ValueError(f"the output would overwrite the checkpoint {source}: name another file with -o")
    if args.to == "hub":
        return _write_hub_folder(source, target, args)
    model, metadata = checkpoint.load_checkpoint(source)
    check = not args.no_check
    if args.to == "onnx":
        report = export_onnx(
            model, target, metadata=metadata, streaming=args.streaming, spikes=args.spikes, check=check
        )
    elif args.to == "torch":
        write = export_aot if args.compile else export_torch
        report = write(model, target, metadata=metadata, streaming=args.streaming, check=check)
    elif args.to == "int8":
        report = export_int8(model, target, metadata=metadata, check=check)
    elif args.to == "weights":
        report = export_weights(model, target, metadata=metadata, check=check)
    else:
        report = export_nir(model, target, part=args.part, metadata=metadata)
    summary = {"format": args.to, **report.summary()}
    if args.json:
        print(json.dumps(summary, indent=2))
        return 0
    print(f"{report.path}  {report.size_bytes / 1e6:.2f} MB  {metadata.model}, T={metadata.time_steps}")
    if report.fold is not None:
        print(
            f"BatchNorm folded: {report.fold.spikes_different} of {report.fold.spikes} neuron updates differ in "
            f"float64, logits by at most {report.fold.logit_difference:.1e}"
        )
    if report.logit_difference is not None:
        why = " (from rounding to 8 bits; `spikingformer evaluate` measures the accuracy)" if args.to == "int8" else ""
        print(f"run once on random input: logits differ from the model's by at most {report.logit_difference:.1e}{why}")
    return 0


def _write_hub_folder(source: Path, target: Path, args: argparse.Namespace) -> int:
    from spikingformer.export.checkpoint import load_checkpoint
    from spikingformer.export.hub import save_hub_folder
    from spikingformer.export.model_card import CardFacts, EnergyEstimate
    from spikingformer.training.checkpoint import read_model_file

    energy = EnergyEstimate.read(args.energy) if args.energy else None
    model, metadata = load_checkpoint(source)
    _, info = read_model_file(source)
    card = CardFacts.from_run(info, energy, args.licence or CardFacts.licence)
    folder = save_hub_folder(model, target, metadata, card)
    files = sorted(p.name for p in folder.iterdir())
    summary = {"format": "hub", "path": str(folder), "files": files, "checkpoint_sha256": metadata.checkpoint_sha256}
    print(json.dumps(summary, indent=2) if args.json else f"{folder}: {', '.join(files)}")
    return 0


def _refuse_what_the_format_lacks(args: argparse.Namespace) -> None:
    for flag, formats in (
        ("streaming", ("onnx", "torch")),
        ("spikes", ("onnx",)),
        ("compile", ("torch",)),
        ("part", ("nir",)),
        ("energy", ("hub",)),
        ("licence", ("hub",)),
    ):
        if getattr(args, flag) and args.to not in formats:
            raise ValueError(f"--{flag} is for --to {' and '.join(formats)}, got --to {args.to}: omit it")


def _beside(source: Path, args: argparse.Namespace) -> Path:
    name = source.stem if source.is_file() else source.name  # MODEL.TAG has no suffix
    part = f"-{args.part}" if args.part else ""
    return source.with_name(name + ("-step" if args.streaming else "") + part + SUFFIX[args.to])
