"""The engines against their definitions: fp32 against the model itself, int8 against the plain integer reference."""

import pytest
import timm
import torch
from torch import nn

import spikingformer  # noqa: F401  (registers the models)
from spikingformer import native
from spikingformer.native import int8_reference
from spikingformer.native.engine import Engine

pytestmark = pytest.mark.skipif(not native.status().available, reason=native.status().reason)
ISAS = native.available_isas() or ("none",)
CASES = {  # name, changes, batch, still pictures or event frames of so many steps
    "cml, CIFAR": ("spikingformer_cml_4_384", {"img_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 2}, 3, None),
    "sps, CIFAR": ("spikingformer_4_384", {"img_size": 16, "embed_dim": 96, "depth": 1, "num_heads": 2}, 2, None),
    "odd widths, ImageNet": ("spikingformer_cml_8_384", {"img_size": 48, "embed_dim": 72, "depth": 1, "num_heads": 3}, 2, None),
    "wide": ("spikingformer_cml_4_384", {"img_size": 8, "embed_dim": 264, "depth": 1, "num_heads": 11}, 5, None),
    "events": ("spikingformer_cml_2_256", {"img_size": 32, "embed_dim": 64, "depth": 1, "num_heads": 4}, 2, 5),
    "events, sps": ("spikingformer_2_256", {"img_size": 32, "embed_dim": 64, "depth": 1, "num_heads": 4}, 1, 3),
}


FEW = ("odd widths, ImageNet", "events")  # cases for every instruction set; the best one takes them all


@pytest.fixture(
    params=[(isa, name) for isa in ISAS for name in CASES if isa == ISAS[0] or name in FEW],
    ids=lambda p: f"{p[0]}-{p[1]}",
)
def case(request):
    isa, row = request.param
    name, changes, batch, steps = CASES[row]
    with native.use_isa(isa):
        yield dyadic_model(name, changes), example(changes, batch, steps)


@pytest.fixture(params=ISAS)
def isa(request):
    with native.use_isa(request.param):
        yield request.param


def dyadic_model(name, changes):
    """A model whose numbers are small multiples of powers of two: every float sum is exact in any order."""
    torch.manual_seed(0)
    model = timm.create_model(name, **changes).eval()
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            small = m.weight[0].numel() < 100
            m.weight.data = torch.randint(-8, 9, m.weight.shape).float() / (16 if small else 32)
            if m.bias is not None:
                m.bias.data = torch.randint(-8, 9, m.bias.shape).float() / 32
        if isinstance(m, nn.BatchNorm2d):
            m.eps = 0.0
            m.running_var.fill_(1)
            m.running_mean.copy_(torch.randint(-8, 9, m.running_mean.shape) / 64)
            m.bias.data = torch.randint(0, 28, m.bias.shape).float() / 32
    return model


def example(changes, batch, steps):
    torch.manual_seed(1)
    size = changes["img_size"]
    if steps:
        return torch.randint(0, 3, (batch, steps, 2, size, size)).float()
    return torch.randint(-16, 16, (batch, 3, size, size)).float() / 8


def test_fp32_equals_the_model(case):
    model, x = case
    engine = Engine(model)
    with torch.no_grad():
        expected = model(x)
    got = engine(x)
    # tau 1.75 and 1.5 do not divide exactly, and the head's sums are in another order
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert any(rate > 0.01 for rate in engine.firing_rates()[-4:]), "the case must fire to its end"
    assert torch.equal(engine(x), got), "a second call on the same buffers"
    torch.testing.assert_close(engine(x[:1]), expected[:1], rtol=1e-5, atol=1e-6)


def test_int8_equals_its_reference_to_the_bit(case):
    model, x = case
    engine = Engine(model, "int8")
    frames, repeats = engine._frames(x)
    expected = int8_reference.run(engine.plan, frames, repeats)
    assert torch.equal(engine(x), expected)
    with torch.no_grad():
        logits = model(x)
    assert (expected - logits).abs().mean() < 0.5 * logits.abs().mean(), "int8 must stay near the model"


def test_int8_sums_spill_before_they_overflow(isa):
    """All ones times all 127: 9 * 264 * 127 is nine times what an int16 holds."""
    model = dyadic_model("spikingformer_cml_4_384", {"img_size": 8, "embed_dim": 264, "depth": 1, "num_heads": 2})
    last = model.stem.last
    last.conv.weight.data.fill_(127 / 4096)
    model.stem.stages[-1].bn.bias.data.fill_(100.0)
    x = torch.randn(1, 3, 8, 8)
    engine = Engine(model, "int8")
    frames, repeats = engine._frames(x)
    assert torch.equal(engine(x), int8_reference.run(engine.plan, frames, repeats))
    assert engine.firing_rates()[3] == 1.0


def test_random_weights_stay_close_to_the_model():
    torch.manual_seed(0)
    model = timm.create_model("spikingformer_cml_4_384", img_size=16, embed_dim=64, depth=1, num_heads=2)
    x = torch.randn(16, 3, 16, 16)
    for _ in range(20):
        model(x)  # BatchNorm learns its statistics
    model.eval()
    with torch.no_grad():
        expected = model(x)
    # a sum in another order may flip a spike that sat on the threshold: few pictures may differ, and little
    error = (Engine(model)(x) - expected).abs().amax(1)
    assert (error < 1e-4).float().mean() > 0.7
    assert error.max() < 0.1


def test_samples_do_not_influence_each_other():
    model = dyadic_model(*CASES["cml, CIFAR"][:2])
    x = example(*CASES["cml, CIFAR"][1:])
    for precision in ("fp32", "int8"):
        engine = Engine(model, precision)
        together = engine(x)
        alone = torch.cat([engine(x[i : i + 1]) for i in range(len(x))])
        assert torch.equal(together, alone)


def test_int8_weights_are_a_quarter():
    model = timm.create_model("spikingformer_cml_4_384", img_size=16, embed_dim=128, depth=1, num_heads=2).eval()
    assert Engine(model, "int8").weight_bytes < Engine(model).weight_bytes / 3.5


def test_refusals():
    model = timm.create_model("spikingformer_cml_4_384", img_size=16, embed_dim=64, depth=1, num_heads=2)
    with pytest.raises(ValueError, match="call model.eval"):
        Engine(model)
    with pytest.raises(ValueError, match="precision must be one of fp32, int8, got 'int4'"):
        Engine(model.eval(), "int4")
    with pytest.raises(ValueError, match="multiples of 4"):
        Engine(model)(torch.zeros(1, 3, 18, 16))
    with pytest.raises(ValueError, match=r"expected pictures \(B, 3, H, W\)"):
        Engine(model)(torch.zeros(1, 1, 16, 16))
    assert Engine(model)(torch.zeros(0, 3, 16, 16)).shape == (0, 10)
