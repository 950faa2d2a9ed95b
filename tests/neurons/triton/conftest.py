"""How the Triton kernels are tested.

Parity tests (test_triton_parity_*.py) run on a CUDA device where there is one. Elsewhere they run in Triton's
interpreter, which must be chosen before triton is imported and would change triton for every other test: so
test_triton_interpreted.py runs each of those files in a process of its own with TRITON_INTERPRET=1, and this process
does not collect them. By hand: TRITON_INTERPRET=1 pytest tests/neurons/triton
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_triton_parity_*.py"]
if INTERPRETED:
    collect_ignore_glob += ["test_triton_interpreted.py", "test_triton_sm90.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not INTERPRETED:
        for item in items:
            if item.path.name.startswith("test_triton_parity_"):
                item.add_marker("gpu")


@pytest.fixture
def device() -> str:
    """Where parity is tested: the interpreter takes CPU tensors."""
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def float32_means_float32(monkeypatch: pytest.MonkeyPatch):
    """No TF32 in cuDNN's convolutions, which is PyTorch's default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan(request: pytest.FixtureRequest):
    """New tensors come filled with NaN (integers: their largest value), so that an element left unwritten shows."""
    if not request.path.name.startswith("test_triton_parity_"):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
