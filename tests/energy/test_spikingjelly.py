"""Models that others built with plain torch modules and SpikingJelly neurons."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from spikingformer.energy import Kind, count_operations

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("spikingjelly")
    from spikingjelly.activation_based import functional, layer, neuron

T, B = 4, 3


class OneStep(nn.Module):
    """Called once a time step, the picture fed in again each time."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), neuron.LIFNode(), nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), neuron.IFNode(), nn.Flatten(), nn.Linear(128, 5),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        functional.reset_net(self)
        return torch.stack([self.net(x) for _ in range(T)]).mean(0)


class AllSteps(nn.Module):
    """Multi-step modules; the picture is repeated T times; attention by functional products."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = layer.SeqToANNContainer(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.fire = neuron.LIFNode(step_mode="m")
        self.qkv = nn.ModuleList(layer.SeqToANNContainer(nn.Linear(8, 8)) for _ in range(3))
        self.qkv_fire = nn.ModuleList(neuron.LIFNode(step_mode="m", v_threshold=0.2) for _ in range(3))
        self.attn_fire = neuron.LIFNode(step_mode="m", v_threshold=0.1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        functional.reset_net(self)
        s = self.fire(self.conv(x.unsqueeze(0).repeat(T, 1, 1, 1, 1)))
        s = s.flatten(3).mT
        q, k, v = (f(p(s)) for f, p in zip(self.qkv_fire, self.qkv, strict=True))
        y = (q @ k.transpose(-2, -1)) @ v * 0.25
        return self.head(self.attn_fire(y).mean((0, 2)))


def built(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = kind()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.constant_(m.bias, 1.0)
    return model.eval()


def test_one_step_a_call() -> None:
    facts = count_operations(built(OneStep), [torch.rand(B, 3, 8, 8)])
    assert facts.time_steps == T
    first, second, head = facts.products
    assert (first.kind, first.copies, first.stands_for) == (Kind.ANALOG, T, T)
    assert (second.kind, second.executions, second.copies) == (Kind.BINARY, T * B, 1)
    assert second.folded_norm
    assert len(second.input.nonzero_by_step) == T
    assert 0 < second.events < second.valid
    assert head.kind == Kind.BINARY
    assert [(n.name, n.module_type, n.updates) for n in facts.neurons] == [
        ("net.2", "LIFNode", T * B * 8 * 64), ("net.6", "IFNode", T * B * 8 * 16)]  # fmt: skip


def test_all_steps_at_once_with_attention() -> None:
    facts = count_operations(built(AllSteps), [torch.rand(B, 3, 8, 8), torch.rand(B, 3, 8, 8)])
    assert (facts.time_steps, facts.samples) == (T, 2 * B)
    stem = facts.products[0]
    assert (stem.kind, stem.copies, stem.stands_for, stem.executions) == (Kind.ANALOG, T, T, 2 * T * B)
    assert facts.per_sample(stem, stem.events) == stem.dense / (2 * T * B) - (stem.dense - stem.valid) / (2 * T * B)
    assert [p.kind.label for p in facts.products[1:4]] == ["binary"] * 3
    assert facts.attentions[0].order == "qk"
    assert facts.attentions[0].tokens == 64
    assert [n.name for n in facts.neurons] == ["fire", "qkv_fire.0", "qkv_fire.1", "qkv_fire.2", "attn_fire"]
    assert facts.elementwise == [] or {e.op for e in facts.elementwise} == {"average"}


def test_moving_frames_are_not_taken_for_a_still_picture() -> None:
    class Frames(AllSteps):
        def forward(self, x: Tensor) -> Tensor:
            functional.reset_net(self)
            return self.fire(self.conv(x.transpose(0, 1))).mean((0, 3, 4))

    stem = count_operations(built(Frames), [torch.rand(B, T, 3, 8, 8)]).products[0]
    assert (stem.executions, stem.copies, stem.stands_for) == (T * B, 1, 1)
