"""The real recordings, skipped where they are not on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def real_events_dir(shared_data: Path) -> Path:
    """The folder of real recordings (dvsgesture/, nmnist_slayer/)."""
    return shared_data / "events"
