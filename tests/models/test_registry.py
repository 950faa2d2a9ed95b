"""Every model in the registry, enumerated: a new variant is tested the day it is registered.

Widths and depths are cut so that the whole table runs in seconds; the published sizes are checked by their counts.
"""

import pickle

import numpy as np
import pytest
import timm
import torch
from torch import nn

import spikingformer
from spikingformer.models import VARIANTS
from spikingformer.models.base import _mean_over_tokens
from spikingformer.neurons import LIF, use_backend

NAMES = sorted(VARIANTS)
PARAMETERS = {  # learned values that forward uses, models.md
    "spikingformer": {"4_256": 4_152_106, "2_384": 5_762_746, "4_384": 9_320_122},
    "spikformer": {"4_256": 4_155_178, "2_384": 5_765_050, "4_384": 9_324_730},
    "either": {"8_384": 16_816_024, "8_512": 29_689_384, "8_768": 66_338_632, "2_256": 2_566_666},
}


def small(name: str, **kwargs) -> nn.Module:
    """The variant, narrow and short, its BatchNorms shifted and calibrated so that every neuron layer fires."""
    config = VARIANTS[name]
    size = {"img_size": 16 * config.patch_size // 4}
    torch.manual_seed(0)
    kwargs = {"embed_dim": 32, "depth": 2, "num_heads": 4, "time_steps": 3, "num_classes": 5} | size | kwargs
    model = timm.create_model(name, **kwargs)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.8, 2.0)
            nn.init.uniform_(m.bias, 0.3, 0.9)
            m.momentum = 1.0
    model.double().train()
    with torch.no_grad():
        model(example(model, batch=8, seed=3))
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 0.1
    return model


def example(model: nn.Module, batch: int = 3, seed: int = 1) -> torch.Tensor:
    c = model.config
    steps = (4,) if c.takes_events else ()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *steps, c.in_chans, *c.img_size, generator=generator, dtype=torch.float64)
    return x.abs().mul(2).round() if steps else x


@pytest.mark.parametrize("name", NAMES)
def test_published_parameter_count(name):
    family, size = name.split("_")[0], name.replace("cml_", "").split("_", 1)[1]
    with torch.device("meta"):
        model = timm.create_model(name)
    want = PARAMETERS[family].get(size) or PARAMETERS["either"][size]
    assert sum(p.numel() for p in model.parameters()) == want


def test_other_heads_counts():
    with torch.device("meta"):
        cifar100 = timm.create_model("spikingformer_cml_4_384", num_classes=100, num_heads=8)
        gesture = timm.create_model("spikingformer_cml_2_256", num_classes=11)
    assert sum(p.numel() for p in cifar100.parameters()) == 9_354_772
    assert sum(p.numel() for p in gesture.parameters()) == 2_566_923


def test_all_published_names_are_in_timm():
    sizes = ("4_256", "2_384", "4_384", "8_384", "8_512", "8_768", "2_256")
    names = {f"{f}{p}_{s}" for f in ("spikformer", "spikingformer") for p in ("", "_cml") for s in sizes}
    assert names == set(timm.list_models("spik*")) == set(VARIANTS)


def test_event_models_are_those_of_two_channels():
    assert {n for n, c in VARIANTS.items() if c.takes_events} == {n for n in NAMES if n.endswith("2_256")}
    assert not small("spikingformer_cml_2_256", in_chans=3).config.takes_events


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_does_not_see_its_neighbours(name):
    model = small(name).eval()
    x = example(model)
    with torch.no_grad():
        together = model(x)
        alone = torch.cat([model(sample[None]) for sample in x])
        shuffled = model(x[[2, 0, 1]])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(together[[2, 0, 1]], shuffled, rtol=1e-12, atol=1e-12)
    assert (together[0] - together[1]).abs().max() > 1e-6, "the check could not fail: all logits are the same"


@pytest.mark.parametrize("name", NAMES)
def test_calls_are_stateless(name):
    model = small(name).eval()
    x, other = example(model), example(model, seed=2)
    with torch.no_grad():
        first = model(x)
        model(other)
        assert torch.equal(model(x), first)
    pickle.dumps(model.state_dict())
    assert all("lif" not in key for key in model.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter(name):
    model = small(name).train()
    x = example(model).requires_grad_()
    model(x).square().sum().backward()
    before_norm = {f"{n}.conv.bias" for n, m in model.named_modules() if isinstance(getattr(m, "bn", None), nn.Module)}
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        if key in before_norm:  # BatchNorm takes its mean away again: exactly 0 but for rounding
            assert p.grad.abs().max() < 1e-9, key
        else:
            assert p.grad.abs().max() > 0, key
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_what_meets_a_weight_is_binary(name):
    model = small(name).eval()
    met: dict[str, torch.Tensor] = {}
    for key, m in model.named_modules():
        if isinstance(m, nn.Conv2d):
            m.register_forward_hook(lambda _, args, __, key=key: met.__setitem__(key, args[0].detach()))
    with torch.no_grad():
        model(example(model))
    spikformer = name.startswith("spikformer")
    for key, x in met.items():
        if key == "stem.stages.0.conv":
            continue  # the picture itself
        integers = spikformer and key.split(".")[-2] in ("q", "k", "v", "fc1", "rpe")  # sums of spikes
        values = set(x.unique().tolist())
        assert values <= (set(range(20)) if integers else {0.0, 1.0}), key
        assert len(values) > 1, f"{key} sees no spike: the check could not fail"


@pytest.mark.parametrize("name", NAMES)
def test_steps_and_stream_equal_one_call(name):
    model = small(name).eval()
    x = example(model)
    with torch.no_grad():
        whole, steps = model(x), model.forward_steps(x)
        torch.testing.assert_close(steps[-1], whole, rtol=1e-12, atol=1e-12)
        state = None
        frames = [x] * model.time_steps if x.ndim == 4 else x.unbind(1)
        for t, frame in enumerate(frames):
            logits, state = model.stream(frame, state)
            torch.testing.assert_close(logits, steps[t], rtol=1e-12, atol=1e-12)
        if x.ndim == 5:
            logits, state = model.stream(x[:, :3])
            logits, state = model.stream(x[:, 3:], state)
            torch.testing.assert_close(logits, whole, rtol=1e-12, atol=1e-12)
    assert state.steps == len(frames)


@pytest.mark.parametrize("name", [n for n in NAMES if not n.endswith(("_512", "_768", "2_384"))])
def test_timm_manners(name):
    model = small(name)
    x = example(model)
    model.eval()
    with torch.no_grad():
        features = model.forward_features(x)
        h, w = (s // model.config.patch_size for s in model.config.img_size)
        steps = x.shape[1] if x.ndim == 5 else model.time_steps
        assert features.shape == (steps, 3, 32, h, w)
        assert torch.equal(model.forward_head(features), model(x))
        assert model.forward_head(features, pre_logits=True).shape == (3, model.num_features)
    model.reset_classifier(7)
    assert model.double()(x).shape == (3, 7)
    model.reset_classifier(0)
    assert model(x).shape == (3, 32)
    c = model.config
    extractor = timm.create_model(name, features_only=True, embed_dim=32, num_heads=4, depth=2, img_size=c.img_size)
    maps = extractor.double()(x)
    assert [tuple(m.shape) for m in maps] == [(3, 32, h, w)] * 2
    assert extractor.feature_info.channels() == [32, 32]


IMPOSSIBLE_INDICES = [5, 0, -1, (4,), (0, -5), ()]


@pytest.mark.parametrize("indices", IMPOSSIBLE_INDICES, ids=str)
def test_impossible_feature_indices_are_refused(indices):
    model = small("spikingformer_4_384", depth=4).eval()
    message = "has 4 blocks: .* from 1 to 4, .* from -4 to 3; got "
    with pytest.raises(ValueError, match=message):
        model.forward_intermediates(example(model), indices=indices)
    with pytest.raises(ValueError, match=message):
        model.prune_intermediate_layers(indices)
    assert len(model.blocks) == 4
    with pytest.raises(ValueError, match=message):
        timm.create_model("spikingformer_4_384", depth=4, features_only=True, out_indices=indices)


@pytest.mark.parametrize(
    ("indices", "blocks"),
    [(None, [0, 1, 2, 3]), (4, [0, 1, 2, 3]), (1, [3]), ((-1, 0), [0, 3]), ([-4, 2], [0, 2])],
    ids=str,
)
def test_features_are_the_chosen_blocks_outputs(indices, blocks):
    model = small("spikingformer_4_384", depth=4).eval()
    x = example(model)
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, out: outputs.append(out.mean(0)))
    with torch.no_grad():
        maps = model.forward_intermediates(x, indices=indices, intermediates_only=True)
    assert len(maps) == len(blocks)
    assert all(torch.equal(got, outputs[i]) for got, i in zip(maps, blocks, strict=True))


def test_drop_path_drops_whole_samples_and_only_in_training():
    model = small("spikingformer_cml_4_384", drop_path_rate=0.5, depth=3)
    rates = [b.drop_path.rate for b in model.blocks]
    assert rates == pytest.approx([0, 0.25, 0.5])
    x = example(model, batch=16)
    torch.manual_seed(0)
    block = model.blocks[2].train()
    stream = model.stem(x[None], None, 3)
    out = block(stream)
    untouched = (out == stream).flatten(2).all(2)  # (T, B)
    assert torch.equal(untouched.any(0), untouched.all(0)), "a sample is dropped at all time steps or at none"
    assert 0 < untouched.all(0).sum() < 16
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", ["spikingformer_cml_4_384", "spikformer_8_384"])
def test_any_size_that_the_downsampling_divides(name):
    model = small(name).eval()
    p = model.config.patch_size
    for size in ((p, p), (2 * p, 5 * p)):
        assert model(torch.randn(2, 3, *size, dtype=torch.float64)).shape == (2, 5)
    with pytest.raises(ValueError, match=f"multiples of {p}; got {p + 1}x{2 * p}: resize or pad"):
        model(torch.randn(2, 3, p + 1, 2 * p, dtype=torch.float64))
    with pytest.raises(ValueError, match=f"multiples of {p}"):
        timm.create_model(name, img_size=p + 2)


@pytest.mark.parametrize("name", NAMES)
def test_stem_rounds_down_the_fractions_of_a_width_as_published(name):
    model = small(name, embed_dim=36).eval()
    assert [stage.conv.out_channels for stage in model.stem.stages] == [4, 9, 18, 36]
    x = example(model)
    with torch.no_grad(), use_backend("reference"):
        expected = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model.float()(x.float()), expected.float(), rtol=1e-4, atol=1e-5)


def test_wrong_arguments_say_what_to_do():
    with pytest.raises(TypeError, match=r"unknown argument 'depths'; a model takes .*depth"):
        timm.create_model("spikingformer_4_384", depths=3)
    for wrong, message in (
        ({"drop_rate": 0.1}, "no dropout, got drop_rate other than 0"),
        ({"global_pool": "max"}, "only average pooling is there .*, got 'max'"),
        ({"global_pool": ""}, "only average pooling is there .*, got ''"),
        ({"embed_dim": 7, "num_heads": 1}, "embed_dim must be a whole number of at least 8, got 7"),
        ({"embed_dim": 64.0}, "embed_dim must be a whole number of at least 8, got 64.0"),
        ({"mlp_ratio": 0.001}, "mlp_ratio must give at least one hidden channel for embed_dim 384, got 0.001"),
    ):
        with pytest.raises(ValueError, match=message):
            timm.create_model("spikingformer_4_384", **wrong)
    with pytest.raises(ValueError, match=r"expected floating-point numbers, got torch.uint8: give x.float\(\)"):
        small("spikingformer_4_384")(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="num_heads must divide embed_dim 64, got 7"):
        timm.create_model("spikingformer_4_384", embed_dim=64, num_heads=7)
    for stages in ([4, 5], [0, 0]):
        with pytest.raises(ValueError, match=r"pooled_stages must be different numbers of 0, 1, 2, 3, got \("):
            timm.create_model("spikingformer_8_384", pooled_stages=stages)
    _, state = small("spikingformer_4_384").stream(torch.zeros(2, 3, 16, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match="the state is of a batch of 2, the input of 1: give as many samples"):
        small("spikingformer_4_384").stream(torch.zeros(1, 3, 16, 16, dtype=torch.float64), state)
    with pytest.raises(ValueError, match=r"membranes of \d+ neuron layers, this model has \d+: it is another model's"):
        small("spikingformer_4_384", depth=1).stream(torch.zeros(2, 3, 16, 16, dtype=torch.float64), state)
    with pytest.raises(ValueError, match="expected the StreamState that stream"):
        small("spikingformer_4_384").stream(torch.zeros(2, 3, 16, 16, dtype=torch.float64), state.membranes)
    with pytest.raises(ValueError, match="takes 3 channels, got 1"):
        small("spikingformer_4_384").stream(torch.zeros(1, 1, 16, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match="takes 3 channels, got 1"):
        small("spikingformer_4_384")(torch.zeros(1, 1, 16, 16, dtype=torch.float64))
    for wrong in (np.zeros((1, 3, 16, 16)), [[0.0]], {"image": torch.zeros(1, 3, 16, 16)}):
        for call in (small("spikingformer_4_384"), small("spikingformer_4_384").forward_steps):
            with pytest.raises(ValueError, match=f"as a torch tensor, got {type(wrong).__name__}: convert it"):
                call(wrong)
    with pytest.raises(ValueError, match="expected pictures"):
        small("spikingformer_4_384")(torch.zeros(3, 16, 16, dtype=torch.float64))


def test_a_still_picture_runs_its_stem_once():
    model = small("spikingformer_cml_8_384").eval()
    batches = []
    model.stem.stages[0].conv.register_forward_hook(lambda _, args, __: batches.append(len(args[0])))
    model(example(model, batch=3))
    assert batches == [3], "the first convolution saw more than one copy of each picture"


@pytest.mark.parametrize("name", ["spikingformer_4_384", "spikformer_4_384"])
def test_neurons_are_listed_in_call_order(name):
    model = small(name)
    called: list[LIF] = []
    for n in model.neurons():
        n.register_forward_hook(lambda m, *_: called.append(m))
    model(example(model))
    assert called == model.neurons()


def test_compile_gives_the_same_logits():
    model = small("spikingformer_cml_4_384", depth=1).eval()
    x = example(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-12, atol=1e-12)


def test_version_is_there():
    assert spikingformer.__version__.count(".") == 2


def test_what_timms_own_train_script_passes():
    always = {"in_chans": None, "num_classes": 7, "drop_rate": 0.0, "drop_path_rate": None, "drop_block_rate": None,
              "global_pool": "avg", "bn_momentum": None, "bn_eps": None, "scriptable": False}  # fmt: skip
    assert timm.create_model("spikingformer_8_384", embed_dim=32, depth=1, **always).num_classes == 7


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace")
def test_a_traced_model_follows_its_input():
    """The kernels' results would be recorded as constants: the plain neurons serve there."""
    model = small("spikingformer_4_384").float().eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, torch.randn(2, 3, 16, 16))
        x = torch.randn(5, 3, 16, 16)
        torch.testing.assert_close(traced(x), model(x))
        with use_backend("native"), pytest.raises(ValueError, match=r"torch\.jit\.trace would record"):
            torch.jit.trace(model, x)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels-last", "contiguous"])
def test_the_heads_gradient_lies_in_memory_as_the_features_do(layout):
    """Nothing is copied between the head's mean and the last block's backward."""
    model = small("spikingformer_4_384")
    features = torch.randn(3, 2, 32, 4, 6, dtype=torch.float64).flatten(0, 1).contiguous(memory_format=layout)
    features = features.unflatten(0, (3, 2)).requires_grad_()
    (gradient,) = torch.autograd.grad(model.forward_head(features).square().sum(), features)
    assert gradient.stride() == features.stride()
    assert torch.equal(_mean_over_tokens(features), features.mean((3, 4)))


@pytest.mark.parametrize("time_steps", [0, -1, 2.5, True, "2"])
def test_time_steps_are_a_whole_number(time_steps):
    model = small("spikingformer_cml_4_384", depth=1)
    with pytest.raises(ValueError, match="time_steps must be a whole number of at least 1, got"):
        model.set_time_steps(time_steps)
    assert model.time_steps == model.config.time_steps == 3
    with pytest.raises(ValueError, match="time_steps must be a whole number of at least 1, got"):
        small("spikingformer_cml_4_384", depth=1, time_steps=time_steps)


def test_whole_numbers_of_numpy_are_taken():
    config = small("spikingformer_cml_4_384", depth=np.int64(1), time_steps=np.int32(3)).config
    assert [type(n) for n in (config.depth, config.time_steps)] == [int, int]


def test_set_time_steps_is_a_model_made_with_as_many():
    model = small("spikingformer_cml_4_384", depth=1).eval()
    other = small("spikingformer_cml_4_384", depth=1, time_steps=5).eval()
    other.load_state_dict(model.state_dict())
    model.set_time_steps(5)
    x = example(model)
    assert model.config == other.config
    assert torch.equal(model(x), other(x))
    assert model.forward_steps(x).shape[0] == 5
