"""Our Muon against timm's, matrix by matrix, and what it does with vectors."""

import itertools

import pytest
import timm.optim.muon
import torch
from timm.optim import Muon as TimmMuon

from spikingformer.training.muon import COEFFICIENTS, Muon, takes, update_scale
from spikingformer.training.setup import build_optimizer
from tests.training.helpers import allow_capturable_on_cpu, tiny_recipe


def parameters(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.1) for shape in shapes]


def drive(optimizer, ps):
    for step in range(4):
        for p, gradient in zip(ps, parameters([p.shape for p in ps], step + 1), strict=True):
            p.grad = gradient.detach()
        optimizer.step()


def stepped(kind):
    ps = parameters(SHAPES)
    ps[0].data = ps[0].data.contiguous(memory_format=torch.channels_last)
    drive(kind(ps, lr=0.02, weight_decay=0.1, momentum=0.9), ps)
    return ps


SHAPES = [
    (8, 4, 3, 3),
    (16, 16),
    (16, 16),
    (16, 16, 1, 1),
    (24, 8),
    (8, 24),
    (8, 24),
    (12,),
    (7,),
    (16, 1, 3, 3),
    (3, 64),
    (4, 2048),
]


def test_gives_the_updates_of_timms():
    ours, theirs, start = stepped(Muon), stepped(TimmMuon), parameters(SHAPES)
    for a, b, before in zip(ours, theirs, start, strict=True):
        moved = (b - before).norm()
        assert (a - b).norm() < 5e-3 * moved, a.shape  # the iterations run in bfloat16


def test_updates_are_nearly_orthogonal_and_of_adams_size():
    (p,) = ps = parameters([(32, 64)])
    before = p.detach().clone()
    p.grad = torch.randn_like(p)
    Muon(ps, lr=1.0, weight_decay=0.0).step()
    update = before - p.detach()
    assert update.square().mean().sqrt() == pytest.approx(0.2, rel=0.25)
    values = torch.linalg.svdvals(update)
    assert values.max() < 2 * values.min()


def test_leaves_what_has_no_gradient():
    a, b = ps = parameters([(8, 8), (8, 8)])
    b_before = b.detach().clone()
    a.grad = torch.ones_like(a)
    Muon(ps, weight_decay=0.5).step()
    assert torch.equal(b, b_before)


def test_a_rate_may_be_a_tensor(monkeypatch):
    allow_capturable_on_cpu(monkeypatch)
    ps = parameters(SHAPES)
    one = Muon(ps, lr=0.02, weight_decay=0.1, momentum=0.9, capturable=True)
    one.param_groups[0]["lr"] = torch.tensor(0.02)
    drive(one, ps)
    for a, b in zip(ps, stepped(Muon), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class Positioned(torch.nn.Module):
    """A model that names a matrix which must not decay, as timm's vision transformers do."""

    def __init__(self):
        super().__init__()
        self.pos_embed = torch.nn.Parameter(torch.zeros(8, 8))
        self.head = torch.nn.Linear(8, 8)

    def no_weight_decay(self):
        return {"pos_embed"}


def test_leaves_undecayed_what_every_other_optimiser_does():
    decayed = []
    for name in ("adamw", "muon"):
        model = Positioned()
        names = {p: n for n, p in model.named_parameters()}
        optimizer = build_optimizer(tiny_recipe(optimizer__name=name), model)
        decayed.append({names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]})
    assert decayed[0] == decayed[1] == {"pos_embed": 0.0, "head.weight": 0.05, "head.bias": 0.0}


def timms(name):
    """Something that timm keeps to itself, so that a later version may not have it."""
    if not hasattr(timm.optim.muon, name):
        pytest.skip(f"this timm has no {name}")
    return getattr(timm.optim.muon, name)


def test_takes_what_timms_does():
    rule = timms("_is_suitable_for_muon")
    sides = (0, 1, 2, 3, 4, 5, 128, 512, 513)
    shapes = [shape for n in range(3) for shape in itertools.product(sides, repeat=n)]
    shapes += [(*shape, k, k) for shape in itertools.product(sides, repeat=2) for k in (1, 3)]
    shapes += [(3, 43, 1), (4, 2, 2), (1, 196, 768), (96, 3, 4, 4)]
    for shape in shapes:
        p = torch.empty(shape, device="meta")
        assert takes(p) == rule(p), shape


def test_numbers_are_timms():
    assert timms("_COEFFICIENTS")["quintic"] == COEFFICIENTS
    for shape in ((8, 8), (4, 100), (300, 20)):
        assert update_scale(*shape) == timms("get_lr_scale")(torch.Size(shape))
