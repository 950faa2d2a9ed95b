"""Learning curves of the released logs stand beside ours, in the page and in its figure."""

from dataclasses import replace
from pathlib import Path

import pytest

from spikingformer.reproduce.curves import curves_section, own_curves, published_curves_for, write_curves_figure
from spikingformer.reproduce.ledger import published_curves
from spikingformer.reproduce.result_files import RowResult, write_row
from tests.reproduce.test_ledger import record

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
ROW = "cifar10/spikingformer_cml_4_384_400e"


def cells(page: str, name: str) -> list[str]:
    (line,) = (line for line in page.splitlines() if line.startswith(f"| `{name}`"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_released_log_has_a_line_with_its_figures():
    page = curves_section(RESULTS)
    for row, curve in published_curves().items():
        _, whose, *after, best, _ = cells(page, row)
        assert whose == "authors' log"
        assert best == f"{max(curve.values()):.2f}"
        assert [a for a in after if a] == [f"{curve[n - 1]:.2f}" for n in (10, 50, 100, 200, 300) if n - 1 in curve]


def test_a_run_of_ours_stands_below_the_logs_of_its_data(tmp_path):
    assert own_curves(tmp_path, "cifar10") == {}
    write_row(tmp_path, RowResult(ROW, "recipe").with_run(record(7, 96.0)))
    assert own_curves(tmp_path, "cifar10") == {f"{ROW}, seed 7": {0: 94.0, 1: 96.0}}
    assert own_curves(tmp_path, "cifar100") == {}
    assert cells(curves_section(tmp_path), f"{ROW}, seed 7")[1:] == ["ours", "", "", "", "", "", "96.00", "2"]


def test_a_run_evaluated_now_and_then_stands_at_its_epochs(tmp_path):
    rare = replace(record(7, 96.0), epochs=20, curve=(90.0, 96.0), curve_epochs=(9, 19))
    write_row(tmp_path, RowResult(ROW, "recipe").with_run(rare))
    assert own_curves(tmp_path, "cifar10") == {f"{ROW}, seed 7": {9: 90.0, 19: 96.0}}
    assert cells(curves_section(tmp_path), f"{ROW}, seed 7")[1:] == ["ours", "90.00", "", "", "", "", "96.00", "20"]
    write_row(tmp_path, RowResult(ROW, "recipe").with_run(replace(rare, curve_epochs=None)))
    assert own_curves(tmp_path, "cifar10") == {}  # an older record does not say where


def test_the_run_on_two_cores_is_there():
    assert max(own_curves(RESULTS, "cifar10")["small/cifar10, seed 0"].values()) == pytest.approx(81.08)


@pytest.mark.parametrize(
    ("data", "model", "rows"),
    [
        ("cifar10", "spikingformer_cml_4_384", [ROW]),
        ("cifar10", "vit_tiny", ["cifar10/spikformer_cml_4_384_400e", ROW]),
        ("digits", "spikingformer_cml_4_384", []),
    ],
    ids=["same-model", "other-model", "no-log"],
)
def test_the_logs_for_a_report(data, model, rows):
    assert sorted(published_curves_for(data, model)) == rows


def test_the_figure_has_a_line_for_each_curve(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    plain = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *a, **k: drawn.append(k["label"]) or plain(self, *a, **k))
    path = write_curves_figure(RESULTS, tmp_path)
    assert path.stat().st_size > 20_000
    assert sum(label.endswith(", log") for label in drawn) == len(published_curves())
    assert drawn.count("ours: small/cifar10") == 1
    assert drawn.count("ours: orders-cifar10/spikformer_cml") == 1
    assert "_orders-cifar10/spikformer_cml, seed 2" in drawn
