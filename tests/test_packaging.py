"""Nothing is left behind when the package is built: each file has its line in pyproject.toml or MANIFEST.in."""

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# recipes: a link into the package; the last five are in every source distribution
NOT_SHIPPED = {".gitignore", "recipes", "MANIFEST.in", "README.md", "LICENSE", "pyproject.toml", "setup.py"}


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [Path(line) for line in done.stdout.splitlines()]


def test_every_file_of_the_package_is_installed(tracked):
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    installed = {p for pattern in patterns["spikingformer"] for p in (ROOT / "spikingformer").glob(pattern)}
    files = [p for p in tracked if p.parts[0] == "spikingformer" and p.suffix != ".py"]
    assert any(p.suffix == ".safetensors" for p in files)
    assert [p for p in files if ROOT / p not in installed and (ROOT / p).exists()] == []


def test_every_folder_with_python_is_a_package(tracked):
    folders = {p.parent for p in tracked if p.parts[0] == "spikingformer" and p.suffix == ".py"}
    assert [f for f in folders if not (ROOT / f / "__init__.py").exists()] == []


def test_every_other_file_is_in_the_source_distribution(tracked):
    named = {word for line in (ROOT / "MANIFEST.in").read_text().splitlines() for word in line.split()[1:]}
    outside = {p.parts[0] for p in tracked} - {"spikingformer"}
    assert outside - named - NOT_SHIPPED == set()


def test_the_recipes_that_a_clone_shows_are_the_packages():
    assert (ROOT / "recipes").resolve() == ROOT / "spikingformer" / "recipes"
