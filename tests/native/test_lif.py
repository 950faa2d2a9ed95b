"""The compiled neuron against the plain one: spikes to the bit, membranes and all gradients."""

import pytest
import torch

from spikingformer import native
from spikingformer.neurons.config import LIFConfig
from spikingformer.neurons.reference import lif_reference
from spikingformer.neurons.surrogate import SURROGATES

pytestmark = pytest.mark.skipif(not native.status().available, reason=native.status().reason)
CONFIGS = {
    "published": LIFConfig(),
    "tau 1.75": LIFConfig(tau=1.75, v_threshold=0.5),
    "soft reset": LIFConfig(tau=3.0, v_reset=None),
    "v_reset -0.2": LIFConfig(v_reset=-0.2),
    "through the reset": LIFConfig(detach_reset=False),
    "soft, through the reset": LIFConfig(detach_reset=False, v_reset=None),
    "no input decay": LIFConfig(decay_input=False, tau=1.5, surrogate="atan"),
} | {name: LIFConfig(surrogate=name) for name in SURROGATES}


def run(function, x, config, v0, grad_spikes, grad_v):
    x, v0 = x.detach().clone().requires_grad_(), v0.detach().clone().requires_grad_()
    spikes, v_last = function(x, config, v0)
    torch.autograd.backward([spikes, v_last], [grad_spikes, grad_v])
    return spikes.detach(), v_last.detach(), x.grad, v0.grad


def compiled(x, config, v=None, want_membrane=True):
    from spikingformer.native.ops import lif

    return lif(x, config, v, want_membrane)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("shape", [(4, 3, 5, 7, 3), (1, 5, 3), (3, 2500)], ids=str)
def test_equals_the_plain_form_with_all_gradients(isa, config, dtype, shape):
    torch.manual_seed(0)
    x, grad_spikes = torch.randn(shape, dtype=dtype) * 4, torch.randn(shape, dtype=dtype)
    v0, grad_v = torch.randn(shape[1:], dtype=dtype), torch.randn(shape[1:], dtype=dtype)
    expected = run(lif_reference, x, config, v0, grad_spikes, grad_v)
    got = run(compiled, x, config, v0, grad_spikes, grad_v)
    assert 0.02 < expected[0].mean() < 0.98, "the case must hold both spikes and silence"
    assert torch.equal(got[0], expected[0])
    # float32: the surrogate's exp and the order of a few additions differ in the last bits
    tolerance = {"rtol": 1e-4, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-13}
    for g, e in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(g, e, **tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_keeps_its_state_in_float32(isa, dtype):
    torch.manual_seed(1)
    x, grad_spikes = (torch.randn(4, 37, 11) * 2).to(dtype), torch.randn(4, 37, 11).to(dtype)
    v0, grad_v = torch.randn(37, 11), torch.randn(37, 11)
    expected = run(lif_reference, x, LIFConfig(), v0, grad_spikes, grad_v)
    got = run(compiled, x, LIFConfig(), v0, grad_spikes, grad_v)
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])
    # one rounding of the gradient to 8 (bf16) or 11 (fp16) bits
    torch.testing.assert_close(got[2], expected[2], rtol=2**-7 if dtype == torch.bfloat16 else 2**-10, atol=1e-6)


def test_extreme_halves_convert_like_torch(isa):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    x = every[torch.isfinite(every)].repeat(1, 1)
    config = LIFConfig(v_threshold=1e-5)
    spikes, v = compiled(x, config)
    expected_spikes, expected_v = lif_reference(x, config)
    assert torch.equal(spikes, expected_spikes)
    torch.testing.assert_close(v, expected_v, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["channels_last", "repeated", "permuted", "strided"])
def test_layouts(isa, layout):
    torch.manual_seed(2)
    if layout == "channels_last":
        x = (torch.randn(3, 2, 6, 5, 7) * 2).permute(0, 1, 4, 2, 3)
    elif layout == "repeated":
        x = (torch.randn(2, 5, 7) * 2).expand(4, 2, 5, 7)
    elif layout == "permuted":
        x = (torch.randn(5, 7, 4) * 2).permute(2, 1, 0)
    else:
        x = (torch.randn(4, 6, 10) * 2)[:, ::2, 1::3]
    spikes, v = compiled(x, LIFConfig())
    expected_spikes, expected_v = lif_reference(x, LIFConfig())
    assert torch.equal(spikes, expected_spikes)
    assert torch.equal(v, expected_v)
    if layout in ("channels_last", "repeated"):
        assert spikes.stride()[1:] == x.stride()[1:], "the layout of a step must be kept"
    grad = torch.randn(x.shape)
    got, want = x.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    compiled(got, LIFConfig())[0].backward(grad)
    lif_reference(want, LIFConfig())[0].backward(grad)
    torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-6)


def test_a_repeated_current_gets_the_sum_of_its_gradients(isa):
    torch.manual_seed(3)
    picture = (torch.randn(2, 33, dtype=torch.float64) * 2).requires_grad_()
    grad = torch.randn(4, 2, 33, dtype=torch.float64)
    compiled(picture.expand(4, 2, 33), LIFConfig())[0].backward(grad)
    got, picture.grad = picture.grad, None
    lif_reference(picture.expand(4, 2, 33), LIFConfig())[0].backward(grad)
    torch.testing.assert_close(got, picture.grad)


def test_empty_batch():
    spikes, v = compiled(torch.empty(4, 0, 3), LIFConfig())
    assert spikes.shape == (4, 0, 3)
    assert v.shape == (0, 3)


@pytest.mark.parametrize(
    ("x", "v", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int32), None, "lif takes torch.float32"),
        (torch.zeros(0, 3), None, "at least one time step"),
        (torch.zeros(2, 3), torch.zeros(4), r"must have shape \(3,\)"),
    ],
    ids=["integers", "no time step", "membrane of another shape"],
)
def test_refusals(x, v, message):
    with pytest.raises(ValueError, match=message):
        compiled(x, LIFConfig(), v)


def test_op_is_registered_as_torch_asks():
    x = (torch.randn(3, 2, 5, dtype=torch.float64) * 2).requires_grad_()
    compiled(x.detach(), LIFConfig())  # registers
    for want_membrane in (True, False):
        args = (x, None, 2.0, 1.0, 0.0, 0, 4.0, True, True, want_membrane)
        torch.library.opcheck(torch.ops.spikingformer.lif.default, args, test_utils=("test_schema", "test_faketensor"))


def test_a_membrane_that_is_not_wanted(isa):
    x = (torch.randn(5, 3, 70) * 2).requires_grad_()
    (spikes, membrane), (whole, _) = compiled(x, LIFConfig(), want_membrane=False), compiled(x, LIFConfig())
    assert membrane is None
    assert torch.equal(spikes, whole)
    grad = torch.randn_like(spikes)
    assert torch.equal(torch.autograd.grad(spikes, x, grad)[0], torch.autograd.grad(whole, x, grad)[0])


def test_unknown_instruction_set_is_named(monkeypatch):
    monkeypatch.setenv("SPIKINGFORMER_NATIVE_ISA", "mmx")
    assert not native.status().available
    assert "mmx" in native.status().reason
    assert "unset it" in native.status().reason
