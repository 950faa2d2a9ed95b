"""A run in legs is the unbroken run, and it says when it cannot go on."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks import cifar10_in_legs
from spikingformer.reproduce.ledger import Row
from spikingformer.reproduce.legs import epoch_records, is_finished, seconds_limit, train_in_legs
from spikingformer.reproduce.result_files import read_row
from spikingformer.reproduce.runs import collect, row_recipe, run_folder, run_row
from spikingformer.training.checkpoint import read_model_file
from spikingformer.training.recipe import load_recipe, save_recipe
from spikingformer.training.run import train
from spikingformer.training.run_folder import METRICS_FILE, RECIPE_FILE, RESULT_FILE, RUN_FILE

TINY = (
    "data.name=digits", "data.channels=1", "data.image_size=16", "data.mean=null", "data.std=null", "epochs=2",
    "schedule.cooldown_epochs=1", "schedule.warmup_epochs=1", "model.embed_dim=16", "model.depth=1",
    "model.num_heads=2", "model.time_steps=1", "model.pooled_stages=[0,1,2]", "batch_size=256",
    "augment.erase_probability=0.0", "augment.rand_augment=''", "precision=fp32", "device=cpu", "threads=1",
    "checkpoint.every_seconds=0.0",
)  # fmt: skip
PUBLISHED = "recipes/cifar10/spikingformer_cml_4_384_400e.yaml"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The weights and curve of the run in one piece, in this process."""
    folder = tmp_path_factory.mktemp("unbroken")
    threads = torch.get_num_threads()
    train(load_recipe(PUBLISHED, cifar10_in_legs.run_overrides(PUBLISHED, 64, list(TINY))), folder)
    torch.set_num_threads(threads)
    return folder


def test_legs_give_the_unbroken_run_and_its_results_file(unbroken, tmp_path):
    run, results = tmp_path / "run", tmp_path / "results"
    changes = cifar10_in_legs.run_overrides(PUBLISHED, 64, ["data.root=nowhere", *TINY])
    first = train_in_legs(PUBLISHED, changes, run, lambda _, folder: bool(epoch_records(folder)), max_legs=1)
    assert first.legs == 1
    if not first.finished:  # a quick machine may end before the signal comes
        assert 1 <= len(epoch_records(run)) < 3
    arguments = ["--data", "nowhere", "--output", str(run), "--results", str(results), *TINY]
    assert cifar10_in_legs.main(arguments) == 0
    weights, expected = (read_model_file(f / "last.safetensors")[0] for f in (run, unbroken))
    assert {k for k in expected if not torch.equal(weights[k], expected[k])} == set()
    assert [r["train_loss"] for r in epoch_records(run)] == [r["train_loss"] for r in epoch_records(unbroken)]
    written = json.loads((results / "rows/cifar10/spikingformer_cml_4_384_400e-changed.json").read_text())
    assert written["runs"][0]["epochs"] == 3
    (kept,) = written["runs"]
    assert not any("data.root" in o for o in kept["overrides"])
    assert kept["recipe_sha256"] == hashlib.sha256(Path(PUBLISHED).read_bytes()).hexdigest()
    followed = kept["resolved_recipe"]
    assert (followed["epochs"], followed["optimizer"]["name"]) == (load_recipe(PUBLISHED, changes).epochs, "adamw")
    assert "root" not in followed["data"]
    with pytest.raises(ValueError, match=r"which is not what .* says now: use another --output"):
        collect(run, load_recipe(PUBLISHED, [*changes, "label_smoothing=0.3"]), (), False, PUBLISHED)
    moved = load_recipe(PUBLISHED, [*changes, "data.root=elsewhere", "workers=1"])
    assert collect(run, moved, (), False, PUBLISHED).resolved_recipe == followed


def test_a_finished_run_is_left_alone(unbroken):
    assert is_finished(unbroken)
    assert train_in_legs("no such recipe", [], unbroken, seconds_limit(0)).legs == 0


def test_a_failing_run_is_not_started_for_ever(tmp_path):
    with pytest.raises(ValueError, match="status 2 in leg 1"):
        train_in_legs("no/such/recipe", [], tmp_path / "run", seconds_limit(None))


def test_legs_too_short_to_train_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="make the legs longer"):
        train_in_legs("digits/spikingformer_cml", [], tmp_path / "run", seconds_limit(0))


def test_another_batch_size_scales_the_learning_rate_and_names_another_row():
    changes = cifar10_in_legs.run_overrides(PUBLISHED, 256, [])
    assert load_recipe(PUBLISHED, changes).optimizer.learning_rate == pytest.approx(1e-3)  # 5e-4 * sqrt(256 / 64)
    assert cifar10_in_legs.row_name("cifar10", changes).endswith("-changed")
    same = cifar10_in_legs.run_overrides(PUBLISHED, 64, ["data.root=x"])
    assert cifar10_in_legs.row_name("cifar10", same) == "cifar10/spikingformer_cml_4_384_400e"


@pytest.mark.parametrize("name", sorted(cifar10_in_legs.RECIPES))
def test_the_recipe_stays_the_published_one(name):
    published = load_recipe(cifar10_in_legs.RECIPES[name])
    ours = load_recipe(
        cifar10_in_legs.RECIPES[name], cifar10_in_legs.run_overrides(cifar10_in_legs.RECIPES[name], 64, [])
    )
    changed = {k for k, v in published.model_dump().items() if ours.model_dump()[k] != v}
    assert changed <= {"augment", "precision", "workers", "channels_last", "log", "checkpoint"}
    assert (ours.total_epochs, ours.batch_size, ours.optimizer) == (410, 64, published.optimizer)


def stopped_copy(unbroken, folder):
    """The run as it would be, had it been stopped after its first evaluation."""
    shutil.copytree(unbroken, folder)
    (folder / RESULT_FILE).unlink()
    lines = (folder / METRICS_FILE).read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if '"top1"' in line)
    rest = [line for line in lines[first + 1 :] if '"top1"' not in line]
    (folder / METRICS_FILE).write_text("\n".join([*lines[: first + 1], *rest[:1]]) + "\n")
    return json.loads(lines[first])


def test_a_stopped_run_is_recorded_as_one_and_not_taken_for_whole(unbroken, tmp_path):
    changes = tuple(cifar10_in_legs.run_overrides(PUBLISHED, 64, list(TINY)))
    row = Row("cifar10/x", "cifar10", "x", PUBLISHED, "nothing", changes, seeds=(42,))
    record = stopped_copy(unbroken, run_folder(tmp_path / "runs", row, 42))
    arguments = (row, row.seeds, (), tmp_path / "runs", tmp_path, seconds_limit(None))
    with pytest.raises(ValueError, match="not a finished run: .* --stopped"):
        collect(run_folder(tmp_path / "runs", row, 42), row_recipe(row, 42), (), False, PUBLISHED)
    assert run_row(*arguments, stopped=True)
    (run,) = read_row(tmp_path, row.id).runs
    assert (run.epochs, run.planned_epochs, run.best_top1) == (1, 3, record["top1"])
    assert run.machine["versions"]["torch"] == torch.__version__.split("+")[0]
    shutil.rmtree(tmp_path / "runs")
    assert run_row(*arguments)
    (run,) = read_row(tmp_path, row.id).runs
    assert (run.epochs, run.planned_epochs) == (3, None)


def test_seeds_without_an_evaluation_are_left_out(unbroken, tmp_path):
    changes = tuple(cifar10_in_legs.run_overrides(PUBLISHED, 64, list(TINY)))
    row, said = Row("cifar10/x", "cifar10", "x", PUBLISHED, "nothing", changes, seeds=(41, 42)), []
    stopped_copy(unbroken, run_folder(tmp_path / "runs", row, 42))
    assert run_row(row, row.seeds, (), tmp_path / "runs", tmp_path, seconds_limit(None), say=said.append, stopped=True)
    assert "seed 41: no evaluation in" in said[0]
    result = read_row(tmp_path, row.id)
    assert [r.seed for r in result.runs] == [42]
    assert result.summary()["stopped"] == 1


def test_a_run_stopped_in_its_early_epochs_has_their_speed(unbroken, tmp_path):
    early = [*TINY, "model.time_steps=2", "schedule.early_epochs=1"]
    recipe = load_recipe(PUBLISHED, cifar10_in_legs.run_overrides(PUBLISHED, 64, early))
    record = stopped_copy(unbroken, tmp_path / "run")
    save_recipe(recipe, tmp_path / "run" / RECIPE_FILE)
    found = collect(tmp_path / "run", recipe, (), False, PUBLISHED, stopped=True)
    assert found.samples_per_second == record["samples_per_second"]


@pytest.mark.parametrize("text", ["", "[]", '{"a":'])
def test_a_damaged_note_of_the_machine_is_named(text, unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / "run")
    (tmp_path / "run" / RUN_FILE).write_text(text)
    recipe = load_recipe(PUBLISHED, cifar10_in_legs.run_overrides(PUBLISHED, 64, list(TINY)))
    with pytest.raises(ValueError, match=r"run\.json: damaged"):
        collect(tmp_path / "run", recipe, (), False, PUBLISHED)


def test_the_machine_is_the_one_that_began_the_run(unbroken, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    noted = json.loads((folder / RUN_FILE).read_text())
    machine = {**noted["machine"], "gpu": "another"}
    recipe = load_recipe(PUBLISHED, cifar10_in_legs.run_overrides(PUBLISHED, 64, list(TINY)))
    short = {"system": "Linux", "processor": "x86_64", "cores": 2}
    earlier_version = {"versions": machine["versions"], "machine": short, "evidence": machine}
    for form in ({"machine": machine}, earlier_version):
        (folder / RUN_FILE).write_text(json.dumps(form))
        assert collect(folder, recipe, (), False, PUBLISHED).machine == machine
    (folder / RUN_FILE).write_text(json.dumps({"machine": short}))  # older still: too little to be evidence
    assert collect(folder, recipe, (), False, PUBLISHED).machine["gpu"] is None
    (folder / RUN_FILE).unlink()
    assert collect(folder, recipe, (), False, PUBLISHED).machine["gpu"] is None
