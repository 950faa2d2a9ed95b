"""The compiled library belongs to the sources: it is rebuilt where they change, and a stale one is seen."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from spikingformer.native import build, status

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not status().available, reason=f"no compiled kernels: {status().reason}")
def test_the_library_was_built_from_the_sources_here():
    assert build.is_current(), "the other tests see old kernels: run `python -m spikingformer.native.build`"


def test_a_changed_source_makes_the_library_stale(tmp_path):
    sources = shutil.copytree(build.PACKAGE_DIR / "src", tmp_path / "src")
    (tmp_path / build.LIBRARY_NAME).touch()
    record = tmp_path / build.RECORD_NAME
    assert not build.is_current(tmp_path, sources), "a build without a record"
    record.write_text(json.dumps({"error": "no C++ compiler found"}))
    assert not build.is_current(tmp_path, sources)
    record.write_text(json.dumps({"sources": build.source_digest(sources)}))
    assert build.is_current(tmp_path, sources)
    source = sources / "common.h"
    before = source.read_bytes()
    source.write_bytes(before + b"\n")
    assert not build.is_current(tmp_path, sources)
    source.write_bytes(before)
    assert build.is_current(tmp_path, sources)
    (sources / "new.cpp").touch()
    assert not build.is_current(tmp_path, sources)


@pytest.fixture
def clone(tmp_path) -> Path:
    """A clone that was set up, with a library newer than its sources and a Python that notes what it is called for."""
    native = tmp_path / "spikingformer" / "native"
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    shutil.copytree(build.PACKAGE_DIR / "src", native / "src")
    for path in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt", "spikingformer/native/build.py"):
        shutil.copy(ROOT / path, tmp_path / path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(
        '#!/bin/sh\necho "$@" >> calls\ntest ! -e fails && touch spikingformer/native/' + build.LIBRARY_NAME
    )
    python.chmod(0o755)
    for path in tmp_path.rglob("*"):
        os.utime(path, (1e9, 1e9))
    for path in (tmp_path / ".venv" / ".ready", native / build.LIBRARY_NAME):
        path.touch()
        os.utime(path, (1e9 + 1, 1e9 + 1))
    return tmp_path


def make(clone: Path, *targets: str) -> tuple[int, list[str]]:
    """make's exit status, and the calls of Python."""
    calls = clone / "calls"
    calls.unlink(missing_ok=True)
    surroundings = {k: v for k, v in os.environ.items() if k != "MAKEFLAGS"}  # of a `make test`
    done = subprocess.run(["make", *targets], cwd=clone, env=surroundings, capture_output=True, text=True)
    return done.returncode, calls.read_text().splitlines() if calls.exists() else []


BUILT = ["-m spikingformer.native.build"]


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("changed", ["src/inference.cpp", "src/common.h", "build.py"])
def test_setup_builds_the_library_where_a_source_changed(clone, changed):
    assert make(clone, "setup") == (0, [])
    (clone / "spikingformer" / "native" / changed).touch()
    assert make(clone, "setup") == (0, BUILT)
    assert make(clone, "setup") == (0, [])


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_setup_after_clean_builds_the_library(clone):
    assert make(clone, "clean", "setup") == (0, BUILT)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_a_failed_build_stops_only_where_an_old_library_would_be_used(clone):
    (clone / "fails").touch()
    (clone / "spikingformer" / "native" / "src" / "lif.cpp").touch()
    assert make(clone, "setup") == (2, BUILT)
    assert make(clone, "clean", "setup") == (0, BUILT), "without a compiler the plain forms serve"
