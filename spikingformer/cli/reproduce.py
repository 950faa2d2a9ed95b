"""`spikingformer reproduce TABLE|ROW`: reruns a published result or one of ours and writes its line of the results."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spikingformer.reproduce.ledger import Row


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to the parser."""
    parser = subparsers.add_parser(
        "reproduce",
        help="rerun a published table or row, or one of our comparisons",
        description="Trains every run of a table or row that has no results yet, and writes "
        "benchmarks/results/rows/ROW.json, docs/results.md and docs/precise_gradient.md. Unfinished runs are "
        "continued; finished runs are skipped. Run it in a clone of the repository.",
        epilog="example: spikingformer reproduce orders-digits --output runs/reproduce",
    )
    parser.add_argument("target", nargs="?", metavar="TABLE|ROW", help="what to rerun; --list shows all")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="how to compute: device, threads, workers, log.* ...",
    )
    parser.add_argument("--data", metavar="DIR", help="folder that holds the data set (default: the recipe's)")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="seeds to run (default: the row's)")
    parser.add_argument("--output", type=Path, default=Path("runs/reproduce"), metavar="DIR",
                        help="folder of the runs (default: %(default)s)")  # fmt: skip
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), metavar="DIR",
                        help="folder of the results files (default: %(default)s)")  # fmt: skip
    parser.add_argument("--docs", type=Path, default=Path("docs"), metavar="DIR",
                        help="folder of the pages (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--leg-seconds", type=float, metavar="S", help="train in legs: save and stop after S seconds each"
    )
    parser.add_argument(
        "--legs", type=int, metavar="N", help="exit after N legs per run, with status 75 if it is not finished"
    )
    parser.add_argument("--stopped", action="store_true",
                        help="train nothing: record unfinished runs with the epochs they have")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="list tables and rows with their state, and exit")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and exit")
    parser.add_argument("--page", action="store_true", help="only write the pages from the results files")
    parser.add_argument("--json", action="store_true", help="print --list, --dry-run or the results as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code (75: not finished; the same command continues)."""
    from spikingformer.reproduce.ledger import all_tables, find_rows

    if args.list:
        _list([row for t in all_tables().values() for row in t.rows], args)
        return 0
    if args.page:
        _write_pages(args)
        return 0
    if args.target is None:
        raise ValueError("no table or row given: `spikingformer reproduce --list` shows all of them")
    rows = find_rows(args.target)
    overrides = [*args.overrides, *([f"data.root={args.data}"] if args.data else [])]
    if args.dry_run:
        _plan(rows, overrides, args)
        return 0
    return _rerun(rows, overrides, args)


def _rerun(rows: "Sequence[Row]", overrides: list[str], args: argparse.Namespace) -> int:
    from spikingformer.reproduce.legs import seconds_limit
    from spikingformer.reproduce.result_files import read_row
    from spikingformer.reproduce.runs import run_row
    from spikingformer.training.signals import SAVED_AND_LEFT

    _check_folders(args)
    for row in rows:
        done = run_row(
            row, args.seeds or row.seeds, overrides, args.output, args.results,
            seconds_limit(args.leg_seconds), args.legs, _silent if args.json else print, args.stopped,
        )  # fmt: skip
        if not done:
            return SAVED_AND_LEFT
    _write_pages(args)
    if args.json:
        results = {row.id: read_row(args.results, row.id) for row in rows}
        print(json.dumps({name: r.summary() for name, r in results.items() if r is not None}, indent=2))
    return 0


def _silent(_: str) -> None:
    """With --json, only the result is printed."""


def _check_folders(args: argparse.Namespace) -> None:
    for name, folder in (("--results", args.results), ("--docs", args.docs)):
        if not folder.is_dir():
            raise ValueError(
                f"{folder}: no such folder, so the results cannot be written: run this in a clone of the "
                f"repository, or give {name}"
            )


def _write_pages(args: argparse.Namespace) -> None:
    from spikingformer.reproduce.pages import write_pages

    _check_folders(args)
    for path in write_pages(args.results, args.docs):
        _say(args, f"wrote {path}")


def _say(args: argparse.Namespace, text: str) -> None:
    if not args.json:
        print(text)


def _state(row: "Row", results: Path) -> dict:
    from spikingformer.reproduce.result_files import read_row

    found = read_row(results, row.id)
    return {
        "row": row.id,
        "label": row.label,
        "published": row.published,
        "log_best": row.log.best if row.log else None,
        "runs": len(found.runs) if found else 0,
        "stopped": found.stopped() if found else 0,
        "best_top1_mean": found.summary()["best_top1_mean"] if found else None,
        "recipe": row.recipe,
        "needs": row.needs,
    }


def _list(rows: "Sequence[Row]", args: argparse.Namespace) -> None:
    states = [_state(row, args.results) for row in rows]
    if args.json:
        print(json.dumps(states, indent=2))
        return
    from rich.console import Console
    from rich.table import Table as Grid

    grid = Grid(box=None, pad_edge=False)
    for column in ("row", "published", "authors' log", "ours", "runs", "needs"):
        grid.add_column(column, justify="left" if column in ("row", "needs") else "right", no_wrap=True)
    for s in states:
        numbers = [s["published"], s["log_best"], s["best_top1_mean"]]
        stopped = f" ({s['stopped']} stopped)" if s["stopped"] else ""
        runs = f"{s['runs'] or ''}{stopped}"
        grid.add_row(s["row"], *("" if n is None else f"{n:.2f}" for n in numbers), runs, s["needs"])
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(grid)


def _plan(rows: "Sequence[Row]", overrides: list[str], args: argparse.Namespace) -> None:
    from spikingformer.reproduce.result_files import read_row
    from spikingformer.reproduce.runs import check_overrides, row_recipe, run_folder

    check_overrides(overrides)
    plan = []
    for row in rows:
        found = read_row(args.results, row.id)
        have = found.finished_seeds() if found else set()
        for seed in args.seeds or row.seeds:
            recipe = row_recipe(row, seed, overrides)  # an unknown recipe or key shows here
            plan.append({
                "row": row.id, "seed": seed, "done": seed in have, "epochs": recipe.total_epochs,
                "folder": str(run_folder(args.output, row, seed)), "needs": row.needs,
                "command": " ".join(["spikingformer train", row.recipe, *row.overrides, f"seed={seed}", *overrides]),
            })  # fmt: skip
    if args.json:
        print(json.dumps(plan, indent=2))
        return
    for p in plan:
        print(f"{'done     ' if p['done'] else 'would run'}  {p['command']} --output {p['folder']}")
