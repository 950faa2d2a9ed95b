"""Runs every parity file in Triton's interpreter, each in a process of its own; conftest.py says why."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
FILES = sorted(Path(__file__).parent.glob("test_triton_parity_*.py"))


def test_there_are_parity_files():
    assert len(FILES) >= 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="parity runs on the CUDA device itself")
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem.removeprefix("test_triton_parity_"))
def test_interpreted(file: Path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
