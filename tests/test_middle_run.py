"""Of several runs of a benchmark, each row as the run in the middle measured it."""

import pytest

from benchmarks.middle_run import middle_rows


def run(commit: str, **speedups: float) -> dict:
    rows = [{"row": name, "speedup_over_plain": {"ours": value}, "of": commit} for name, value in speedups.items()]
    return {"time": f"day of {commit}", "commit": commit, "uncommitted_changes": False, "rows": rows}


def test_each_row_is_that_of_its_own_middle_run():
    first, second = middle_rows([run("a", x=3.0, y=1.0), run("b", x=2.0, y=5.0), run("c", x=9.0, y=4.0)])
    assert (first["row"], first["of"], first["commit"]) == ("x", "a", "a")
    assert (second["row"], second["of"], second["commit"]) == ("y", "c", "c")
    assert second["runs_speedup_over_plain"] == [1.0, 4.0, 5.0]


def test_runs_without_a_middle_a_row_or_a_clean_commit_are_refused():
    with pytest.raises(ValueError, match="odd number of runs, got 2"):
        middle_rows([run("a", x=1.0), run("b", x=2.0)])
    with pytest.raises(ValueError, match="day of b has no row 'y'"):
        middle_rows([run("a", x=1.0, y=1.0), run("b", x=2.0), run("c", x=3.0, y=3.0)])
    with pytest.raises(ValueError, match="day of a had uncommitted changes"):
        middle_rows([run("a", x=1.0) | {"uncommitted_changes": True}])
