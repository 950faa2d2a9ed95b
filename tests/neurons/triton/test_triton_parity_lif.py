"""LIF kernels against the plain definition: spikes, membranes, every gradient, every surrogate and reset.

Float32 tolerances: spikes and membranes are equal to the bit, because both sides round alike. Gradients differ by the
rounding of another order of the same few operations and by the exponential's last bits: 1e-5 of the largest.
"""

import pytest
import torch

from spikingformer.neurons import SURROGATES, LIFConfig, lif_reference
from spikingformer.neurons.triton.ops import lif

# torch's own op checker reads .grad of tensors that are no leaves, and warns of itself.
OPCHECK_READS_GRAD = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
RESETS = {"hard0": 0.0, "hard-0.2": -0.2, "soft": None}


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-12)
    assert error <= tolerance, f"largest error {error:.2e} of the largest value, allowed {tolerance:.0e}"


def run(f, x, v, config, grad_s, grad_v):
    x, v = x.detach().requires_grad_(), None if v is None else v.detach().requires_grad_()
    s, last = f(x, config, v)
    leaves = [x] if v is None else [x, v]
    return s.detach(), last.detach(), *torch.autograd.grad([s, last], leaves, [grad_s, grad_v.to(last.dtype)])


def check(x, v, config, tolerance=1e-5):
    grad_s, grad_v = torch.randn_like(x, memory_format=torch.preserve_format), torch.randn_like(x[0])
    ours = run(lif, x, v, config, grad_s, grad_v)
    truth = run(lif_reference, x, v, config, grad_s, grad_v)
    assert 0 < truth[0].float().mean() < 1, "the case fires nowhere or everywhere: it shows nothing"
    assert torch.equal(ours[0], truth[0])
    assert torch.equal(ours[1], truth[1])
    for a, b in zip(ours[2:], truth[2:], strict=True):
        close(a, b, tolerance)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("detach", [True, False], ids=["detached", "through"])
@pytest.mark.parametrize("decay", [True, False], ids=["decay", "whole"])
def test_every_neuron(device, surrogate, reset, detach, decay):
    torch.manual_seed(0)
    config = LIFConfig(
        tau=1.75, v_reset=RESETS[reset], surrogate=surrogate, detach_reset=detach, decay_input=decay, v_threshold=0.7
    )
    check(torch.randn(4, 3, 67, device=device) * 1.5, torch.randn(3, 67, device=device) * 0.3, config)


@pytest.mark.parametrize("steps", [1, 3, 16, 17, 33])
def test_time_steps(device, steps):
    torch.manual_seed(1)
    check(torch.randn(steps, 5, 7, device=device) * 2, torch.randn(5, 7, device=device), LIFConfig())
    check(torch.randn(steps, 5, 7, device=device) * 2, None, LIFConfig(tau=1.5))


@pytest.mark.parametrize("tau", [1.0, 2.0, 3.0, 4.0])
def test_on_the_threshold(device, tau):
    """Inputs in eighths put many neurons exactly on the threshold: each must fall as the definition says."""
    torch.manual_seed(2)
    x = torch.randint(0, 33, (4, 999), device=device) / 8
    check(x, None, LIFConfig(tau=tau, v_threshold=0.5))


def layouts(device):
    x = torch.randn(4, 2, 6, 5, 3, device=device) * 2
    return {
        "channels-last": x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),
        "transposed": x.transpose(-1, -2),
        "time-inside": x.transpose(0, 1).contiguous().transpose(0, 1),
        "every-other": x[..., ::2],
        "repeated": x[:1].expand(3, -1, -1, -1, -1),
        "one-neuron": x[:, :1, 0, 0, 0].abs() + 1,
    }


@pytest.mark.parametrize("layout", layouts("cpu"))
def test_layouts(device, layout):
    torch.manual_seed(8)
    x = layouts(device)[layout]
    check(x, torch.randn(x.shape[1:], device=device), LIFConfig())


def test_keeps_the_layout(device):
    x = layouts(device)["channels-last"]
    assert lif(x, LIFConfig())[0].stride() == x.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half(device, dtype):
    """State stays float32, so spikes equal the reference's; gradients round once: half a unit in the last place."""
    torch.manual_seed(3)
    x = (torch.randn(4, 501, device=device) * 2).to(dtype)
    check(x, None, LIFConfig(), torch.finfo(dtype).eps)
    assert lif(x, LIFConfig())[1].dtype == torch.float32


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_against_float64(device, surrogate):
    """Truth in float64. Per-element float32 rounding of about ten operations over four steps: 2e-5 of the largest."""
    torch.manual_seed(4)
    config = LIFConfig(surrogate=surrogate)
    x = torch.randn(4, 300, device=device, dtype=torch.float64) * 1.5
    grad = torch.randn_like(x)
    _, v, g = run(lif_reference, x, None, config, grad, grad[0])
    _, v32, g32 = run(lif, x.float(), None, config, grad.float(), grad[0].float())
    close(v32, v, 2e-6)
    close(g32, g, 2e-5)


def test_membrane_not_wanted(device):
    x = torch.randn(4, 33, device=device, requires_grad=True)
    s, none = lif(x, LIFConfig(), want_membrane=False)
    assert none is None
    (grad,) = torch.autograd.grad(s.sum(), x)
    (expected,) = torch.autograd.grad(lif_reference(x, LIFConfig())[0].sum(), x)
    close(grad, expected, 1e-5)


def test_float64_is_refused(device):
    with pytest.raises(ValueError, match=r"float32, bfloat16 or float16.*got torch.float64.*reference backend"):
        lif(torch.zeros(2, 3, dtype=torch.float64, device=device), LIFConfig())


@OPCHECK_READS_GRAD
def test_registered_as_an_op(device):
    x, v = torch.randn(4, 5, device=device, requires_grad=True), torch.randn(5, device=device)
    for membrane in (True, False):
        torch.library.opcheck(
            torch.ops.spikingformer.triton_lif.default,
            (x, v, membrane, 2.0, 1.0, 0.0, "sigmoid", 4.0, True, True),
        )


def test_close_can_fail():
    with pytest.raises(AssertionError, match="largest error"):
        close(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1]), 1e-2)
    with pytest.raises(AssertionError):
        close(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0]), 1e-2)
