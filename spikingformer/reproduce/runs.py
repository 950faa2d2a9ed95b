"""Runs a row of the ledger, seed by seed, and keeps what came of it as a results file."""

import hashlib
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from spikingformer.reproduce.ledger import Row, Table
from spikingformer.reproduce.legs import LegIsOver, epoch_records, is_finished, train_in_legs
from spikingformer.reproduce.result_files import RowResult, RunRecord, read_row, row_path, write_row
from spikingformer.training.checkpoint import load_model
from spikingformer.training.machine import describe_machine, machine_of_run
from spikingformer.training.recipe import FREE, Recipe, find_recipe, is_free, load_recipe
from spikingformer.training.recipe_text import fields_of
from spikingformer.training.run_folder import BEST_FILE, RECIPE_FILE, read_run_record


def check_overrides(overrides: Sequence[str]) -> None:
    """Raises ValueError for an override that would change what a row runs."""
    for text in overrides:
        if not is_free(text.split("=", 1)[0]):
            raise ValueError(
                f"override {text!r} would change what the row runs. Only {', '.join(FREE)} may change; "
                "for anything else use `spikingformer train`"
            )


def row_recipe(row: Row, seed: int, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe a run of the row follows. Raises ValueError where the package has none."""
    return load_recipe(row.recipe, [*row.overrides, f"seed={seed}", *overrides])


def run_folder(output: Path, row: Row, seed: int) -> Path:
    return output / row.id / f"seed-{seed}"


def hours_needed(row: Row, table: Table, samples_per_second: float) -> float:
    """Hours of training for all the row's seeds at a speed; evaluation is not in it."""
    recipe = row_recipe(row, row.seeds[0])
    return len(row.seeds) * recipe.total_epochs * table.train_samples / samples_per_second / 3600


def run_row(
    row: Row,
    seeds: Sequence[int],
    overrides: Sequence[str],
    output: Path,
    results: Path,
    leg_is_over: LegIsOver,
    max_legs: int | None = None,
    say: Callable[[str], None] = print,
    stopped: bool = False,
) -> bool:
    """Trains what is missing of a row and writes its results file; True once every seed is done.

    Seeds that are already in the results file are skipped. Unfinished runs continue; with `stopped` they are recorded
    as they are, if they have an evaluation, and a later call without it continues them.

    Raises:
        ValueError: overrides that change the row, bad data, or training that fails.
    """
    check_overrides(overrides)
    known = read_row(results, row.id) or RowResult(row.id, row.recipe)
    have = known.finished_seeds()
    for seed in seeds:
        if seed in have:
            done = row_path(results, row.id)
            say(f"{row.id}, seed {seed}: already done ({done}); use another --results to run it again")
            continue
        folder = run_folder(output, row, seed)
        asked = [*row.overrides, f"seed={seed}", *overrides]
        if stopped and not any("top1" in r for r in epoch_records(folder)):
            say(f"{row.id}, seed {seed}: no evaluation in {folder}; skipped")
            continue
        if not stopped:
            legs = train_in_legs(row.recipe, asked, folder, leg_is_over, max_legs)
            if not legs.finished:
                say(f"{row.id}, seed {seed}: not finished after {legs.legs} legs; the same command continues it")
                return False
        record = collect(folder, row_recipe(row, seed, overrides), tuple(asked), row.energy, row.recipe, stopped)
        known = known.with_run(record)
        say(f"{row.id}, seed {seed}: best {record.best_top1:.2f} %; {write_row(results, known)}")
    return True


def collect(
    folder: Path, recipe: Recipe, overrides: tuple[str, ...], energy: bool, recipe_file: str, stopped: bool = False
) -> RunRecord:
    """The record of a finished run, from its folder; with `stopped`, of a run up to its last evaluation.

    `recipe`: what the row asks for, made from `recipe_file`. Raises ValueError where the run is not finished (with
    `stopped`: has no evaluation), or has followed another recipe.
    """
    records = epoch_records(folder)
    evaluated = [r for r in records if "top1" in r]
    unfinished = not is_finished(folder)
    if not evaluated:
        raise ValueError(f"{folder}: no run with an evaluation: train it first")
    if unfinished and not stopped:
        raise ValueError(f"{folder}: not a finished run: train it to the end first, or record it with --stopped")
    records = [r for r in records if r["epoch"] <= evaluated[-1]["epoch"]]
    followed = _substance(load_recipe(folder / RECIPE_FILE))
    if followed != _substance(recipe):
        raise ValueError(
            f"{folder}: this run followed {folder / RECIPE_FILE}, which is not what {recipe_file} says now: "
            "use another --output to train again"
        )
    with_all_steps = [r for r in records if r["epoch"] >= recipe.schedule.early_epochs]
    best = max(evaluated, key=lambda r: (r["top1"], -r["epoch"]))
    return RunRecord(
        seed=recipe.seed,
        best_top1=best["top1"],
        best_epoch=best["epoch"],
        last_top1=evaluated[-1]["top1"],
        epochs=len(records),
        hours=sum(r["seconds"] for r in records) / 3600,
        samples_per_second=statistics.median(r["samples_per_second"] for r in with_all_steps or records),
        curve=tuple(round(r["top1"], 4) for r in evaluated),
        overrides=tuple(o for o in overrides if not o.startswith("data.root=")),
        machine=_trained_on(folder),
        energy=count_energy(folder / BEST_FILE, recipe) if energy else None,
        recipe_sha256=hashlib.sha256(find_recipe(recipe_file).read_bytes()).hexdigest(),
        resolved_recipe=followed,
        curve_epochs=tuple(r["epoch"] for r in evaluated),
        planned_epochs=recipe.total_epochs if unfinished else None,
    )


def _trained_on(folder: Path) -> dict[str, Any]:
    """The machine that started the run; this one for runs of early versions, which did not record it."""
    machine = machine_of_run(read_run_record(folder))
    return machine if "commit" in machine else describe_machine()


def _substance(recipe: Recipe) -> dict[str, Any]:
    """Every field of a recipe but those that say where and how it is computed."""
    found: dict[str, Any] = {}
    for key in fields_of(Recipe):
        if not is_free(key):
            *sections, name = key.split(".")
            values: Any = recipe
            target = found
            for section in sections:
                values, target = getattr(values, section), target.setdefault(section, {})
            value = getattr(values, name)
            target[name] = list(value) if isinstance(value, tuple) else value
    return found


def count_energy(checkpoint: Path, recipe: Recipe, max_samples: int = 2000) -> dict[str, Any]:
    """Energy and rates of a checkpoint on the first samples of its test part, by the preset "exact"."""
    from spikingformer.energy import OperationCounter
    from spikingformer.energy.result import energy_document
    from spikingformer.training.distributed import World
    from spikingformer.training.inputs import create_test_loader

    model, info = load_model(checkpoint)
    loader, _ = create_test_loader(recipe.data, recipe.evaluation_batch_size, 0, torch.device("cpu"), World())
    counter = OperationCounter(model, name=info.name)
    with torch.no_grad():
        for seen, batch in enumerate(loader.batches()):
            if seen * recipe.evaluation_batch_size >= max_samples:
                break
            counter.add(batch.inputs, batch.labels)
    document = energy_document(counter.finish(), "exact")
    return {
        "preset": "exact",
        "samples": document["samples"],
        "energy_mj": document["totals"]["energy_mj"],
        "sops": document["totals"]["sops"],
        "macs": document["totals"]["macs"],
        "mean_input_rate": document["ann"]["mean_rate"],
    }
