"""The real recordings (skipped where they are not on this machine), and one thread for every test here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture
def real_events_dir(shared_data: Path) -> Path:
    """The folder of real recordings (dvsgesture/, nmnist_slayer/)."""
    return shared_data / "events"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors: a second thread costs more than it saves, much more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
