"""The ledger, its results files and the pages made from them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from spikingformer.cli import main
from spikingformer.reproduce.ledger import all_tables, find_rows, own_tables, published_curves, published_tables
from spikingformer.reproduce.pages import page_texts, write_pages
from spikingformer.reproduce.result_files import RowResult, RunRecord, read_row, read_study, row_path, write_row
from spikingformer.reproduce.runs import check_overrides, hours_needed, row_recipe
from spikingformer.reproduce.statistics import difference_interval, mean_interval
from spikingformer.training.machine import describe_machine

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
ROWS = [row for table in all_tables().values() for row in table.rows]
MACHINE = {
    "time": "",
    "cpu": "a CPU",
    "gpu": None,
    "versions": {"torch": "2"},
    "commit": "abc",
    "uncommitted_changes": False,
}


def record(seed: int, best: float, energy: float | None = None) -> RunRecord:
    counted = None if energy is None else {"energy_mj": energy, "mean_input_rate": 0.1}
    return RunRecord(seed, best, 1, best - 1, 2, 0.5, 100.0, (best - 2, best), (), MACHINE, counted)


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.id)
def test_every_row_has_a_recipe_that_fits_its_name(row):
    recipe = row_recipe(row, row.seeds[0])
    if row.published is not None:
        assert ("_cml" in row.id) == ("_cml" in recipe.model.name)
        assert recipe.model.name.split("_")[0] in row.id
        assert recipe.data.name in (row.table, "folder", "gesture")


@pytest.mark.parametrize("table", [t for n, t in own_tables().items() if n.startswith("orders-")], ids=lambda t: t.name)
def test_compared_rows_differ_in_the_model_alone(table):
    recipes = [row_recipe(row, 0).model_dump() for row in table.rows]
    assert len({r["model"].pop("name") for r in recipes}) == 4
    assert all(r == recipes[0] for r in recipes)
    assert len({row.seeds for row in table.rows}) == 1


def test_published_figures_and_logs_agree():
    rows = [row for t in published_tables().values() for row in t.rows]
    curves = published_curves()
    assert {r.id for r in rows if r.log} == set(curves)
    for row in rows:
        if row.log:
            assert row.log.best == pytest.approx(row.published, abs=0.05)
            curve = curves[row.id]
            assert len(curve) == row.log.epochs
            assert max(curve.values()) == pytest.approx(row.log.best, abs=0.006)
            assert curve[row.log.best_epoch] == max(curve.values())
            assert curve[max(curve)] == pytest.approx(row.log.last, abs=0.006)
            assert sum(curve[e] for e in sorted(curve)[-10:]) / 10 == pytest.approx(row.log.mean_last10, abs=0.006)


def test_results_files_are_whole_and_belong_to_rows():
    known = {row_path(RESULTS, row.id) for row in ROWS}
    for path in (RESULTS / "rows").rglob("*.json"):
        row = str(path.relative_to(RESULTS / "rows").with_suffix(""))
        found = read_row(RESULTS, row)
        assert found.summary() == json.loads(path.read_text())["summary"]
        assert path in known or row.endswith("-changed")


@pytest.mark.parametrize("name", ["results.md", "precise_gradient.md"])
def test_pages_are_those_that_the_results_files_give(name):
    assert (ROOT / "docs" / name).read_text() == page_texts(RESULTS)[name], "run `spikingformer reproduce --page`"


def test_a_run_changes_its_line_of_the_page(tmp_path):
    before = page_texts(tmp_path)["results.md"]
    assert "not run: needs one GPU and the CIFAR-10 python files; 7.6 h at the log's 753 pictures/s" in before
    result = (
        RowResult("cifar10/spikingformer_cml_4_384_400e", "recipe").with_run(record(1, 96.0)).with_run(record(0, 95.0))
    )
    write_row(tmp_path, result)
    assert read_row(tmp_path, result.row) == result
    line = next(
        x for x in page_texts(tmp_path)["results.md"].splitlines() if "`cifar10/spikingformer_cml_4_384_400e`" in x
    )
    assert (
        "| 95.95 | 95.97 (epoch 397), 95.70, 95.78 | 95.50 ± 0.71 | 94.50 ± 0.71 | 2 | 1.00 h, a CPU, torch 2, abc |"
        in line
    )
    write_row(tmp_path, result.with_run(replace(record(0, 95.0), planned_epochs=999)))
    assert "abc, seed 0 stopped after" in page_texts(tmp_path)["results.md"]
    assert "of 999 epochs" in page_texts(tmp_path)["results.md"]


@pytest.mark.parametrize(
    ("cml", "verdict"),
    [
        ((92.0, 92.1, 92.2), "lies above zero"),
        ((88.0, 88.1, 88.2), "lies below zero"),
        ((80, 90, 100), "contains zero"),
    ],
)
def test_the_comparison_says_what_the_interval_says(tmp_path, cml, verdict):
    for row, values, energy in (("spikformer", (90.0, 90.1, 90.2), 1.0), ("spikformer_cml", cml, 1.5)):
        result = RowResult(f"orders-cifar10/{row}", "recipe")
        for seed, value in enumerate(values):
            result = result.with_run(record(seed, value, energy))
        write_row(tmp_path, result)
    for page in page_texts(tmp_path).values():
        assert verdict in page
        assert "energy x 1.50" in page


def test_damaged_results_files_are_named(tmp_path):
    path = row_path(tmp_path, "cifar10/x")
    path.parent.mkdir(parents=True)
    for text, message in (("{", "damaged"), ('{"schema": "other/1"}', "expected schema"), ("[]", "damaged")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_row(tmp_path, "cifar10/x")
    assert read_study(tmp_path, "none") is None


def test_intervals():
    assert mean_interval([1.0, 2.0, 3.0]).half_width == pytest.approx(4.303 / 3**0.5, rel=1e-3)  # t(0.975, 2) = 4.303
    assert mean_interval([5.0]).half_width is None
    gap = difference_interval([2.0, 3.0, 4.0], [1.0, 2.0, 3.0])
    assert (gap.value, gap.half_width) == (1.0, pytest.approx(2.776 * (2 / 3) ** 0.5, rel=1e-3))  # t(0.975, 4)
    with pytest.raises(ValueError, match="no runs"):
        mean_interval([])
    with pytest.raises(ValueError, match="at least two runs on each side, got 1 and 2"):
        difference_interval([1.0], [1.0, 2.0])


def test_hours_needed():
    table = published_tables()["cifar10"]
    row = find_rows("cifar10/spikingformer_cml_4_384_400e")[0]
    assert hours_needed(row, table, 753.14) == pytest.approx(7.56, abs=0.01)


def test_names_and_overrides_that_do_not_fit():
    with pytest.raises(ValueError, match="did you mean 'cifar100'"):
        find_rows("cifar1000")
    with pytest.raises(ValueError, match="would change what the row runs"):
        check_overrides(["epochs=1"])
    check_overrides(["data.root=x", "log.tensorboard=false", "device=cpu"])


def test_the_command_lists_plans_and_refuses(tmp_path, capsys):
    places = ["--results", str(RESULTS), "--docs", str(tmp_path)]
    assert main(["reproduce", "--list", "--json", *places]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(ROWS)
    assert main(["reproduce", "orders-cifar10", "--dry-run", "--json", "--results", str(tmp_path)]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [(p["seed"], p["done"]) for p in plan] == 4 * [(0, False), (1, False), (2, False)]
    assert main(["reproduce", "orders-digits", "--dry-run", *places]) == 0
    assert capsys.readouterr().out.count("done ") == 12
    stopped = replace(record(0, 95.0), planned_epochs=999)
    write_row(tmp_path, RowResult("small/digits", "recipe").with_run(stopped))
    assert main(["reproduce", "small/digits", "--dry-run", "--json", "--results", str(tmp_path)]) == 0
    assert [p["done"] for p in json.loads(capsys.readouterr().out)] == [False], "a stopped run goes on"
    assert main(["reproduce", "--list", "--results", str(tmp_path)]) == 0
    assert "1 (1 stopped)" in capsys.readouterr().out
    assert main(["reproduce", "--page", *places]) == 0
    assert (tmp_path / "results.md").read_text() == page_texts(RESULTS)["results.md"]
    capsys.readouterr()
    for arguments, message in (
        (["nothing"], "no table or row is called 'nothing'"),
        ([], "no table or row given"),
        (["cifar10", "--results", str(tmp_path / "no")], "no such folder"),
    ):
        assert main(["reproduce", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_a_study_gives_a_page_and_a_figure(tmp_path):
    for name in ("gradient_routing_digits.json", "gradient_routing_cifar10.json"):
        (tmp_path / name).write_text((RESULTS / name).read_text())
    written = write_pages(tmp_path, tmp_path)
    assert [p.name for p in written[2:]] == [
        "learning_curves.png", "gradient_routing_digits.png", "gradient_routing_cifar10.png"
    ]  # fmt: skip
    assert all(p.stat().st_size > 10_000 for p in written[2:])


@pytest.mark.parametrize(("told", "commit", "changed"), [("abc1234", "abc1234", False), ("abc1234+", "abc1234", True)])
def test_a_copy_without_history_is_told_its_commit(monkeypatch, told, commit, changed):
    monkeypatch.setenv("SPIKINGFORMER_COMMIT", told)
    machine = describe_machine()
    assert (machine["commit"], machine["uncommitted_changes"]) == (commit, changed)
