"""Runs every parity file in Triton's interpreter, each in a process of its own; conftest.py says why."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.version import Version

triton = pytest.importorskip("triton")
if Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4"):
    pytest.skip("the interpreter of Triton 3.6 needs NumPy before 2.4", allow_module_level=True)
FILES = sorted(Path(__file__).parent.glob("test_triton_parity_*.py"))


def test_there_are_parity_files():
    assert len(FILES) >= 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="parity runs on the CUDA device itself")
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem.removeprefix("test_triton_parity_"))
def test_interpreted(file: Path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # NumPy's opinion of Triton 3.6's own code
    old_triton = "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", old_triton, str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
