"""Recipes: strict, named errors, every key read, every packaged file valid."""

import ast
from pathlib import Path

import pytest

from spikingformer.training.recipe import Recipe, find_recipe, load_recipe, recipes_folder, save_recipe
from spikingformer.training.recipe_text import fields_of, parse_yaml
from spikingformer.training.setup import build_model

DIGITS = "recipes/digits/spikingformer_cml.yaml"
PACKAGE = Path(__file__).parents[2] / "spikingformer"


def message(*overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_recipe(DIGITS, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    "path", sorted(recipes_folder().rglob("*.yaml")), ids=lambda p: str(p.relative_to(recipes_folder()))
)
def test_packaged_recipe_is_valid_and_says_its_result(path):
    load_recipe(path)
    head = path.read_text().split("\nmodel:")[0]
    assert head.startswith("# ")
    assert "Ours:" in head or "ours" in head


def test_overrides_reach_sections_and_later_ones_win():
    recipe = load_recipe(
        DIGITS, ["epochs=2", "seed=7", "model.embed_dim=128", "optimizer.learning_rate=5e-4", "epochs=3"]
    )
    assert (recipe.epochs, recipe.seed, recipe.model.embed_dim, recipe.optimizer.learning_rate) == (3, 7, 128, 5e-4)


def test_packaged_recipe_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe(DIGITS) == recipes_folder() / "digits/spikingformer_cml.yaml"
    assert find_recipe("digits/spikingformer_cml") == recipes_folder() / "digits/spikingformer_cml.yaml"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("epoch=2", "unknown key 'epoch'; did you mean 'epochs'?"),
        ("embed_dim=3", "unknown key 'embed_dim'; did you mean 'model.embed_dim'?"),
        ("model.embeddim=3", "unknown key 'model.embeddim'; did you mean 'model.embed_dim'?"),
        ("optimiser.learning_rate=1", "did you mean 'optimizer.learning_rate'?"),
        ("optimiser.lr=1", "unknown key 'optimiser.lr'; did you mean 'optimizer.learning_rate'?"),
        ("optimizer.lr=1", "unknown key 'optimizer.lr'; did you mean 'optimizer.learning_rate'?"),
        ("schedule.warmup=3", "unknown key 'schedule.warmup'; did you mean 'schedule.warmup_epochs'?"),
        ("lr=1", "did you mean 'optimizer.learning_rate'?"),
        ("trainig.epochs=3", "unknown key 'trainig.epochs'; did you mean 'epochs'?"),
        ("dta.name=digits", "unknown key 'dta.name'; did you mean 'data.name'?"),
        ("aug.flip=0", "did you mean 'augment.flip'?"),
        ("modle=3", "did you mean 'model'?"),
        ("model.zzz=3", "unknown key 'model.zzz'\n"),
        ("model.embed_dim=wide", 'model.embed_dim: got "wide", expected int or null'),
        ("epochs=2.5", "epochs: got 2.5, expected int"),
        ("epochs='2'", 'epochs: got "2", expected int'),
        ("seed=-1", "greater than or equal to 0"),
        ("seed=99999999999999999999", "seed: got 99999999999999999999, expected int (Input should be less than"),
        ("threads=1000000", "threads: got 1000000, expected int or null (Input should be less than or equal to 1024)"),
        ("epochs=100000000000000", "epochs: got 100000000000000"),
        ("optimizer.learning_rate=1e300", "optimizer.learning_rate: got 1e+300"),
        ("precision=fp8", "expected one of 'fp32', 'bf16', 'fp16', 'fp64'"),
        (
            "data.std=[0.5, 0.0, 0.5]",
            "each must be above 0, since pictures are divided by it",
        ),
        ("data.std=[-1]", "data.std: got [-1], expected tuple[float, ...] or null (each must be above 0"),
        (
            "augment.crop_scale=[1.0, 0.5]",
            "augment.crop_scale: got [1.0, 0.5], expected tuple[float, float]",
        ),
        ("augment.crop_scale=[0.0, 0.5]", "the first not above the second"),
        ("augment.crop_scale=[0.5, 1.5]", "above 0 and at most 1"),
        ("augment.crop_ratio=[1.3, 0.7]", "augment.crop_ratio: got"),
        ("augment.crop_ratio=[0, 1]", "augment.crop_ratio: got"),
        ("data.mean=[a, 1]", 'data.mean: got "a"'),
        ("model=3", "model: got 3, but it is a section; set one of its keys: model.name, model.time_steps, "),
        ("ema=0.99", "ema: got 0.99, but it is a section; set one of its keys: ema.decay"),
        ("epochs", "expected key=value, such as epochs=2"),
        ("a b=1", "expected key=value"),
        ("epochs=*x", "aliases"),
        ("epochs.more=1", "'epochs' is a value, not a section"),
        ("optimizer.learning_rate=.nan", "not text, a number"),
    ],
)
def test_bad_override_is_named(override, expected):
    assert expected in message(override)


def test_missing_key_says_what_it_means(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("model: {name: spikingformer_cml_4_384}\nepochs: 3\ndata: {root: x}\n")
    with pytest.raises(ValueError, match=r"missing key 'data.name': data set"):
        load_recipe(file)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: &x [1]\nb: *x\n", r"aliases .*line 2"),
        ("a: 1\na: 2\n", r"'a' is given twice \(line 2\)"),
        ("a: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
        ("a: [1\n", "not a readable recipe"),
        ("- 1\n- 2\n", "expected sections"),
        ("1: 2\n", "key 1 is not a name"),
        ("[" * 5000, "not a readable recipe"),
    ],
    ids=["alias", "twice", "python-object", "unclosed", "list", "number-key", "deep"],
)
def test_bad_file_is_named(tmp_path, text, expected):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=expected) as caught:
        load_recipe(file)
    assert str(file) in str(caught.value)


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean recipes/digits/spikingformer_cml.yaml"):
        load_recipe("recipes/digits/spikingformer_cm.yaml")


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"a folder without recipe.yaml: give a recipe file, or the folder of a run"):
        load_recipe(tmp_path)


def test_saved_recipe_reads_back_equal(tmp_path):
    recipe = load_recipe(DIGITS, ["augment.crop_scale=[0.5, 1.0]", "data.mean=[0.3]", "optimizer.learning_rate=3e-7"])
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_numbers_are_numbers():
    assert parse_yaml("[1e-3, 5E+2, 1.5, -2e3, 3, on-2]", "x") == [1e-3, 500.0, 1.5, -2000.0, 3, "on-2"]


def attributes_read() -> set[str]:
    """Every `.name` that is read anywhere in the package but in the recipe's own definition."""
    names = set()
    for path in PACKAGE.rglob("*.py"):
        if path.name not in ("settings.py", "recipe.py"):
            tree = ast.parse(path.read_text())
            names |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    return names


@pytest.mark.parametrize("name", sorted(fields_of(Recipe)))
def test_every_key_is_read_and_described(name):
    assert name.rpartition(".")[2] in attributes_read()
    assert len(fields_of(Recipe)[name].description or "") > 10


DIGITS_DVS = "recipes/digits_dvs/spikingformer_cml.yaml"


@pytest.mark.parametrize("steps", [7, 4], ids=["other", "default"])
def test_time_steps_that_event_frames_would_not_follow_are_refused(steps):
    expected = rf"model.time_steps: got {steps}, but event frames .*: set data.frames={steps} \(it is 8\)"
    with pytest.raises(ValueError, match=expected):
        load_recipe(DIGITS_DVS, [f"model.time_steps={steps}"])
    assert load_recipe(DIGITS_DVS, [f"model.time_steps={steps}", f"data.frames={steps}"]).model.time_steps == steps


def test_a_saved_event_recipe_may_hold_the_default_of_time_steps_and_no_other(tmp_path):
    file = tmp_path / "recipe.yaml"
    save_recipe(load_recipe(DIGITS_DVS), file)
    build_model(load_recipe(file, ["epochs=3"]), 10, "events")
    file.write_text(file.read_text().replace("time_steps: 4", "time_steps: 7"))
    with pytest.raises(ValueError, match="model.time_steps: got 7"):
        build_model(load_recipe(file), 10, "events")
