"""Counts against brute force, and what must not change them."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spikingformer.models  # noqa: F401
from spikingformer.energy import Kind, OperationCounter, count_operations
from spikingformer.layers import ConvBN, ConvBNLIF, spike_attention
from spikingformer.models import VARIANTS
from spikingformer.models.spikingformer import Spikingformer
from spikingformer.neurons import LIF, use_backend

SMALL = {"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": (16, 16), "num_classes": 3}


def small(name: str = "spikingformer_cml_4_256", **overrides: object) -> nn.Module:
    import timm

    torch.manual_seed(1)
    model = timm.create_model(name, **{**SMALL, **overrides})
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):  # so that the neurons fire
            nn.init.normal_(m.weight, 1.5, 0.3)
            nn.init.normal_(m.bias, 0.7, 0.3)
            m.running_mean.normal_(0, 0.1)
    return model.eval()


def spikes(*shape: int, rate: float = 0.3) -> Tensor:
    return (torch.rand(*shape) < rate).float()


def brute_convolution(x: Tensor, conv: nn.Conv2d) -> int:
    """Nonzero inputs times the output positions and channels that each one reaches, by definition."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = conv.kernel_size, conv.stride, conv.padding, conv.dilation
    _, _, height, width = conv(x).shape
    total = 0
    for _, c, i, j in x.nonzero().tolist():
        for o in range(conv.out_channels):
            if c // (conv.in_channels // conv.groups) != o // (conv.out_channels // conv.groups):
                continue
            for y, z, a, b in itertools.product(range(height), range(width), range(kh), range(kw)):
                total += y * sh - ph + a * dh == i and z * sw - pw + b * dw == j
    return total


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": (1, 3), "padding": (0, 2), "groups": 2},
        {"kernel_size": 3, "padding": 2, "dilation": 2, "stride": (2, 1), "groups": 4},
        {"kernel_size": 1, "bias": False},
    ],
    ids=["3x3", "stride2", "asymmetric_groups", "dilated_strided_depthwise", "1x1"],
)
def test_convolution_equals_brute_force(options: dict) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, **options)
    x = spikes(2, 4, 5, 6)
    product = count_operations(conv, [x]).products[0]
    assert product.events == brute_convolution(x, conv)
    assert product.kind == Kind.BINARY
    full = count_operations(conv, [torch.ones(2, 4, 5, 6)]).products[0]
    assert full.events == full.valid == brute_convolution(torch.ones(2, 4, 5, 6), conv)
    assert count_operations(conv, [torch.zeros(2, 4, 5, 6)]).products[0].events == 0
    conv.weight.data[torch.rand_like(conv.weight) < 0.4] = 0
    with_zeros = count_operations(conv, [x]).products[0]
    mask = nn.Conv2d(4, 8, **{**options, "bias": False}).requires_grad_(False)
    mask.weight.copy_((conv.weight != 0).float())
    assert with_zeros.events == product.events
    assert with_zeros.events_nonzero_weights == int(mask(x).sum())


@pytest.mark.parametrize("ndim", [1, 3])
def test_other_ranks_and_transposed(ndim: int) -> None:
    torch.manual_seed(0)
    kinds = {1: (nn.Conv1d, nn.ConvTranspose1d), 3: (nn.Conv3d, nn.ConvTranspose3d)}
    for kind in kinds[ndim]:
        layer = kind(4, 6, 3, stride=2, padding=1, bias=False).requires_grad_(False)
        x = spikes(2, 4, *[5] * ndim)
        product = count_operations(layer, [x]).products[0]
        layer.weight.fill_(1)
        assert product.events == int(layer(x).sum())


@pytest.mark.parametrize("order", ["qk", "kv"])
def test_attention_counts_true_coincidences_in_the_order_executed(order: str) -> None:
    torch.manual_seed(0)

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = x.unbind(-1)
            return spike_attention(q, k, v, 0.125, order)

    x = spikes(2, 3, 2, 5, 4, 3)  # (T, B, heads, N, d, qkv)
    facts = count_operations(Model(), [x], time_steps=2)
    q, k, v = x.unbind(-1)
    if order == "qk":
        middle = q @ k.mT
        expected = [int(middle.sum()), int(((middle != 0).float() @ v).sum())]
    else:
        middle = k.mT @ v
        expected = [int(middle.sum()), int((q @ (middle != 0).float()).sum())]
    assert [p.events for p in facts.products] == expected
    attention = facts.attentions[0]
    assert (attention.order, attention.tokens, attention.head_dim) == (order, 5, 4)
    assert [o.nonzero for o in (attention.q, attention.k, attention.v)] == [int(o.sum()) for o in (q, k, v)]


class _Fused(nn.Module):
    """One head of 8 channels from one linear layer, by torch's own function."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v).mean(1))


class _MultiHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 1, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def _encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


@pytest.mark.parametrize(
    ("make", "linear"),
    [(_Fused, 5 * 8 * 24 + 8 * 4), (_MultiHead, 5 * 8 * 32 + 8 * 4), (_encoder_layer, 5 * 8 * 32 + 2 * 5 * 8 * 16)],
    ids=["scaled_dot_product_attention", "MultiheadAttention", "TransformerEncoderLayer"],
)
def test_attention_that_torch_would_fuse_is_counted(make: Callable[[], nn.Module], linear: int) -> None:
    torch.manual_seed(0)
    model, x = make().eval(), torch.rand(3, 5, 8)
    facts = count_operations(model, [x])
    assert sum(p.dense for p in facts.products if p.op == "linear") == 3 * linear
    assert sum(p.dense for p in facts.products if p.op == "matmul") == 3 * 2 * 5 * 5 * 8
    assert [p.events for p in facts.products if p.op == "matmul"] == [600, 600], "no input is zero"
    assert not any("attention" in name or "transformer" in name for name in facts.uncounted)
    assert facts.never_called == []


def test_a_count_leaves_torchs_choice_of_attention_alone() -> None:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        count_operations(_MultiHead(), [torch.rand(3, 5, 8)])
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    with pytest.raises(AssertionError, match="embedding dimension of 8"):
        count_operations(_MultiHead(), [torch.rand(3, 5, 7)])
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


def assert_same(a: object, b: object) -> None:
    assert a.products == b.products
    assert a.neurons == b.neurons
    assert a.attentions == b.attentions
    assert a.elementwise == b.elementwise


@pytest.mark.parametrize("name", ["spikingformer_cml_4_256", "spikformer_4_256"])
def test_batch_split_changes_nothing(name: str) -> None:
    model = small(name)
    x = torch.rand(5, 3, 16, 16)
    whole = count_operations(model, [x])
    assert sum(p.events for p in whole.products if p.kind == Kind.BINARY) > 0
    assert_same(whole, count_operations(model, [x[:1], x[1:4], x[4:]]))


def test_a_silent_batch_does_not_turn_an_analog_input_binary() -> None:
    conv = nn.Conv2d(3, 2, 3)
    x = torch.rand(4, 3, 8, 8)
    x[:2] = 0
    x[1, 0, 0, 0] = 1  # this half looks binary
    whole, split = count_operations(conv, [x]), count_operations(conv, [x[:2], x[2:]])
    assert whole.products[0].kind == Kind.ANALOG
    assert_same(whole, split)


def test_what_a_convolution_made_stays_analog_when_it_is_zero() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model[0].weight.data.zero_()
    assert count_operations(model, [torch.rand(2, 3, 4, 4)]).products[1].kind == Kind.ANALOG


@pytest.mark.parametrize("name", ["spikingformer_4_256", "spikformer_cml_4_256"])
def test_folding_batch_norm_changes_no_synaptic_count(name: str) -> None:
    model = small(name).double()
    x = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    before = count_operations(model, [x])
    for m in list(model.modules()):
        if isinstance(m, (ConvBN, ConvBNLIF)):
            m.conv = torch.nn.utils.fuse_conv_bn_eval(m.conv, m.bn)
            m.bn = nn.Identity()
    after = count_operations(model, [x])
    for a, b in zip(before.products, after.products, strict=True):
        assert (a.name, a.events, a.kind, a.outputs * (a.own_bias or a.folded_norm)) == (
            b.name, b.events, b.kind, b.outputs * (b.own_bias or b.folded_norm))  # fmt: skip
    assert before.neurons == after.neurons


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_every_backend_counts_the_same(backend: str) -> None:
    model, x = small(), torch.rand(3, 3, 16, 16)
    expected = count_operations(model, [x])
    with use_backend(backend):
        assert_same(expected, count_operations(model, [x]))


def test_a_still_picture_enters_once_and_event_frames_each_step() -> None:
    picture = count_operations(small(time_steps=5), [torch.rand(2, 3, 16, 16)])
    stem = picture.products[0]
    assert (picture.time_steps, stem.executions, stem.copies, stem.stands_for) == (5, 2, 1, 5)
    assert picture.steps_of(stem) == 5
    assert picture.steps_of(picture.products[-1]) == 1  # the head reads the mean over time
    frames = count_operations(small(in_chans=2), [torch.randint(0, 3, (2, 6, 2, 16, 16)).float()])
    stem = frames.products[0]
    assert (frames.time_steps, stem.executions, stem.copies, stem.stands_for) == (6, 12, 1, 1)
    assert stem.kind == Kind.INTEGER
    assert len(stem.input.nonzero_by_step) == 6


def test_neurons_rates_and_silent_channels() -> None:
    layer = ConvBNLIF(3, 4, 1).eval()
    layer.conv.weight.data.fill_(1)
    layer.bn.bias.data = torch.tensor([0.0, -1e6, 1e6, 0.0])
    x = torch.rand(3, 2, 3, 4, 4) * 3  # (T, B, C, H, W)
    counter = OperationCounter(nn.Sequential(layer), time_steps=3)
    s = counter.add(x, batch_size=2)
    facts = counter.finish()
    neuron = facts.neurons[0]
    assert neuron.output.nonzero == int(s.sum())
    assert neuron.output.rate_by_step == pytest.approx(s.mean((1, 2, 3, 4)).tolist(), abs=1e-12)
    assert (neuron.updates, neuron.shape) == (s.numel(), (4, 4, 4))
    assert neuron.silent_channels == [1]
    assert neuron.saturated_channels == [2]


def test_correct_predictions_are_counted() -> None:
    model, x = small(), torch.rand(6, 3, 16, 16)
    labels = model(x).argmax(1)
    labels[0] = (labels[0] + 1) % 3
    assert count_operations(model, [(x[:4], labels[:4]), (x[4:], labels[4:])]).accuracy == pytest.approx(5 / 6)


def test_the_model_is_left_as_it_was() -> None:
    model = small().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    count_operations(model, [torch.rand(2, 3, 16, 16)])
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_users_own_model_of_our_layers() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = ConvBNLIF(2, 8, 3, pool="sps")
            self.b = ConvBN(8, 4, 1)
            self.fire = LIF()

        def forward(self, x: Tensor) -> Tensor:
            s = self.a(x.transpose(0, 1))
            return self.fire(self.b(s) + s[:, :, :4]).mean((0, 3, 4))

    facts = count_operations(Own(), [spikes(2, 3, 2, 8, 8)], time_steps=3)
    assert [p.name for p in facts.products] == ["a.conv", "b.conv"]
    assert [n.name for n in facts.neurons] == ["a.lif", "fire"]
    assert {e.op for e in facts.elementwise} == {"max pool", "residual add", "average"}


def test_a_layer_that_was_not_reached_is_named() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.fused = nn.Linear(3, 2), nn.Linear(3, 2), LIF()

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x).softmax(1)

    facts = count_operations(Model(), [torch.rand(2, 3)])
    assert facts.never_called == ["unused", "fused"]
    assert facts.uncounted == {"_softmax": 4}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_counts_as_cpu() -> None:
    model, x = small().double(), torch.rand(3, 3, 16, 16, dtype=torch.float64)
    with use_backend("reference"):
        assert_same(count_operations(model, [x]), count_operations(model.cuda(), [x.cuda()]))


def test_empty_batch_and_nothing_counted_are_errors() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        count_operations(nn.Linear(2, 2), [torch.zeros(0, 2)])
    with pytest.raises(ValueError, match="at least one batch"):
        count_operations(nn.Linear(2, 2), [])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"image": torch.zeros(2, 3)}, r"a tensor of inputs or a pair \(inputs, labels\), got dict"),
        ((torch.zeros(2, 3),), r"got tuple"),
        ((np.zeros((2, 3)), torch.zeros(2)), "expected a tensor of inputs, got ndarray"),
        ((torch.zeros(2, 3), torch.eye(2)), r"labels \(B,\), one class number a sample, got shape \(2, 2\): .*argmax"),
        ((torch.zeros(2, 3), [0, 1]), "got list"),
    ],
    ids=["dict", "single", "numpy", "one-hot", "list"],
)
def test_batches_of_another_kind_are_named(batch: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count_operations(nn.Linear(3, 2), [batch])  # type: ignore[list-item]


def test_registry_is_covered() -> None:
    """Every family's stem, attention and head are seen; a new model is tested the day it is registered."""
    for name, config in VARIANTS.items():
        with torch.device("meta"):
            model = small_meta(name)
        facts = count_operations(model, [torch.empty(1, config.in_chans, 64, 64, device="meta")])
        assert not facts.never_called, name
        assert not facts.uncounted, name
        assert len(facts.attentions) == 1, name
        assert facts.attentions[0].order == config.attention_order, name


def small_meta(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, embed_dim=32, depth=1, num_heads=2, img_size=64)


def test_spikingformer_is_what_is_tested() -> None:
    assert isinstance(small(), Spikingformer)


def test_an_attention_that_no_input_reached_is_named():
    class Model(nn.Module):
        def __init__(self, used: bool):
            super().__init__()
            self.used, self.attention = used, nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x)[0] if self.used else x * 2

    for used, expected in ((False, ["attention.out_proj"]), (True, [])):
        facts = count_operations(Model(used).eval(), [torch.rand(2, 5, 8)], time_steps=1)
        assert facts.never_called == expected
