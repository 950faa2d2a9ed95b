"""Attention kernels against q (k^T v) in float64 and the plain neuron.

Spikes are equal to the bit: all sums are integers below 2^24. Float32 gradients: sums of up to N + d products, 1e-5 of
the gradient's norm. Half precision: dL/dy, the sums over tokens and the result are rounded once each: 3 eps.
"""

import pytest
import torch

from spikingformer.neurons import LIFConfig, lif_reference
from spikingformer.neurons.triton.ops import spike_attention, spike_attention_packed

# torch's own op checker reads .grad of tensors that are no leaves, and warns of itself.
OPCHECK_READS_GRAD = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
NEURON = LIFConfig(v_threshold=0.5)


def truth(q, k, v, heads, scale, config):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(2, 3) for x in (q, k, v))
    y = q @ (k.mT @ v) * scale
    return lif_reference(y.transpose(2, 3).flatten(3), config)[0]


def check(device, steps, batch, tokens, heads, width, dtype=torch.float32, tolerance=1e-5, config=NEURON, packed=True):
    torch.manual_seed(tokens + width)
    rate = (4.0 / (tokens * width)) ** (1 / 3)  # currents around the threshold: y * scale of about 1/2
    qkv = (torch.rand(steps, batch, tokens, 3 * heads * width) < rate).double().requires_grad_()
    s = truth(*qkv.chunk(3, -1), heads, 0.125, config)
    assert 0.005 < s.mean() < 0.995
    grad = torch.randn_like(s).to(dtype).double()
    (expected,) = torch.autograd.grad(s, qkv, grad)
    ours = qkv.detach().to(device, dtype).requires_grad_()
    if packed:
        out = spike_attention_packed(ours, heads, 0.125, config)
    else:
        out = spike_attention(*ours.chunk(3, -1), heads, 0.125, config)
    assert out.dtype == dtype
    assert torch.equal(out.double().cpu(), s)
    (actual,) = torch.autograd.grad(out, ours, grad.to(device, dtype))
    error = (actual.double().cpu() - expected).norm() / expected.norm()
    assert error < tolerance, f"gradient error {error:.2e}"


@pytest.mark.parametrize("width", [8, 16, 32, 48, 64, 96])
def test_head_widths(device, width):
    check(device, 2, 1, 20, 2, width)


@pytest.mark.parametrize("tokens", [1, 16, 64, 65, 196, 324])
def test_tokens(device, tokens):
    check(device, 2, 2 if tokens < 100 else 1, tokens, 1 if tokens > 100 else 2, 16 if tokens > 1 else 96)


@pytest.mark.parametrize("steps", [1, 4, 9])
@pytest.mark.parametrize("tokens", [24, 65])
def test_time_steps(device, steps, tokens):
    check(device, steps, 1, tokens, 1, 16)


@pytest.mark.parametrize("tokens", [30, 65])
def test_apart(device, tokens):
    check(device, 2, 1, tokens, 3, 16, packed=False)


@pytest.mark.parametrize(
    "config",
    [
        LIFConfig(tau=1.75, v_threshold=0.5),
        LIFConfig(tau=1.5, v_threshold=0.5, v_reset=None, surrogate="atan", detach_reset=False),
    ],
    ids=["tau1.75", "soft-atan"],
)
def test_neurons(device, config):
    check(device, 4, 1, 40, 1, 24, config=config)


@pytest.mark.parametrize("tokens", [32, 65])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half(device, dtype, tokens):
    check(device, 2, 1, tokens, 1, 32, dtype, 3 * torch.finfo(dtype).eps)


def test_dense_spikes_stay_exact(device):
    """All ones, 324 tokens: k^T v = 324 exceeds bfloat16's exact integers (256); thresholds around it must not blur."""
    ones = torch.ones(1, 1, 324, 16, device=device, dtype=torch.bfloat16)
    for threshold, fires in ((324 * 16, True), (324 * 16 + 1, False)):
        config = LIFConfig(tau=1.0, v_threshold=float(threshold))
        assert bool(spike_attention(ones, ones, ones, 1, 1.0, config).all()) is fires


def test_refused(device):
    x = torch.zeros(1, 1, 2, 12, device=device)
    with pytest.raises(ValueError, match="12 channels do not split into 5 heads"):
        spike_attention(x, x, x, 5, 0.125, NEURON)
    with pytest.raises(ValueError, match="one shape"):
        spike_attention(x, x[..., :6], x, 2, 0.125, NEURON)
    with pytest.raises(ValueError, match="at most 2048 tokens"):
        spike_attention_packed(torch.zeros(1, 1, 2049, 3, device=device), 1, 0.125, NEURON)
    with pytest.raises(ValueError, match="multiple of 3 channels"):
        spike_attention_packed(torch.zeros(1, 1, 2, 4, device=device), 1, 0.125, NEURON)


@OPCHECK_READS_GRAD
def test_registered_as_ops(device):
    qkv = (torch.rand(2, 1, 5, 24, device=device) < 0.5).float()
    neuron = (2.0, 0.5, 0.0, "sigmoid", 4.0, True, True)
    torch.library.opcheck(
        torch.ops.spikingformer.triton_spike_attention_packed.default,
        (qkv.clone().requires_grad_(), 1, 0.125, *neuron),
    )
    parts = [p.contiguous().requires_grad_() for p in qkv.chunk(3, -1)]
    torch.library.opcheck(torch.ops.spikingformer.triton_spike_attention.default, (*parts, 1, 0.125, *neuron))
