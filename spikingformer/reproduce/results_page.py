"""docs/results.md: published figure, the authors' log and ours, line by line."""

from pathlib import Path

from spikingformer.reproduce.curves import curves_section
from spikingformer.reproduce.ledger import Row, Table, own_tables, published_tables
from spikingformer.reproduce.result_files import RowResult, read_row, read_study
from spikingformer.reproduce.runs import hours_needed
from spikingformer.reproduce.statistics import Interval, difference_interval, mean_interval
from spikingformer.training.machine import hardware

NOTICE = (
    "<!-- Made by `spikingformer reproduce --page` from benchmarks/results/; edit neither numbers nor text here. -->"
)

_HEAD = f"""# Results

{NOTICE}

Top-1 accuracy in percent. *Published*: the papers' figure, best epoch on the test part, one run. *Authors' log*: the
training log released with the published code: best epoch, last epoch, mean of the last ten; epochs are counted from 0.
*Ours*: mean over n runs of the best and of the last epoch, with the standard deviation where n > 1. A + after a
commit means uncommitted changes. `spikingformer reproduce ROW` reruns a line; `spikingformer reproduce --list` shows
the state of every row.
"""


def results_page(results: Path) -> str:
    """The whole page as Markdown."""
    parts = [_HEAD]
    parts += [_own_section(t, results) for t in own_tables().values()]
    parts += [_published_section(t, results) for t in published_tables().values()]
    parts.append(curves_section(results))
    return "\n".join(parts).rstrip() + "\n"


def _signed(values: list[float]) -> str:
    """Mean, with the standard deviation of several."""
    mean = mean_interval(values).value
    if len(values) == 1:
        return f"{mean:.2f}"
    import statistics

    return f"{mean:.2f} ± {statistics.stdev(values):.2f}"


def _evidence(result: RowResult) -> str:
    """Hours of all runs, hardware, versions and commits."""
    hours = sum(r.hours for r in result.runs)
    machines = " / ".join(sorted({hardware(r.machine) for r in result.runs}))
    torch = " / ".join(sorted({r.machine["versions"]["torch"] for r in result.runs}))
    commits = " / ".join(sorted({_commit(r.machine) for r in result.runs}))
    stopped = "".join(
        f", seed {r.seed} stopped after {r.epochs} of {r.planned_epochs} epochs" for r in result.runs if r.stopped
    )
    return f"{hours:.2f} h, {machines}, torch {torch}, {commits}{stopped}"


def _commit(machine: dict) -> str:
    return f"{machine['commit'] or 'no git'}{'+' if machine['uncommitted_changes'] else ''}"


def _published_section(table: Table, results: Path) -> str:
    lines = [
        f"## {table.title}",
        "",
        "| row | model | published | authors' log | ours: best | ours: last | n | evidence |",
        "|---|---|---:|---|---:|---:|---:|---|",
    ]
    for row in table.rows:
        found = read_row(results, row.id)
        ours = (
            f"| | | 0 | not run: needs {_needs(row, table)} |"
            if found is None
            else f"| {_signed(found.best())} | {_signed(found.last())} | {len(found.runs)} | {_evidence(found)} |"
        )
        lines.append(f"| `{row.id}` | {row.label} | {row.published:.2f} | {_log(row)} {ours}")
    return "\n".join([*lines, ""])


def _log(row: Row) -> str:
    if row.log is None:
        return ""
    return f"{row.log.best:.2f} (epoch {row.log.best_epoch}), {row.log.last:.2f}, {row.log.mean_last10:.2f}"


def _needs(row: Row, table: Table) -> str:
    log = row.log
    if log is None:
        return row.needs
    if log.total_time is not None:
        return f"{row.needs}; the authors' took {log.total_time}"
    if log.pictures_per_second is None:
        return row.needs
    hours = log.epochs * table.train_samples / log.pictures_per_second / 3600
    return f"{row.needs}; {hours:.1f} h at the log's {log.pictures_per_second:.0f} pictures/s"


def _own_section(table: Table, results: Path) -> str:
    lines = [
        f"## {table.title}",
        "",
        "| row | model | best | last | n | energy, mJ a sample | mean input rate | evidence |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in table.rows:
        found = read_row(results, row.id)
        lines.append(f"| `{row.id}` | {row.label} | {_own_cells(row, table, found, results)} |")
    lines += ["", *comparison_lines(table, results)]
    return "\n".join(lines) + "\n"


def _own_cells(row: Row, table: Table, found: RowResult | None, results: Path) -> str:
    if found is None:
        return f" | | 0 | | | not run: needs {_own_needs(row, table, results)}"
    energy = [r.energy for r in found.runs if r.energy is not None]
    mj = f"{mean_interval([e['energy_mj'] for e in energy]).value:.5f}" if energy else ""
    rate = f"{100 * mean_interval([e['mean_input_rate'] for e in energy]).value:.1f} %" if energy else ""
    return f"{_signed(found.best())} | {_signed(found.last())} | {len(found.runs)} | {mj} | {rate} | {_evidence(found)}"


def _own_needs(row: Row, table: Table, results: Path) -> str:
    study = read_study(results, "gradient_routing_cifar10") if row.recipe.endswith("cml_small_cpu.yaml") else None
    if study is None:
        return row.needs
    speed = min(r["train_samples_per_second"] for r in study["runs"])
    hours = hours_needed(row, table, speed)
    return (
        f"{row.needs} and {hours:.1f} h for its {len(row.seeds)} run{'s' if len(row.seeds) > 1 else ''} "
        f"on {hardware(study['machine'])}, at {speed:.0f} pictures/s measured on one busy core"
    )


_COMPARED = (  # names of two rows, and what the second minus the first is
    ("spikformer", "spikformer_cml", "Spikformer, pool then fire minus fire then pool"),
    ("spikingformer", "spikingformer_cml", "Spikingformer, pool then fire minus fire then pool"),
    ("all", "one_first", "One time step first minus four from the start"),
)


def comparison_lines(table: Table, results: Path) -> list[str]:
    """The differences between the rows of a comparison that have at least two runs each."""
    lines = []
    by_name = {row.id.split("/")[1]: read_row(results, row.id) for row in table.rows}
    for first, second, words in _COMPARED:
        own, cml = by_name.get(first), by_name.get(second)
        if own is None or cml is None or min(len(own.runs), len(cml.runs)) < 2:
            continue
        best, last = difference_interval(cml.best(), own.best()), difference_interval(cml.last(), own.last())
        text = (
            f"- {words}: {_gap(best)} points at the best epoch, "
            f"{_gap(last)} at the last (95 % interval, Welch, n = {len(cml.runs)} and {len(own.runs)})"
        )
        if all(r.energy is not None for r in (*own.runs, *cml.runs)):
            energy, rate = _ratio(own, cml, "energy_mj"), _ratio(own, cml, "mean_input_rate")
            text += f"; energy x {energy:.2f}, mean input rate x {rate:.2f}"
        lines.append(text + f". {_verdict(best)}")
    return [*lines, ""] if lines else []


def _ratio(own: RowResult, cml: RowResult, key: str) -> float:
    def mean(result: RowResult) -> float:
        return mean_interval([r.energy[key] for r in result.runs if r.energy is not None]).value

    return mean(cml) / mean(own)


def _gap(interval: Interval) -> str:
    return f"{interval.value:+.2f} ± {interval.half_width:.2f}"


def _verdict(best: Interval) -> str:
    assert best.half_width is not None
    if abs(best.value) <= best.half_width:
        return "The interval contains zero: no difference is shown."
    return f"The interval lies {'above' if best.value > 0 else 'below'} zero."
