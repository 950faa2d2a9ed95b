"""What the tests of the kernels share."""

import pytest
import torch

from spikingformer import native


@pytest.fixture(params=native.available_isas() or ("none",))
def isa(request):
    """Every instruction set in turn."""
    with native.use_isa(request.param):
        yield request.param


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Every torch.empty of the ops comes filled with NaN or the like: what a kernel does not write shows."""

    def empty(*args, **kwargs):
        out = torch.zeros(*args, **kwargs)
        if out.is_floating_point():
            return out.fill_(float("nan"))
        return out.fill_(-1 if out.dtype.is_signed else 77)

    monkeypatch.setattr(torch, "empty", empty)
