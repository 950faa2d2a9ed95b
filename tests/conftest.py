"""Shared by all tests: where real data may lie, GPU marking, quiet threads."""

import os
from pathlib import Path

import pytest
import torch

SHARED = Path(os.environ.get("SPIKINGFORMER_TEST_DATA", Path(__file__).parents[2] / "shared"))

torch.set_num_threads(1)  # small tensors; several threads spin and starve each other on a busy machine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def shared_data() -> Path:
    """The folder of real data sets; the test is skipped where it is not there."""
    path = SHARED / "data"
    if not path.is_dir():
        pytest.skip(f"no real data at {path}: set SPIKINGFORMER_TEST_DATA")
    return path
