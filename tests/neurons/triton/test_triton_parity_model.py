"""Whole models on the fused kernels against the plain definition in float64, and where modules are called instead.

float32 against float64: 1e-4 of a gradient's norm. A spike that sits on the threshold would miss it by far; none does
on these seeds.
"""

import copy

import pytest
import torch
from torch import nn

from spikingformer.layers import DropPath
from spikingformer.models import base, gpu
from spikingformer.neurons import use_backend
from tests.engine.helpers import small

TRAINED = ["spikformer_4_384", "spikformer_cml_8_384", "spikingformer_4_384", "spikingformer_cml_2_256"]


@pytest.fixture(autouse=True)
def served(monkeypatch) -> list[bool]:
    """Whether each call so far ran on the fused kernels from end to end."""
    calls: list[bool] = []

    def watched(*args):
        result = gpu.features_on_gpu(*args)
        calls.append(result is not None)
        return result

    monkeypatch.setattr(base, "features_on_gpu", watched)
    return calls


def tiny(name: str, device: str, **kwargs):
    sizes = {"embed_dim": 24, "num_heads": 3, "img_size": 8 if "4_384" in name else 16, "time_steps": 2, "batch": 2}
    model, x = small(name, **(sizes | kwargs))
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 0.1
    return model.to(device), x[:, :3].to(device) if x.ndim == 5 else x.to(device)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-12)).item()


def assert_equal_to_definition(model, x, served, tolerance=1e-4):
    """Logits, gradients and running statistics of one call in the model's mode."""
    exact = copy.deepcopy(model).double()
    with use_backend("reference"):
        want = exact(x.double())
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(x.device)
    (want * weights).sum().backward()
    assert not served[-1]
    got = model(x)
    assert served[-1]
    assert relative(got, want) < tolerance
    (got * weights.float()).sum().backward()
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        # A bias before batch statistics has no gradient: rounding on one side, 0 on ours.
        assert p.grad is not None, name
        assert (p.grad - q.grad).norm() < tolerance * q.grad.norm() + 1e-6, name
    for (name, b), c in zip(model.named_buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(b.double(), c.double(), rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", TRAINED)
def test_training_equals_the_definition(name, device, served):
    model, x = tiny(name, device, depth=2 if name == "spikingformer_4_384" else 1)
    assert_equal_to_definition(model.train(), x, served)


def test_other_time_steps_than_it_was_made_with(device, served):
    model, x = tiny("spikingformer_cml_4_384", device, depth=1)
    model.set_time_steps(1)
    assert_equal_to_definition(model.train(), x, served)


@pytest.mark.parametrize("name", ["spikformer_cml_4_384", "spikingformer_cml_4_384"])
def test_evaluation_equals_the_definition(name, device, served):
    model, x = tiny(name, device, depth=1)
    assert_equal_to_definition(model, x, served)


def test_frozen_norms_in_training(device, served):
    model, x = tiny("spikingformer_cml_4_384", device, depth=1)
    model.train()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    assert_equal_to_definition(model, x, served)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.blocks[0].attn.lif.register_forward_hook(lambda *_: None),
        lambda m: setattr(m.blocks[0], "drop_path", nn.Dropout(0.5)),
        lambda m: setattr(m.stem.stages[0].bn, "momentum", None),
        lambda m: setattr(m.stem.last, "bn", nn.Identity()),
        lambda m: setattr(m.blocks[0].attn, "heads", 1),
        lambda m: m.blocks[0].attn.k.train(),
        lambda m: setattr(m.blocks[0].attn.v.bn, "momentum", 0.5),
        lambda m: setattr(m.blocks[0].mlp.fc1.bn, "bias", None),
    ],
    ids=["hook", "module", "momentum", "folded", "setting", "mixed modes", "mixed momenta", "no bias"],
)
def test_steps_aside(change, device, served):
    model, x = tiny("spikingformer_cml_4_384", device, depth=1)
    change(model.eval())
    model(x)
    assert not served[-1]


@pytest.mark.parametrize("name", ["spikformer_cml_4_384", "spikingformer_cml_4_384"])
def test_drop_path(name, device, served, monkeypatch):
    """The same sample dropped in both models: another one from attention than from the MLP."""
    model, x = tiny(name, device, drop_path_rate=0.25, depth=2)
    model.train()
    drawn: list[torch.Tensor] = []

    def next_factors(drop, y):
        if drop.rate == 0:  # the first block's
            return None
        kept = torch.ones(len(x), dtype=torch.promote_types(y.dtype, torch.float32), device=device)
        kept[len(drawn) % 2] = 0
        drawn.append(kept)
        return kept / (1 - drop.rate)

    monkeypatch.setattr(DropPath, "factors", next_factors)
    assert_equal_to_definition(model, x, served)
    assert len(drawn) == 2 * 2


@pytest.mark.parametrize(
    ("name", "again", "dropped"),
    [
        ("spikingformer_cml_4_384", 4 + 1 + 3, False),  # stem stages 4, its last layer 1; a block's q k v, proj, fc1
        ("spikingformer_cml_4_384", 4 + 1 + 3, True),
        ("spikformer_cml_4_384", 4 + 2, False),  # the stream of spikes itself is kept
    ],
)
def test_spikes_computed_again_in_backward(name, again, dropped, device, served, monkeypatch):
    """Equal to the last bit, and as often as spikes are not kept."""
    from spikingformer.neurons.triton import ops

    calls: list[int] = []
    fused = ops.bn_pool_lif
    monkeypatch.setattr(ops, "bn_pool_lif", lambda *args, **kwargs: (calls.append(1), fused(*args, **kwargs))[1])
    if dropped:
        monkeypatch.setattr(DropPath, "factors", lambda self, y: torch.tensor([2.0, 0.0], device=device))
    model, x = tiny(name, device, depth=1)
    model.train()
    found = []
    for enable in (False, True):
        own = copy.deepcopy(model)
        own.set_grad_checkpointing(enable)
        logits = own(x)
        assert served[-1]
        forward = len(calls)
        logits.square().sum().backward()
        assert len(calls) - forward == (again if enable else 0)
        calls.clear()
        found.append([logits, *(p.grad for p in own.parameters()), *own.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
