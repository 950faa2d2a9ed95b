"""`spikingformer predict CHECKPOINT PATH...`: classifies pictures or recordings."""

import argparse

from spikingformer.cli import stream
from spikingformer.cli.device import add_device_argument, refuse_other_than_cpu
from spikingformer.cli.unread import refuse_given

DEFAULT_MODEL = "spikingformer_cml_4_384.cifar10_minutes"
TOP, BATCH_SIZE = 5, 32
ANIMATIONS = (".gif",)  # their first picture; data sets hold none
RECORDINGS = (".aedat", ".bin", ".bs2")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "predict",
        help="classify pictures or recordings",
        description="Prints the most likely classes of each file. Folders are searched. Photos are rotated as their "
        "EXIF data says. Event models take .aedat, .bin and .bs2 files.",
        epilog="examples: spikingformer predict runs/a/best.safetensors photo.jpg holiday/ --top 3; "
        f"spikingformer predict photo.jpg (with {DEFAULT_MODEL}, which comes with the package)",
    )
    parser.add_argument(
        "checkpoint",
        help="a run's folder (its best model), a checkpoint, a converted or exported file, or MODEL.TAG of weights "
        f"that come with the package; may be omitted before pictures (default: {DEFAULT_MODEL})",
    )
    parser.add_argument("paths", nargs="*", default=[], metavar="PATH", help="files or folders")
    parser.add_argument(
        "--samples",
        type=int,
        default=0,
        metavar="N",
        help="also classify the first N samples of its data set's test split",
    )
    parser.add_argument("--top", type=int, metavar="K", help=f"classes to show for each file (default {TOP})")
    parser.add_argument("--batch-size", type=int, metavar="B", help=f"files per batch (default {BATCH_SIZE})")
    add_device_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object per file, or per window")
    stream.add_options(parser)
    parser.set_defaults(run=run)


def _holds_pictures(path: str) -> bool:
    """Whether it is a folder of pictures. A model's folder is not, even if it holds pictures beside its weights."""
    from pathlib import Path

    found = {p.suffix.lower() for p in Path(path).iterdir()} if Path(path).is_dir() else set()
    return bool(found & set(_picture_suffixes())) and ".safetensors" not in found


def _picture_suffixes() -> tuple[str, ...]:
    from spikingformer.data.folder import PICTURE_SUFFIXES

    return (*PICTURE_SUFFIXES, *ANIMATIONS)


def run(args: argparse.Namespace) -> int:
    import json
    import sys
    from zipfile import is_zipfile

    if args.checkpoint.lower().endswith(_picture_suffixes()) or _holds_pictures(args.checkpoint):
        args.checkpoint, args.paths = DEFAULT_MODEL, [args.checkpoint, *args.paths]
        print(f"no model given: using {DEFAULT_MODEL}, which knows the ten classes of CIFAR-10", file=sys.stderr)
    of_torch = is_zipfile(args.checkpoint)  # pytorch_model.bin, for one
    if args.checkpoint.lower().endswith(RECORDINGS) and not of_torch:
        raise ValueError(
            f"{args.checkpoint} has the name of a recording, not of a model: give an event model before it, "
            f"`spikingformer predict MODEL {args.checkpoint}`"
        )
    if args.samples < 0:
        raise ValueError(f"--samples must be at least 0, got {args.samples}")
    if args.stream is not None:
        return stream.run(args)
    refuse_given(args, stream.OPTIONS, "only with --stream RECORDING: give --stream instead of files, or omit this")
    if not args.paths and not args.samples:
        raise ValueError("nothing to predict: give files or folders, or --samples N")
    top, batch_size = TOP if args.top is None else args.top, BATCH_SIZE if args.batch_size is None else args.batch_size
    if top < 1 or batch_size < 1:
        raise ValueError(f"--top {top}, --batch-size {batch_size}: expected at least 1")

    from spikingformer.cli.prediction import predict_files, predict_samples
    from spikingformer.export.opened import is_exported, open_exported
    from spikingformer.training.checkpoint import load_model
    from spikingformer.training.setup import choose_device

    if is_exported(args.checkpoint):
        refuse_other_than_cpu(args.device, f"{args.checkpoint} is an exported file, which runs on the CPU here")
        model, info = open_exported(args.checkpoint)
    else:
        model, info = load_model(args.checkpoint)
        model = model.to(choose_device(args.device))
    suffixes, others = _picture_suffixes(), RECORDINGS
    if info.kind == "events":
        suffixes, others = others, suffixes
    files = find_files(args.paths, suffixes)
    if wrong := [file for file in files if file.lower().endswith(others)]:
        made_for = "pictures" if info.kind == "pictures" else "recordings of event cameras"
        raise ValueError(f"{wrong[0]}: {args.checkpoint} was trained on {made_for}: give another model or other files")
    unreadable = 0
    sources = [predict_files(model, info, files, top, batch_size)]
    if args.samples:
        sources.append(predict_samples(model, info, args.samples, top))
    for source in sources:
        for row in source:
            unreadable += "error" in row
            if args.json:
                print(json.dumps(row), flush=True)
            elif "error" in row:
                print(f"{row['file']}: not readable ({row['error']})")
            else:
                ranked = "  ".join(f"{c['name']} {c['probability']:.1%}" for c in row["classes"])
                truth = f"  (is {row['label']})" if "label" in row else ""
                steps = "  after each step: " + ", ".join(row["after_step"]) if "after_step" in row else ""
                print(f"{row['file']}: {ranked}{truth}{steps}")
                if "hint" in row:
                    print(f"{row['file']}: {row['hint']}", file=sys.stderr)
    if unreadable:
        raise ValueError(
            f"{unreadable} of {len(files)} files could not be read (named above)"
            + ("; the others were classified" if unreadable < len(files) else "")
        )
    return 0


def find_files(paths: list[str], suffixes: tuple[str, ...]) -> list[str]:
    """Files as given, folders searched for files of a known kind.

    Raises:
        ValueError: a path that is not there, or a folder without such files.
    """
    from pathlib import Path

    found = []
    for text in paths:
        path = Path(text)
        if path.is_file():
            found.append(str(path))
        elif path.is_dir():
            inside = sorted(str(p) for p in path.rglob("*") if p.suffix.lower() in suffixes and p.is_file())
            if not inside:
                raise ValueError(f"{path}: no file in it ends in {', '.join(suffixes)}")
            found += inside
        else:
            raise ValueError(f"{path}: no such file or folder")
    return found
