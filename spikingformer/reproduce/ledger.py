"""What can be reproduced: rows of the published tables, and rows and studies of our own."""

import csv
import difflib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class AuthorsLog:
    """A training log its authors released. Top-1 in percent; epochs counted from 0."""

    file: str
    best: float
    best_epoch: int
    last: float
    mean_last10: float
    epochs: int
    pictures_per_second: float | None = None
    gpus: int | None = None
    total_time: str | None = None


@dataclass(frozen=True)
class Row:
    """One line of a table: a recipe, run once a seed.

    published: top-1 in percent, None for a row of our own. needs: what a run takes that may be missing.
    """

    id: str
    table: str
    label: str
    recipe: str
    needs: str
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (42,)
    published: float | None = None
    paper: str | None = None
    log: AuthorsLog | None = None
    energy: bool = False  # count energy and firing rates on the test part too


@dataclass(frozen=True)
class Table:
    """A group of rows. `train_samples`: of the data set, to turn pictures/s into hours."""

    name: str
    title: str
    rows: tuple[Row, ...]
    train_samples: int
    ours: bool = False  # a comparison of our own, not a published table


@cache
def published_tables() -> dict[str, Table]:
    """The published tables, from `published.json`."""
    values = json.loads((_FOLDER / "published.json").read_text(encoding="utf-8"))
    rows: dict[str, list[Row]] = {name: [] for name in values["tables"]}
    for r in values["rows"]:
        name = r["id"].split("/")[0]
        rows[name].append(
            Row(
                id=r["id"],
                table=name,
                label=r["label"],
                recipe=r["recipe"],
                needs=values["tables"][name]["needs"],
                published=r["top1"],
                paper=r["paper"],
                log=AuthorsLog(**r["log"]) if "log" in r else None,
            )
        )
    return {
        name: Table(name, t["title"], tuple(rows[name]), t["train_samples"]) for name, t in values["tables"].items()
    }


def published_curves() -> dict[str, dict[int, float]]:
    """Top-1 in percent after each epoch (from 0) of the released training logs, by row."""
    curves: dict[str, dict[int, float]] = {}
    with open(_FOLDER / "published_curves.csv", newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            epoch = int(line.pop("epoch"))
            for row, value in line.items():
                if value:
                    curves.setdefault(row, {})[epoch] = float(value)
    return curves


_MODELS = {
    "spikformer": "Spikformer, fire then pool",
    "spikformer_cml": "Spikformer, pool then fire (CML)",
    "spikingformer": "Spikingformer, fire then pool",
    "spikingformer_cml": "Spikingformer, pool then fire (CML)",
}


def _comparison(name: str, title: str, samples: int, recipe: str, overrides: tuple[str, ...], needs: str) -> Table:
    """The four models under one budget, three seeds each."""
    rows = tuple(
        Row(
            id=f"{name}/{model}",
            table=name,
            label=label,
            recipe=recipe.format(model=model),
            needs=needs,
            overrides=tuple(o.format(model=model) for o in overrides),
            seeds=(0, 1, 2),
            energy=True,
        )
        for model, label in _MODELS.items()
    )
    return Table(name, title, rows, samples, ours=True)


@cache
def own_tables() -> dict[str, Table]:
    """Comparisons and runs of our own."""
    tables = [
        _comparison(
            "orders-digits",
            "Both orders in both families on digits: 5 epochs, 3 seeds",
            1438,
            "recipes/digits/{model}.yaml",
            ("epochs=5", "schedule.warmup_epochs=2", "schedule.every_step=false"),
            "nothing: minutes on two cores",
        ),
        _comparison(
            "orders-cifar10",
            "Both orders in both families on CIFAR-10: 5 epochs, 3 seeds",
            50000,
            "recipes/cifar10/spikingformer_cml_small_cpu.yaml",
            ("model.name={model}_4_384", "epochs=5"),
            "the CIFAR-10 python files",
        ),
        _comparison(
            "orders-cifar10-longer",
            "Both orders in both families on CIFAR-10, trained further: Muon, 12 epochs, 10 with T = 1; 3 seeds",
            50000,
            "recipes/cifar10/spikingformer_cml_small_muon.yaml",
            ("model.name={model}_4_384", "epochs=12", "schedule.early_epochs=10"),
            "the CIFAR-10 python files",
        ),
        Table(
            "steps-first",
            "Fewer time steps first: Spikingformer + CML, width 128, T = 4, CIFAR-10, about the same time",
            tuple(
                Row(f"steps-first/{name}", "steps-first", label, "recipes/cifar10/spikingformer_cml_small_cpu.yaml",
                    "the CIFAR-10 python files", ("model.time_steps=4", *overrides), seeds=(0, 1, 2))
                for name, label, overrides in (
                    ("all", "2 epochs with four time steps", ("epochs=2",)),
                    ("one_first", "4 epochs with one, then 1 with four", ("epochs=5", "schedule.early_epochs=4")),
                )
            ),
            50000,
            ours=True,
        ),
        Table(
            "small",
            "Small models of our own",
            (
                Row("small/digits", "small", "Spikingformer + CML, width 64, on digits",
                    "recipes/digits/spikingformer_cml.yaml", "nothing: minutes on two cores", seeds=(0,), energy=True),
                Row("small/digits_dvs", "small", "Spikingformer + CML, width 64, on digits_dvs (simulated recordings)",
                    "recipes/digits_dvs/spikingformer_cml.yaml", "nothing: minutes on two cores", seeds=(0,),
                    energy=True),
                Row("small/cifar10", "small", "Spikingformer + CML, width 128, T = 2, on CIFAR-10",
                    "recipes/cifar10/spikingformer_cml_small_cpu.yaml", "the CIFAR-10 python files", seeds=(0,),
                    energy=True),
                Row("small/cifar10-steps-first", "small", "The same, 24 epochs with one time step, then 6 with two",
                    "recipes/cifar10/spikingformer_cml_small_cpu.yaml", "the CIFAR-10 python files",
                    ("epochs=30", "schedule.early_epochs=24", "optimizer.learning_rate=4.0e-3"), seeds=(0,),
                    energy=True),
                Row("small/cifar10-muon", "small", "The same with Muon instead of AdamW",
                    "recipes/cifar10/spikingformer_cml_small_muon.yaml", "the CIFAR-10 python files", seeds=(0, 1, 2),
                    energy=True),
            ),
            50000,
            ours=True,
        ),
        Table(
            "full-size",
            "Full-size recipes of our own",
            (
                Row("full-size/cifar10", "full-size", "Spikingformer + CML-4-384 on CIFAR-10, our recipe; aim: 96.5",
                    "recipes/cifar10/spikingformer_cml_4_384_ours.yaml", "one GPU and the CIFAR-10 python files"),
                Row("full-size/cifar10-minutes", "full-size",
                    "Spikingformer + CML-4-384 on CIFAR-10 in minutes: Muon, 176 epochs with T = 1, 41 with T = 4",
                    "recipes/cifar10/spikingformer_cml_4_384_minutes.yaml", "one GPU and the CIFAR-10 python files",
                    seeds=(0,)),
                Row("full-size/cifar100", "full-size", "Spikingformer + CML-4-384 on CIFAR-100, the same recipe",
                    "recipes/cifar100/spikingformer_cml_4_384_ours.yaml", "one GPU and the CIFAR-100 python files"),
            ),
            50000,
            ours=True,
        ),
    ]  # fmt: skip
    return {t.name: t for t in tables}


def all_tables() -> dict[str, Table]:
    return {**published_tables(), **own_tables()}


def find_rows(target: str) -> list[Row]:
    """The rows of a table, or one row, by name. Raises ValueError with the nearest name for another."""
    tables = all_tables()
    if target in tables:
        return list(tables[target].rows)
    rows = {row.id: row for t in tables.values() for row in t.rows}
    if target in rows:
        return [rows[target]]
    near = difflib.get_close_matches(target, [*tables, *rows], n=1)
    raise ValueError(
        f"no table or row is called {target!r}"
        + (f"; did you mean {near[0]!r}?" if near else ".")
        + " `spikingformer reproduce --list` shows them all."
    )
