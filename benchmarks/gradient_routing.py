"""The paper's own claim, measured: where "fire, then pool" sends its gradient, and how far that is from CML's.

    python -m benchmarks.gradient_routing digits
    python -m benchmarks.gradient_routing cifar10 --data FOLDER --max-steps 300

Trains each model by its recipe and measures on the way; writes benchmarks/results/gradient_routing_SET.json and, from
it, docs/precise_gradient.md with its figures.
"""

import argparse
import sys
from pathlib import Path

from spikingformer.reproduce.pages import write_pages
from spikingformer.reproduce.result_files import write_study
from spikingformer.reproduce.routing_study import routing_over_training
from spikingformer.training.machine import describe_machine
from spikingformer.training.recipe import Recipe, load_recipe

MODELS = {"digits": ("spikformer", "spikformer_cml", "spikingformer", "spikingformer_cml"),
          "cifar10": ("spikingformer", "spikingformer_cml")}  # fmt: skip
HERE = Path(__file__).resolve().parent


def recipe_of(data: str, model: str, overrides: list[str]) -> Recipe:
    base = "digits/spikingformer_cml" if data == "digits" else "cifar10/spikingformer_cml_small_cpu"
    return load_recipe(base, [f"model.name={model}_4_384", *overrides])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=sorted(MODELS))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--data", dest="root", metavar="DIR", help="folder that holds cifar-10-batches-py")
    parser.add_argument("--max-steps", type=int, help="optimiser steps a model (default: the recipe's end)")
    parser.add_argument("--points", type=int, default=8, help="measurements a model (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=128, help="samples a measurement (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs")
    args = parser.parse_intermixed_args()
    overrides = [*args.overrides, *([f"data.root={args.root}"] if args.root else [])]
    runs = [
        routing_over_training(recipe_of(args.data, m, overrides), args.points, args.max_steps, args.pictures)
        for m in MODELS[args.data]
    ]
    places = (args.root, str(args.results), str(args.docs))
    shown = ["FOLDER" if a in places else a for a in sys.argv[1:]]
    command = " ".join(["python -m benchmarks.gradient_routing", *shown])
    values = {"data": args.data, "overrides": list(args.overrides), "runs": runs}
    print(write_study(args.results, f"gradient_routing_{args.data}", command, describe_machine(), values))
    for path in write_pages(args.results, args.docs):
        print(path)


if __name__ == "__main__":
    main()
