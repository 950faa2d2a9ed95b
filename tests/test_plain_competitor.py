"""The benchmarks' competitors do the same work as our models: equal logits and gradients in float64."""

import copy
import warnings

import pytest
import timm
import torch

import spikingformer  # noqa: F401
from benchmarks.cpu_models import SpikingJelly, equal_in_float64
from benchmarks.plain import PlainModel
from spikingformer.benchmarks import calibrate

NAMES = [
    f"{f}{p}_{s}" for f in ("spikformer", "spikingformer") for p in ("", "_cml") for s in ("4_384", "8_384", "2_256")
]


@pytest.mark.parametrize("name", NAMES)
def test_same_logits_and_gradients(name):
    torch.manual_seed(0)
    model = timm.create_model(name, embed_dim=32, depth=1, num_heads=4, img_size=32, num_classes=5).double()
    steps = (3,) if model.config.takes_events else ()
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


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_spikingjelly_does_the_same_work(mode):
    pytest.importorskip("spikingjelly")
    torch.manual_seed(0)
    model = timm.create_model("spikformer_cml_4_384", embed_dim=32, depth=1, num_heads=4, num_classes=5)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    calibrate(model, x.float())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rival = SpikingJelly(model)
    equal_in_float64(model, rival, x, mode)
    with torch.no_grad():  # its neurons keep their voltages: a second call must not start from them
        assert torch.equal(rival.eval()(x.float()), rival(x.float()))
    other = copy.deepcopy(rival)
    other.m.blocks[0].attn.attn_lif.v_threshold = 1.0
    with pytest.raises(AssertionError):
        equal_in_float64(model, other, x, mode)
