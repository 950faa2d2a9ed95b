"""The engine against the model (float32) and against its integer definition (int8, bit for bit), on every path."""

import copy
import pickle
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from spikingformer.engine import Engine, build_program, int8_reference
from spikingformer.engine.fixed_point import quantize_neuron, quantize_product
from spikingformer.engine.program import AddBits, Attention, Product, Program
from spikingformer.models import Spikingformer
from spikingformer.native import available_isas, status
from spikingformer.native.library import use_isa
from spikingformer.neurons import LIFConfig, use_backend
from tests.engine.helpers import small

pytestmark = pytest.mark.skipif(not status().available, reason=f"no compiled kernels: {status().reason}")

NAMES = [
    f"{f}{p}_{s}" for f in ("spikformer", "spikingformer") for p in ("", "_cml") for s in ("4_384", "8_384", "2_256")
]
SIZES = [(32, 32), (32, 48)]


@pytest.mark.parametrize("name", NAMES)
def test_float32_gives_the_models_logits(name):
    model, x = small(name)
    with torch.no_grad():
        want = model.double().forward_steps(x.double())
    got = Engine(model.float()).forward_steps(x)
    # float32 sums in another order: 1e-6 of the logits' size; a flipped spike would be far above it
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5 * want.abs().max().item())
    assert want[-1].std() > 1e-3


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("channels", [1, 2, 4, 57])
def test_int8_takes_any_input_channels(channels, isa):
    model, x = small(depth=1, in_chans=channels)
    x = 9 * torch.randn(2, channels, 32, 44)
    with use_isa(isa):
        got = Engine(model, "int8").forward_steps(x)
    assert torch.equal(got, int8_reference.run(build_program(model), x).float())


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("name", NAMES)
def test_int8_equals_its_definition_bit_for_bit(name, isa):
    model, x = small(name)
    with use_isa(isa):
        got = Engine(model, "int8").forward_steps(x)
    want = int8_reference.run(build_program(model), x)
    assert torch.equal(got, want.float())
    assert want[-1].std() > 1e-3


@pytest.mark.parametrize("steps", [1, 5])
def test_time_steps_set_after_creation_are_followed(steps):
    model, x = small("spikingformer_cml_4_384")
    model.time_steps = steps
    with torch.no_grad(), use_backend("reference"):
        expected = model(x)
    engine = Engine(model)
    assert len(engine.forward_steps(x)) == steps
    torch.testing.assert_close(engine(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["float32", "int8"])
def test_other_sizes_batches_and_time_steps(form):
    model, _ = small("spikingformer_cml_4_384", time_steps=1, img_size=(16, 24))
    x = torch.randn(5, 3, 16, 24)
    engine = Engine(model, form)
    whole = engine(x)
    parts = torch.cat([engine(x[:2]), engine(x[2:])])
    if form == "int8":
        assert torch.equal(parts, whole), "a sample does not see its neighbours"
    else:  # but for the order of its sums
        torch.testing.assert_close(parts, whole, rtol=0, atol=2e-5 * whole.abs().max().item())
    assert engine(x[:0]).shape == (0, 7)
    larger = torch.randn(2, 3, 32, 16)
    assert engine(larger).shape == (2, 7)
    assert torch.equal(engine(x), whole), "buffers of one shape do not leak into another"


def test_wide_sums_spill_before_they_overflow():
    """All-ones spikes and largest weights: 9 * 384 * 127 does not fit int16."""
    model, x = small("spikingformer_cml_4_384", embed_dim=384, depth=1, num_heads=12)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.bias.data.fill_(5.0)  # every neuron fires at every step
        elif isinstance(m, nn.Conv2d):
            m.weight.data.fill_(0.01)
    program = build_program(model)
    assert torch.equal(Engine(program, "int8").forward_steps(x), int8_reference.run(program, x).float())


def assert_close_to_the_model(model, x, isa, form, atol):
    """Within `atol` times the largest of the model's logits in float64, and equal to the definition of int8.

    The model is left in float64.
    """
    program = build_program(model)
    with use_isa(isa):
        got = Engine(program, form).forward_steps(x)
    if form == "int8":
        assert torch.equal(got, int8_reference.run(program, x).float())
    with torch.no_grad():
        want = model.double().forward_steps(x.double())
    torch.testing.assert_close(got.double(), want, rtol=0, atol=atol * want.abs().max().item())


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("form", ["float32", "int8"])
@pytest.mark.parametrize("isa", available_isas())
def test_counts_of_spikes_that_all_fire_on_weights_of_one_sign(isa, form, depth):
    """Spikformer's stream reaches 2 + 2 * depth: sums of counts are that much larger than sums of spikes."""
    model, x = small("spikformer_4_384", depth=depth)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.bias.data.fill_(5.0)
        elif isinstance(m, nn.Conv2d):
            m.weight.data.uniform_(0.05, 0.25)
    assert_close_to_the_model(model, x, isa, form, atol=2e-5)


def all_firing(**kwargs) -> nn.Module:
    """One narrow block on single pixels, in which every neuron fires: attention counts as many tokens as pixels."""
    model, _ = small(embed_dim=8, num_heads=1, depth=1, pooled_stages=(), time_steps=1, img_size=8, **kwargs)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.bias.data.fill_(5.0)
    return model


MORE_TOKENS_THAN_INT16 = (1, 3, 182, 182)


@pytest.mark.parametrize("form", ["float32", "int8"])
@pytest.mark.parametrize("isa", available_isas())
def test_attention_over_more_tokens_than_int16_counts(isa, form):
    model, x = all_firing(), torch.randn(MORE_TOKENS_THAN_INT16)
    atol = 2e-5 if form == "float32" else 2e-2  # int8: the currents' rounding
    assert_close_to_the_model(model, x, isa, form, atol)


def test_counts_whose_saturation_would_show_are_refused():
    """Counts stop at 2^15 - 1, which a neuron does not see where such a count fires it and resets it fully."""
    x = torch.randn(MORE_TOKENS_THAN_INT16)
    for program in (build_program(all_firing(attention_scale=1e-5)), soft_reset(build_program(all_firing()))):
        engine = Engine(program)
        assert engine(x[..., :32, :32]).shape == (1, 7)
        with pytest.raises(ValueError, match="counts up to 32767 .* 33124 tokens and heads of width 8"):
            engine(x)


def soft_reset(program: Program) -> Program:
    steps = (replace(s, lif=replace(s.lif, v_reset=None)) if isinstance(s, Attention) else s for s in program.steps)
    return replace(program, steps=tuple(steps))


def test_counts_beyond_a_byte_are_refused():
    program = build_program(small("spikformer_4_384", depth=1)[0])
    adds = [step for step in program.steps if isinstance(step, AddBits) and not step.replace]
    Engine(replace(program, steps=(*program.steps, *adds[:1] * (255 - 4))))
    with pytest.raises(ValueError, match="counts up to 255 spikes"):
        Engine(replace(program, steps=(*program.steps, *adds[:1] * (256 - 4))))


@pytest.mark.parametrize("bias", [-0.5, 0.8], ids=["few fire: lists", "many fire: tables"])
@pytest.mark.parametrize("isa", available_isas())
def test_int8_at_full_width_at_low_and_high_rates(isa, bias):
    model, x = small("spikingformer_cml_4_384", embed_dim=384, depth=1, num_heads=12)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.bias.data.fill_(bias)
    program = build_program(model)
    with use_isa(isa):
        got = Engine(program, "int8").forward_steps(x)
    assert torch.equal(got, int8_reference.run(program, x).float())


def test_weights_are_rounded_by_channel():
    weight = torch.tensor([[1.0, -0.5], [0.0, 0.0], [10.0, 5.0]], dtype=torch.float64)[:, :, None, None]
    q = quantize_product(Product("p", weight, torch.zeros(3, dtype=torch.float64), "bits", "current"))
    assert q.weight[:, :, 0, 0].tolist() == [[127, -64], [0, 0], [127, 64]]
    restored = q.weight.double() * q.scale.double()[:, None, None, None] / 1024
    torch.testing.assert_close(restored, weight, rtol=0, atol=10 / 127 / 2)


def test_a_later_change_of_the_model_does_not_reach_the_engine():
    model, x = small("spikingformer_cml_4_384")
    engine = Engine(model)
    before = engine(x)
    model.head.bias.data.add_(1)
    assert torch.equal(engine(x), before)


def test_refusals():
    model, x = small("spikingformer_cml_4_384")
    with pytest.raises(ValueError, match="form must be one of float32, int8, got 'int4'"):
        Engine(model, "int4")
    with pytest.raises(ValueError, match="the engine runs Spikformer and Spikingformer models, got Linear"):
        build_program(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="expected pictures"):
        Engine(model)(x[:, :2])
    with pytest.raises(ValueError, match="multiples of 4"):
        Engine(model)(torch.zeros(1, 3, 30, 32))
    with pytest.raises(ValueError, match="v_reset=None"):
        quantize_neuron(LIFConfig(v_reset=None))
    with pytest.raises(ValueError, match="attention_scale must be a multiple .* got 0.1: use the float engine"):
        Engine(small(depth=1, attention_scale=0.1)[0], "int8")
    with pytest.raises(ValueError, match="up to 57 input channels, got 58"):
        Engine(small(depth=1, in_chans=58)[0], "int8")
    model.head.bias = None
    with pytest.raises(ValueError, match="a classifier with a bias"):
        build_program(model)
    model.reset_classifier(0)
    with pytest.raises(ValueError, match="num_classes=0"):
        build_program(model)
    if len(available_isas()) > 1:
        with use_isa(available_isas()[-1]):
            engine = Engine(small("spikingformer_cml_4_384")[0])
        with pytest.raises(RuntimeError, match="was packed for"):
            engine(x)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("form", ["float32", "int8"])
def test_a_copy_of_a_used_engine_has_memory_of_its_own(form, duplicate):
    model, x = small()
    engine = Engine(model, form)
    first = [engine(x) for _ in range(3)][-1]
    other = duplicate(engine)
    assert all(torch.equal(other(x), first) for _ in range(3))
    other(-x)
    assert torch.equal(engine(x), first)


@pytest.mark.parametrize("form", ["float32", "int8"])
def test_threads_that_share_an_engine_get_their_own_logits(form):
    model, x = small()
    engine = Engine(model, form)
    inputs = [x, -x]
    want = [engine(part) for part in inputs]
    assert not torch.equal(*want)
    got: list[list[torch.Tensor]] = [[], []]
    start = threading.Barrier(2)

    def work(i: int) -> None:
        start.wait()
        got[i] += [engine(inputs[i]) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [sum(torch.equal(y, want[i]) for y in got[i]) for i in range(2)] == [20, 20]


def test_an_input_elsewhere_is_refused():
    model, x = small()
    with pytest.raises(ValueError, match="runs on the CPU, got an input on meta"):
        Engine(model)(x.to("meta"))


@pytest.mark.parametrize("form", ["float32", "int8"])
def test_inputs_at_any_strides_and_with_gradients(form):
    model, x = small()
    engine = Engine(model, form)
    want = engine(x)
    assert torch.equal(engine(x.to(memory_format=torch.channels_last)), want)
    assert torch.equal(engine(x.transpose(2, 3).contiguous().transpose(2, 3)), want)
    assert torch.equal(engine(x.clone().requires_grad_()), want)
    assert not engine(x.clone().requires_grad_()).requires_grad
    one_for_all = x[:1].expand(3, -1, -1, -1)
    assert torch.equal(engine(one_for_all), engine(one_for_all.contiguous()))


@pytest.mark.parametrize("form", ["float32", "int8"])
def test_logits_are_float32_on_the_cpu_whatever_the_defaults(form):
    model, x = small()
    want = Engine(model, form)(x)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            engine = Engine(model, form)
            for given in (x, x.double()):
                assert torch.equal(engine(given), want)
            assert engine(x[:0]).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_negated_views_are_read_as_what_they_stand_for():
    model, x = small()
    negated = torch.complex(x, x).conj().imag
    assert negated.is_neg()
    assert torch.equal(Engine(model)(negated), Engine(model)(-x))


@pytest.mark.parametrize("wrong", [np.zeros((1, 3, 32, 32)), [[0.0]], {}])
def test_what_is_no_tensor_is_refused_by_its_kind(wrong):
    with pytest.raises(ValueError, match=f"expected a torch tensor, got {type(wrong).__name__}: convert it"):
        Engine(small()[0])(wrong)


def test_event_frames_without_a_time_step_are_refused():
    model, x = small()
    with pytest.raises(ValueError, match="event frames need at least one time step, got none"):
        Engine(model)(x[:, None][:, :0])


def test_the_head_of_a_float64_model_is_copied_too():
    model, x = small(num_classes=1)
    model.double().head.bias.data = torch.ones(1, dtype=torch.float64)
    engine = Engine(model)
    before = engine(x)
    model.head.weight.data.zero_()
    model.head.bias.data.zero_()
    assert torch.equal(engine(x), before)
    model.reset_classifier(7)
    model.double().head.bias.data = torch.ones(1, dtype=torch.float64).expand(7)
    copied = copy.deepcopy(model)
    copied.head.bias.data = torch.ones(7, dtype=torch.float64)
    assert torch.equal(Engine(model)(x), Engine(copied)(x))


def test_int8_rounds_a_float64_picture_once():
    model, x = small()
    model.stem.stages[0].conv.weight.data *= 2**12  # so that one unit of the input matters
    x = torch.randint_like(x, -9, 9, dtype=torch.float64) / 2**10 + 2.0**-12 + 1e-14  # just above half a unit
    got = Engine(model, "int8").forward_steps(x)
    assert torch.equal(got, int8_reference.run(build_program(model), x).float())
    assert not torch.equal(got, int8_reference.run(build_program(model), x.float()).float())


def test_a_failed_call_leaves_the_engine_free():
    model, x = small()
    engine = Engine(model)
    want = engine(x)
    with pytest.raises(ValueError, match="expected pictures"):
        engine(x[:, :2])
    assert torch.equal(engine(x), want)


class OwnFeatures(Spikingformer):
    def forward_features(self, x, state=None):
        return super().forward_features(x, state) * 2


class OwnConvolution(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


def replace_convolution(model):
    old = model.blocks[0].mlp.fc1.conv
    model.blocks[0].mlp.fc1.conv = OwnConvolution(old.in_channels, old.out_channels, 1, bias=False)


def patch_method(model):
    model.blocks[1].mlp.forward = lambda x, state=None: x


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (replace_convolution, "its blocks.0.mlp.fc1.conv was replaced.*expected Conv2d, got OwnConvolution"),
        (patch_method, "its blocks.1.mlp was replaced or has methods of its own"),
        (lambda model: setattr(model, "head", nn.Sequential(model.head)), "a head of one linear layer, got Sequential"),
    ],
    ids=["module", "method", "head"],
)
def test_a_model_that_computes_something_else_is_refused(change, text):
    model, _ = small("spikingformer_cml_4_384", depth=2)
    build_program(model)
    change(model)
    with pytest.raises(ValueError, match=text):
        Engine(model)


def test_subclasses_run_where_their_computation_is_the_familys():
    class Named(Spikingformer):
        def greet(self):
            return "hello"

    model, x = small("spikingformer_cml_4_384", depth=1)
    same = Named(model.config).eval()
    same.load_state_dict(model.state_dict())
    assert torch.equal(Engine(same)(x), Engine(model)(x))
    with pytest.raises(ValueError, match="its class was replaced or has methods of its own.*got OwnFeatures"):
        Engine(OwnFeatures(model.config).eval())


def test_a_model_without_its_last_block_runs_without_it():
    model, x = small("spikingformer_cml_4_384", depth=2)
    del model.blocks[1]
    with torch.no_grad():
        want = model.double()(x.double())
    torch.testing.assert_close(Engine(model)(x).double(), want, rtol=0, atol=1e-5)


def test_parametrised_weights_and_synchronised_statistics_are_read():
    model, x = small("spikingformer_cml_4_384", depth=1)
    want = Engine(model)(x)
    nn.utils.parametrizations.weight_norm(model.blocks[0].mlp.fc1.conv)
    torch.testing.assert_close(Engine(nn.SyncBatchNorm.convert_sync_batchnorm(model))(x), want, rtol=0, atol=1e-4)
