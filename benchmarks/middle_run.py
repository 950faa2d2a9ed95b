"""Of several results files of one benchmark, each row as the run in the middle measured it.

    python -m benchmarks.middle_run RUN.json RUN.json RUN.json --output FILE

On a shared machine, all times of a process can be off in the same direction, however many rounds it measures. The run
in the middle is the median by our speed-up over plain. Each row gets that run's commit, and the speed-ups of all runs.
"""

import argparse
import json
from pathlib import Path
from typing import Any


def middle_rows(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the first run, each as the run in the middle has it.

    Raises ValueError for an even number of runs, and where a run lacks a row or had uncommitted changes.
    """
    if len(runs) % 2 == 0:
        raise ValueError(f"expected an odd number of runs, got {len(runs)}: of an even number none is in the middle")
    for run in runs:
        if run["uncommitted_changes"]:
            raise ValueError(f"the run of {run['time']} had uncommitted changes: measure a clean commit")
    rows = []
    for name in [row["row"] for row in runs[0]["rows"]]:
        found = []
        for run in runs:
            if (row := next((r for r in run["rows"] if r["row"] == name), None)) is None:
                raise ValueError(f"the run of {run['time']} has no row {name!r}: measure it too")
            found.append((row["speedup_over_plain"]["ours"], run["commit"], row))
        found.sort(key=lambda one: one[0])
        _, commit, middle = found[len(found) // 2]
        rows.append({**middle, "commit": commit, "runs_speedup_over_plain": [speedup for speedup, _, _ in found]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN.json")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    runs = [json.loads(path.read_text()) for path in args.runs]
    newest = max(runs, key=lambda run: run["time"])
    args.output.write_text(json.dumps({**newest, "rows": middle_rows(runs)}, indent=2) + "\n")


if __name__ == "__main__":
    main()
