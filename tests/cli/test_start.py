"""How fast the command answers: help and argument errors import neither torch nor timm; registration waits for timm."""

import json
import subprocess
import sys

import pytest
import timm

from spikingformer.cli import COMMANDS, main

HEAVY = ("torch", "timm", "torchvision", "numpy", "pydantic", "PIL")
REPORT = f"import sys; print('heavy:', *(m for m in {HEAVY} if m in sys.modules))"


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "words",
    [["--help"], ["--version"], ["nonsense"], ["evaluate"], *([name, "--help"] for name in COMMANDS)],
    ids=" ".join,
)
def test_help_and_argument_errors_import_nothing_heavy(words):
    code = f"""
from spikingformer.cli import main
try:
    main({words!r})
except SystemExit:
    pass
{REPORT}"""
    assert run_python(code).splitlines()[-1] == "heavy:"


def test_the_check_can_fail():
    assert "torch timm" in run_python(f"import timm; {REPORT}")


@pytest.mark.parametrize(
    "imports",
    [
        "import spikingformer, timm",
        "import timm, spikingformer",
        "import spikingformer; from timm.models import list_models; import timm",
        "import spikingformer.models, timm",
        "import spikingformer; spikingformer.models.VARIANTS; import timm",
        "import importlib.util, spikingformer; importlib.util.find_spec('timm'); import timm",
    ],
)
def test_the_models_are_registered_in_every_order_of_imports(imports):
    code = f"""
{imports}
import sys
print(timm.is_model("spikingformer_cml_4_384"), [f for f in sys.meta_path if "AfterTimm" in type(f).__name__])"""
    assert run_python(code).strip() == "True []"


def test_an_unknown_attribute_is_an_attribute_error():
    import spikingformer

    with pytest.raises(AttributeError, match="no attribute 'modles'"):
        spikingformer.modles  # noqa: B018


def test_overrides_may_follow_options(tmp_path, capsys):
    recipe = "recipes/digits/spikingformer_cml.yaml"
    assert main(["train", recipe, "--output", str(tmp_path / "run"), "epochs=1", "bad=1"]) == 2
    assert "unknown key 'bad'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", recipe, "epochs=1", "--frob", "seed=1"])
    assert "unrecognized arguments: --frob" in capsys.readouterr().err


POSIX_ONLY = ("fcntl", "resource")
WITHOUT_POSIX = f"""
import sys
import spikingformer.native.memory  # reads resource on Linux alone
sys.modules |= dict.fromkeys({POSIX_ONLY})
from spikingformer.cli import main"""


def test_everything_but_training_imports_where_there_is_no_posix():
    code = f"""{WITHOUT_POSIX}
import importlib, pkgutil
import spikingformer
failed = []
for module in pkgutil.walk_packages(spikingformer.__path__, "spikingformer."):
    if module.name.endswith(("__main__", ".libspikingformer_native")) or ".triton" in module.name:
        continue  # Triton is Linux's
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        failed.append((module.name, str(error)))
print(failed)"""
    assert run_python(code).splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "recipes/digits/spikingformer_cml.yaml"], "training needs a POSIX system, such as Linux or macOS"),
        (["bench", "spikingformer_cml_4_384.digits", "--batch", "1", "--device", "cpu"], "peak memory"),
    ],
    ids=["train", "bench"],
)
def test_what_needs_posix_says_so(tmp_path, words, message):
    output = ["--output", str(tmp_path / "run")] if words[0] == "train" else []
    code = f"{WITHOUT_POSIX}\nsys.stderr = sys.stdout\nprint(main({[*words, *output]!r}))"
    lines = run_python(code).splitlines()
    assert lines[-1] == "2"
    assert message in lines[-2]
    assert not (tmp_path / "run").exists()


def test_weights_that_ship_are_easy_to_find(capsys):
    assert main(["models", "*digits*"]) == 0
    assert "spikingformer_cml_4_384.digits, 98.33 % (test part)" in capsys.readouterr().out
    assert main(["models", "spikingformer_cml_4_384", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert "spikingformer_cml_4_384.cifar10_minutes" in row["weights"]
    assert main(["models", "*digits_dvs*", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["spikingformer_cml_4_384.digits_dvs"]
    with pytest.raises(RuntimeError, match=r"No pretrained weights .* come with the package: .*384\.digits"):
        timm.create_model("spikingformer_cml_4_384", pretrained=True)
    with pytest.raises(RuntimeError, match="none for this model"):
        timm.create_model("spikformer_4_384", pretrained=True)
