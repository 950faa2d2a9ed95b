"""`spikingformer data`: fetch, unpack and check data sets."""

import argparse

from spikingformer.cli.data_events import add_data_parsers


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "data",
        help="fetch, unpack and check data sets",
        description="Puts data sets where recipes look for them, and says what is wrong with a folder.",
    )
    inner = parser.add_subparsers(dest="data_command", metavar="WHAT", required=True)
    for name in ("cifar10", "cifar100"):
        cifar = inner.add_parser(name, help=f"download {name} through torchvision and verify every file")
        cifar.add_argument("--root", default="data", metavar="DIR", help="folder to put it in (default: data)")
        cifar.add_argument("--from", dest="source", metavar="FILE", help="the official .tar.gz, if it is here already")
        cifar.set_defaults(run=run_cifar, name=name)
    imagenet = inner.add_parser("imagenet", help="the official ILSVRC2012 archives into train/ and val/")
    imagenet.add_argument("--from", dest="source", required=True, metavar="DIR", help="folder of the three archives")
    imagenet.add_argument(
        "--root", default="data/imagenet", metavar="DIR", help="folder to fill (default: data/imagenet)"
    )
    imagenet.add_argument("--subset", action="store_true", help="not the full set: do not compare the counts")
    imagenet.set_defaults(run=run_imagenet)
    check = inner.add_parser("check", help="what is wrong with a data folder, before a long run")
    check.add_argument("name", help="digits, cifar10, cifar100, folder, tar or wds")
    check.add_argument("--root", default="data", metavar="DIR", help="folder of the data set (default: data)")
    check.add_argument(
        "--every", type=int, default=1, metavar="N", help="decode only each N-th picture (default 1: all)"
    )
    check.add_argument("--workers", type=int, default=2, help="decoding threads (default 2)")
    check.add_argument("--json", action="store_true", help="print one JSON object")
    check.set_defaults(run=run_check)
    add_data_parsers(inner)


def run_cifar(args: argparse.Namespace) -> int:
    import shutil
    from pathlib import Path

    from torchvision.datasets import CIFAR10, CIFAR100

    from spikingformer.data.cifar import load_cifar

    source = CIFAR10 if args.name == "cifar10" else CIFAR100
    root = Path(args.root)
    root.mkdir(parents=True, exist_ok=True)
    if args.source:
        given = Path(args.source)
        if not given.is_file():
            raise ValueError(f"--from {given}: no such file")
        if given.resolve() != (root / source.filename).resolve():
            shutil.copyfile(given, root / source.filename)
    try:
        source(root, download=True)  # checks the archive's MD5 before unpacking it
    except RuntimeError as error:
        raise ValueError(f"{args.name}: {error}. Fetch {source.filename} by hand and give it with --from.") from None
    counts = [len(load_cifar(args.name, root, part)) for part in ("train", "test")]
    print(f"{root / source.base_folder}: {counts[0]} training and {counts[1]} test pictures, every file verified")
    return 0


def run_imagenet(args: argparse.Namespace) -> int:
    import sys
    from pathlib import Path

    from spikingformer.data.imagenet import prepare_imagenet

    def report(text: str) -> None:
        print(text, file=sys.stderr, end="\r" if sys.stderr.isatty() else "\n", flush=True)

    counts = prepare_imagenet(Path(args.source), Path(args.root), report, verify_counts=not args.subset)
    print(f"{args.root}: {counts.classes} classes, {counts.train} training and {counts.val} validation pictures")
    return 0


def run_check(args: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from spikingformer.data.checking import check_data
    from spikingformer.data.settings import DataSettings

    if args.every < 1 or args.workers < 1:
        raise ValueError(f"--every {args.every}, --workers {args.workers}: expected at least 1")
    channels = 1 if args.name == "digits" else 3
    findings = check_data(DataSettings(name=args.name, root=args.root, channels=channels), args.workers, args.every)
    if args.json:
        print(json.dumps(asdict(findings)))
    else:
        for part, facts in findings.facts.items():
            print(f"{part}: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items()))
        for problem in findings.problems:
            print(f"problem: {problem}")
        print("nothing wrong found" if not findings.problems else f"{len(findings.problems)} problems")
    return 1 if findings.problems else 0
