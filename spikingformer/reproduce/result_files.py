"""Results as files: one JSON a table row with all its runs, one JSON a study. Pages are made from these alone."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spikingformer.files import write_atomic
from spikingformer.reproduce.statistics import mean_interval, standard_deviation

RUNS_SCHEMA, STUDY_SCHEMA = "spikingformer-runs/1", "spikingformer-study/1"


@dataclass(frozen=True)
class RunRecord:
    """One training run. top1: percent on the part that chose the best epoch; epochs are counted from 0.

    hours: of training steps, all legs together, without evaluation. samples_per_second: of training, median over the
    epochs with all of the model's time steps, or, where it was stopped before them, over those that there are.
    curve: top1 after each evaluated epoch. curve_epochs: these epochs; None: every one, or, with fewer values than
    epochs, not recorded.
    energy: mJ a sample and mean rates on the test part, by `spikingformer.energy`; None: not counted.
    recipe_sha256: of the recipe file's bytes. resolved_recipe: every field that the run followed, overrides and
    defaults included, but those that say where and how it was computed (data.root, device, workers, ...). Both None in
    records that are older than these fields.
    planned_epochs: of a run that was stopped after fewer; None: it ran to its end.
    """

    seed: int
    best_top1: float
    best_epoch: int
    last_top1: float
    epochs: int
    hours: float
    samples_per_second: float
    curve: tuple[float, ...]
    overrides: tuple[str, ...]
    machine: dict[str, Any]
    energy: dict[str, Any] | None = None
    recipe_sha256: str | None = None
    resolved_recipe: dict[str, Any] | None = None
    curve_epochs: tuple[int, ...] | None = None
    planned_epochs: int | None = None

    @property
    def stopped(self) -> bool:
        return self.planned_epochs is not None


@dataclass(frozen=True)
class RowResult:
    """All runs of one row, by seed."""

    row: str
    recipe: str
    runs: tuple[RunRecord, ...] = field(default_factory=tuple)

    def best(self) -> list[float]:
        return [r.best_top1 for r in self.runs]

    def last(self) -> list[float]:
        return [r.last_top1 for r in self.runs]

    def stopped(self) -> int:
        """How many of the runs were stopped before their end."""
        return sum(r.stopped for r in self.runs)

    def finished_seeds(self) -> set[int]:
        return {r.seed for r in self.runs if not r.stopped}

    def summary(self) -> dict[str, Any]:
        best, last = mean_interval(self.best()), mean_interval(self.last())
        return {
            "n": len(self.runs),
            **({"stopped": self.stopped()} if self.stopped() else {}),
            "best_top1_mean": best.value,
            "best_top1_std": standard_deviation(self.best()),
            "best_top1_half_width_95": best.half_width,
            "last_top1_mean": last.value,
            "last_top1_std": standard_deviation(self.last()),
            "last_top1_half_width_95": last.half_width,
        }

    def with_run(self, run: RunRecord) -> "RowResult":
        """The same with this run, in place of an earlier one of its seed."""
        runs = {r.seed: r for r in self.runs} | {run.seed: run}
        return RowResult(self.row, self.recipe, tuple(runs[seed] for seed in sorted(runs)))


def row_path(folder: Path, row: str) -> Path:
    return folder / "rows" / f"{row}.json"


def study_path(folder: Path, study: str) -> Path:
    return folder / f"{study}.json"


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(values, indent=1) + "\n").encode())


def _read(path: Path, schema: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = values["schema"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: damaged: not a JSON file with a schema; rerun what made it") from None
    if found != schema:
        raise ValueError(f"{path}: expected schema {schema!r}, got {found!r}")
    return values


def write_row(folder: Path, result: RowResult) -> Path:
    path = row_path(folder, result.row)
    write_json(path, {"schema": RUNS_SCHEMA, "row": result.row, "recipe": result.recipe, "summary": result.summary(),
                      "runs": [asdict(r) for r in result.runs]})  # fmt: skip
    return path


def _record(values: dict[str, Any]) -> RunRecord:
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return RunRecord(**fields)


def read_row(folder: Path, row: str) -> RowResult | None:
    """The row's results, None where it has not been run. Raises ValueError for a damaged file."""
    path = row_path(folder, row)
    if not path.exists():
        return None
    values = _read(path, RUNS_SCHEMA)
    try:
        runs = [_record(r) for r in values["runs"]]
        return RowResult(values["row"], values["recipe"], tuple(runs))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error}); rerun it with `spikingformer reproduce {row}`") from None


def write_study(folder: Path, study: str, command: str, machine: dict[str, Any], values: dict[str, Any]) -> Path:
    path = study_path(folder, study)
    write_json(path, {"schema": STUDY_SCHEMA, "study": study, "command": command, "machine": machine, **values})
    return path


def read_study(folder: Path, study: str) -> dict[str, Any] | None:
    """A study's values, None where it has not been run. Raises ValueError for a damaged file."""
    path = study_path(folder, study)
    return _read(path, STUDY_SCHEMA) if path.exists() else None
