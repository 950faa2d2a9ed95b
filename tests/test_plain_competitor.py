"""The benchmarks' competitor does the same work as our models: equal logits and gradients in float64."""

import pytest
import timm
import torch

import spikingformer  # noqa: F401
from benchmarks.plain import PlainModel, calibrate

NAMES = [
    f"{f}{p}_{s}" for f in ("spikformer", "spikingformer") for p in ("", "_cml") for s in ("4_384", "8_384", "2_256")
]


@pytest.mark.parametrize("name", NAMES)
def test_same_logits_and_gradients(name):
    torch.manual_seed(0)
    model = timm.create_model(name, embed_dim=32, depth=1, num_heads=4, img_size=32, num_classes=5).double()
    steps = (3,) if model.config.in_chans == 2 else ()
    x = torch.randn(2, *steps, model.config.in_chans, 32, 32, dtype=torch.float64)
    calibrate(model, x)
    plain = PlainModel(model)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(x), model.eval()(x), rtol=1e-10, atol=1e-10)
    model.train()(x).logsumexp(1).sum().backward()
    plain.train()(x).logsumexp(1).sum().backward()
    theirs = dict(plain.m.named_parameters())
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.grad, theirs[key].grad, rtol=1e-8, atol=1e-9, msg=key)
