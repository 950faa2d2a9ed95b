"""The float32 engine's product with its neurons in one call: the bits of a product and neurons after it."""

import ctypes

import pytest
import torch
from torch import Tensor

from spikingformer import native
from spikingformer.engine.kernel_calls import _float_neuron
from spikingformer.engine.packing import ProductArgs
from spikingformer.native.library import kernel
from spikingformer.native.product_op import pack_spikes, packed_weight
from spikingformer.neurons import LIFConfig

pytestmark = pytest.mark.skipif(not native.status().available, reason=native.status().reason)

# Below and above where lists meet tables, in registers (0.2 + 10 / tokens - 4 / C) and in the cache (0.35 - 10 / C).
RATES = [pytest.param(0.03, id="few fire"), pytest.param(0.5, id="many fire")]


def call(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor | None, steps: int, fused: bool, keep: bool):
    """Currents (N, O, H, W) and the spikes' words (N * H * W, words) of x (N, C, H, W), N = T * B."""
    n, c, h, w = x.shape
    o, _, k, _ = weight.shape
    counts = x.max() > 1
    tokens = x.permute(0, 2, 3, 1).to(torch.uint8).contiguous() if counts else pack_spikes(x).bits
    packed = packed_weight(weight)
    out = (
        torch.full((n, h, w, o), torch.nan)
        if before is None
        else before.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
    )
    args = ProductArgs(
        tokens.data_ptr(), packed.packed.data_ptr(), packed.scale.data_ptr(), bias.data_ptr(), out.data_ptr(), n, h, w,
        c, o, k * k, counts, before is not None, max(int(x.max()), 1), torch.get_num_threads(), None,
    )  # fmt: skip
    bits = torch.full((n * h * w, -(-o // 64)), -1)
    lif = _float_neuron(steps, LIFConfig())
    if fused:
        kernel("engine_product_fire_f32", "plipp")(
            ctypes.addressof(args), steps, int(keep), ctypes.addressof(lif), bits.data_ptr()
        )
    else:
        kernel("engine_product_f32", "p")(ctypes.addressof(args))
        kernel("engine_fire_f32", "pilllllippi")(
            out.data_ptr(), 0, steps, n // steps, h, w, o, 0, ctypes.addressof(lif), bits.data_ptr(), 1
        )
    return out.permute(0, 3, 1, 2), bits


@pytest.mark.parametrize("into", ["scratch", "stream", "added"])
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("count", [1, 3, 5], ids=["spikes", "counts to 3", "counts to 5"])
@pytest.mark.parametrize(
    ("steps", "batch", "c", "o", "h", "w"),
    [
        pytest.param(1, 2, 64, 40, 5, 7, id="one step"),
        pytest.param(3, 2, 67, 130, 5, 5, id="a part of a word"),
        pytest.param(4, 23, 96, 65, 8, 8, id="several chunks"),
        pytest.param(16, 1, 70, 72, 14, 13, id="chunks of a part of a picture"),
    ],
)
def test_a_product_with_its_neurons(isa, threads, steps, batch, c, o, h, w, count, kernel_size, rate, into):
    generator = torch.Generator().manual_seed(1)
    x = (torch.rand(steps * batch, c, h, w, generator=generator) < rate).float()
    x = x * torch.randint(1, count + 1, x.shape, generator=generator)
    x[0, 0, 0, 0] = count
    weight = torch.randn(o, c, kernel_size, kernel_size, generator=generator) / (rate * c * kernel_size**2) ** 0.5
    bias = torch.randn(o, generator=generator)
    before = torch.randn(steps * batch, o, h, w, generator=generator) if into == "added" else None
    want, spikes = call(x, weight, bias, before, steps, fused=False, keep=True)
    got, bits = call(x, weight, bias, before, steps, fused=True, keep=into != "scratch")
    assert torch.equal(bits, spikes)
    if into != "scratch":
        assert torch.equal(got, want)
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), bias.double(), padding=kernel_size // 2)
    torch.testing.assert_close(want.double(), exact if before is None else exact + before, rtol=1e-4, atol=1e-4)
    assert (
        0.02 < sum(word.bit_count() for word in (spikes.flatten().numpy().view("uint64").tolist())) / want.numel() < 0.9
    )


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("count", [1, 2, 6], ids=["spikes", "counts to 2", "counts to 6"])
def test_sums_are_the_same_bits_on_every_instruction_set(count, rate, kernel_size):
    generator = torch.Generator().manual_seed(2)
    x = (torch.rand(9, 83, 11, 13, generator=generator) < rate).float()
    x = x * torch.randint(1, count + 1, x.shape, generator=generator)
    weight, bias = torch.randn(101, 83, kernel_size, kernel_size, generator=generator), torch.zeros(101)
    found = []
    for isa in native.available_isas():
        with native.use_isa(isa):
            found.append(call(x, weight, bias, None, 1, fused=False, keep=True)[0])
    for other in found[1:]:
        assert torch.equal(found[0], other)
