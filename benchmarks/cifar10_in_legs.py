"""The published CIFAR run (Spikingformer + CML-4-384, 400 + 10 epochs) on one GPU, in legs of a few minutes.

    python -m benchmarks.cifar10_in_legs --data FOLDER --output FOLDER --leg-seconds 540 --legs 1

Each call trains until its time is up, saves and leaves with status 75; the same call goes on, in a new process, on
another machine if the output folder came along. Status 0: the run is done, and its line of results is written.

The recipe is the published one. What makes it fit a GPU's minutes changes the arithmetic, not the recipe: augmentation
of whole batches on the GPU, bfloat16 autocast. `--batch-size N` other than 64 scales the learning rate by sqrt(N / 64),
the rule for Adam-like optimisers (arXiv 2205.10287), and the results then name another row.
"""

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

from spikingformer.reproduce.legs import seconds_limit, train_in_legs
from spikingformer.reproduce.result_files import RowResult, read_row, write_row
from spikingformer.reproduce.runs import collect
from spikingformer.training.recipe import Recipe, load_recipe
from spikingformer.training.signals import SAVED_AND_LEFT

RECIPES = {name: f"recipes/{name}/spikingformer_cml_4_384_400e.yaml" for name in ("cifar10", "cifar100")}
PUBLISHED_BATCH = 64
FAST = (
    "augment.engine=batched",
    "precision=bf16",
    "channels_last=true",
    "workers=0",
    "log.tensorboard=false",
    "checkpoint.every_seconds=60",
)


def run_overrides(recipe: str, batch_size: int, extra: list[str]) -> list[str]:
    """Everything that is changed in the published recipe."""
    changes = list(FAST)
    if batch_size != PUBLISHED_BATCH:
        rate = load_recipe(recipe).optimizer.learning_rate * math.sqrt(batch_size / PUBLISHED_BATCH)
        changes += [f"batch_size={batch_size}", f"optimizer.learning_rate={rate:.6g}"]
    return [*changes, *extra]


def row_name(data: str, changes: list[str]) -> str:
    """The published row's own name only where nothing of the recipe was changed but how it is computed."""
    own = [c for c in changes if c not in FAST and c.split("=")[0] not in ("data.root", "device", "threads", "compile")]
    name = f"{data}/spikingformer_cml_4_384_400e"
    return name if not own else f"{name}-changed"


def main(arguments: list[str] | None = None) -> int:
    """Runs legs; returns the exit status (0 done, 75 not yet)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="further changes to the recipe")
    parser.add_argument("--set", choices=sorted(RECIPES), default="cifar10", dest="name")
    parser.add_argument("--data", required=True, metavar="DIR", help="folder that holds the data set")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the run")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), metavar="DIR")
    parser.add_argument("--leg-seconds", type=float, default=540.0, help="length of a leg (default: %(default)s)")
    parser.add_argument("--legs", type=int, help="legs in this call (default: until the run is done)")
    parser.add_argument("--batch-size", type=int, default=PUBLISHED_BATCH, help="default: %(default)s, as published")
    args = parser.parse_intermixed_args(arguments)

    recipe = RECIPES[args.name]
    changes = run_overrides(recipe, args.batch_size, [f"data.root={args.data}", *args.overrides])
    legs = train_in_legs(recipe, changes, args.output, seconds_limit(args.leg_seconds), args.legs)
    if not legs.finished:
        print(f"not finished after {legs.legs} legs; the same call goes on", file=sys.stderr)
        return SAVED_AND_LEFT
    finished: Recipe = load_recipe(recipe, changes)
    row = row_name(args.name, changes)
    known = read_row(args.results, row) or RowResult(row, recipe)
    record = collect(args.output, finished, tuple(changes), energy=False, recipe_file=recipe)
    print(write_row(args.results, known.with_run(record)))
    print(json.dumps({k: v for k, v in asdict(record).items() if k not in ("curve", "machine", "resolved_recipe")}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
