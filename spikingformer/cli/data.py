"""`spikingformer data`: downloads, unpacks and checks data sets."""

import argparse
from typing import TYPE_CHECKING

from spikingformer.cli.data_events import add_data_parsers

if TYPE_CHECKING:
    from spikingformer.data.settings import DataSettings


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "data",
        help="download, unpack and check data sets",
        description="Puts data sets where recipes look for them, and checks data folders.",
    )
    inner = parser.add_subparsers(dest="data_command", metavar="WHAT", required=True)
    for name in ("cifar10", "cifar100"):
        cifar = inner.add_parser(name, help=f"download {name} through torchvision and verify every file")
        cifar.add_argument("--root", default="data", metavar="DIR", help="folder to put it in (default: data)")
        cifar.add_argument("--from", dest="source", metavar="FILE", help="the official .tar.gz, if you already have it")
        cifar.add_argument("--json", action="store_true", help="print one JSON object")
        cifar.set_defaults(run=run_cifar, name=name)
    imagenet = inner.add_parser("imagenet", help="unpack the official ILSVRC2012 archives into train/ and val/")
    imagenet.add_argument("--from", dest="source", required=True, metavar="DIR", help="folder of the three archives")
    imagenet.add_argument(
        "--root", default="data/imagenet", metavar="DIR", help="folder to fill (default: data/imagenet)"
    )
    imagenet.add_argument(
        "--subset", action="store_true", help="a part of the full set: do not check the number of pictures"
    )
    imagenet.add_argument("--json", action="store_true", help="print one JSON object")
    imagenet.set_defaults(run=run_imagenet)
    check = inner.add_parser("check", help="find problems of a data folder before a long run")
    check.add_argument("name", help="digits, cifar10, cifar100, folder, tar or wds")
    check.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="as for train, e.g. data.train_shards=... data.channels=1",
    )
    check.add_argument("--root", metavar="DIR", help="folder of the data set (default: data)")
    check.add_argument(
        "--every", type=int, default=1, metavar="N", help="decode only every N-th picture (default 1: all)"
    )
    check.add_argument("--workers", type=int, default=2, help="decoding threads (default 2)")
    check.add_argument("--json", action="store_true", help="print one JSON object")
    check.set_defaults(run=run_check)
    add_data_parsers(inner)


def run_cifar(args: argparse.Namespace) -> int:
    import json
    import shutil
    import sys
    from contextlib import redirect_stdout
    from pathlib import Path
    from urllib.error import URLError

    from torchvision.datasets import CIFAR10, CIFAR100
    from torchvision.datasets.utils import check_md5

    from spikingformer.data.cifar import load_cifar

    source = CIFAR10 if args.name == "cifar10" else CIFAR100
    root = Path(args.root)
    root.mkdir(parents=True, exist_ok=True)
    if args.source:
        given = Path(args.source)
        if not given.is_file():
            raise ValueError(f"--from {given}: no such file")
        if not check_md5(str(given), source.tgz_md5):
            raise ValueError(
                f"--from {given}: its MD5 is not that of the official {source.filename}, {source.tgz_md5}: it is "
                "another file or damaged; download it again"
            )
        if given.resolve() != (root / source.filename).resolve():
            shutil.copyfile(given, root / source.filename)
    try:
        with redirect_stdout(sys.stderr):  # torchvision prints to stdout, and --json must print one object only
            source(root, download=True)  # checks the archive's MD5 before unpacking it
    except (RuntimeError, URLError) as error:
        raise ValueError(
            f"{args.name}: {error}. Download {source.filename} yourself and give it with --from."
        ) from None
    counts = [len(load_cifar(args.name, root, part)) for part in ("train", "test")]
    folder = root / source.base_folder
    if args.json:
        print(json.dumps({"data_set": args.name, "folder": str(folder), "train": counts[0], "test": counts[1]}))
    else:
        print(f"{folder}: {counts[0]} training and {counts[1]} test pictures, every file verified")
    return 0


def run_imagenet(args: argparse.Namespace) -> int:
    import json
    import sys
    from dataclasses import asdict
    from pathlib import Path

    from spikingformer.data.imagenet import prepare_imagenet

    def report(text: str) -> None:
        print(text, file=sys.stderr, end="\r" if sys.stderr.isatty() else "\n", flush=True)

    counts = prepare_imagenet(Path(args.source), Path(args.root), report, verify_counts=not args.subset)
    if args.json:
        print(json.dumps({"data_set": "imagenet", "folder": args.root, **asdict(counts)}))
    else:
        print(f"{args.root}: {counts.classes} classes, {counts.train} training and {counts.val} validation pictures")
    return 0


def _settings(name: str, root: str | None, overrides: list[str]) -> "DataSettings":
    """The data section of a recipe that sets these values only.

    Raises:
        ValueError: an override of another section, an unknown key or a wrong type.
    """
    from pydantic import BaseModel, ValidationError

    from spikingformer.data.settings import DataSettings
    from spikingformer.training.recipe_text import explain_errors, split_override, to_json

    class Recipe(BaseModel):
        data: DataSettings

    values: dict[str, object] = {"name": name, "channels": 1 if name == "digits" else 3}
    for text in overrides:
        keys, value = split_override(text)
        if len(keys) != 2 or keys[0] != "data" or keys[1] == "name":
            raise ValueError(f"override {text!r}: data check takes keys of the data section, such as data.channels=1")
        values[keys[1]] = value
    if root is not None:
        values["root"] = root
    try:
        return Recipe.model_validate_json(to_json({"data": values}, "overrides")).data
    except ValidationError as error:
        raise ValueError(explain_errors(error, Recipe, "overrides")) from None


def run_check(args: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from spikingformer.data.checking import check_data

    if args.every < 1 or args.workers < 1:
        raise ValueError(f"--every {args.every}, --workers {args.workers}: expected at least 1")
    findings = check_data(_settings(args.name, args.root, args.overrides), args.workers, args.every)
    if args.json:
        print(json.dumps(asdict(findings)))
    else:
        for part, facts in findings.facts.items():
            print(f"{part}: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items()))
        for problem in findings.problems:
            print(f"problem: {problem}")
        count = len(findings.problems)
        print(f"{count} problem{'s' * (count > 1)}" if count else "no problems found")
    return 1 if findings.problems else 0
