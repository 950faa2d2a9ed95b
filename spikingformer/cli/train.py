"""`spikingformer train RECIPE [key=value ...]`: one run into one folder."""

import argparse

from spikingformer.cli.recipe_help import print_fields, print_recipes


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a model from a recipe",
        description="Trains a model from a recipe. Its folder receives best.safetensors, last.safetensors, "
        "state.safetensors (to resume), recipe.yaml, metrics.jsonl, tensorboard/. The first SIGTERM or "
        "Ctrl-C saves and exits with status 75; a second one exits at once. For several processes: "
        "torchrun --nproc-per-node N -m spikingformer train ...",
        epilog="example: spikingformer train recipes/digits/spikingformer_cml.yaml epochs=2 seed=7 --output runs/a",
    )
    parser.add_argument("recipe", nargs="?", help="a recipe file, or the folder of a run (its recipe.yaml)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to the recipe, e.g. model.embed_dim=128"
    )
    parser.add_argument("--output", help="folder of the run (default: runs/RECIPE-TIME)")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the folder's last checkpoint, if there is one"
    )
    parser.add_argument("--list", action="store_true", help="list the recipes that come with the package, and exit")
    parser.add_argument("--fields", action="store_true", help="list every key of a recipe with its meaning, and exit")
    parser.add_argument(
        "--json", action="store_true", help="print the result (the list, the fields) as one JSON object"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.list:
        return print_recipes(args.json)
    if args.fields:
        return print_fields(args.json)
    if args.recipe is None:
        raise ValueError("no recipe given: `spikingformer train --list` lists those that come with the package")
    import json
    import time
    from dataclasses import asdict
    from pathlib import Path

    from spikingformer.training.distributed import read_world
    from spikingformer.training.loop import StoppedBySignal
    from spikingformer.training.recipe import load_recipe
    from spikingformer.training.run import train
    from spikingformer.training.run_folder import RECIPE_FILE
    from spikingformer.training.signals import SAVED_AND_LEFT

    given = Path(args.recipe)
    is_run = (given / RECIPE_FILE).is_file()
    recipe = load_recipe(given / RECIPE_FILE if is_run else args.recipe, args.overrides)
    if args.output:
        folder = Path(args.output)
    elif is_run and args.resume:
        folder = given
    elif args.resume or read_world().size > 1:
        raise ValueError("--output FOLDER is needed with --resume and with several processes: all must know the folder")
    else:
        folder = Path("runs") / f"{given.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        result = train(recipe, folder, args.resume)
    except StoppedBySignal:
        return SAVED_AND_LEFT
    if args.json and read_world().is_first:
        print(json.dumps(asdict(result)))
    return 0
