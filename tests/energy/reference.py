"""Where the published figures lie, and what its layers are called here."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

_SHARED = Path(os.environ.get("SPIKINGFORMER_TEST_DATA", Path(__file__).parents[3] / "shared"))
_STEM = {
    "proj_conv": "stages.0", "proj1_conv": "stages.1", "proj2_conv": "stages.2", "proj3_conv": "stages.3",
    "proj4_conv": "last", "proj_conv1": "stages.1", "proj_conv2": "stages.2", "proj_conv3": "stages.3",
    "rpe_conv": "last",
}  # fmt: skip
_BLOCK = {"mlp1_conv": "fc1", "mlp2_conv": "fc2", "fc1_conv": "fc1", "fc2_conv": "fc2",
          "q_conv": "q", "k_conv": "k", "v_conv": "v", "proj_conv": "proj"}  # fmt: skip


def read(name: str) -> Any:
    """A reference file; skips the test where it is not there."""
    for folder in (_SHARED / "reference", _SHARED.parent / "reference"):  # beside the data, or the data's own folder
        if (folder / name).exists():
            return json.loads((folder / name).read_text())
    pytest.skip(f"no reference/{name} in {_SHARED}")


def our_name(published: str) -> str:
    """The published layer's name in this package."""
    if published == "head":
        return "head"
    path, _, leaf = published.rpartition(".")
    if path == "patch_embed":
        return f"stem.{_STEM[leaf]}.conv"
    return f"{path.replace('block.', 'blocks.')}.{_BLOCK[leaf]}.conv"
