"""Conversion of published checkpoints: names, refusals."""

import re

import pytest
import timm
import torch

import spikingformer  # noqa: F401
from spikingformer.official import WRAPPERS, convert_state_dict, described_by, doubts, our_name, weights_of


@pytest.mark.parametrize(
    ("official", "family", "ours"),
    [
        ("module.patch_embed.proj_conv.weight", "spikingformer", "stem.stages.0.conv.weight"),
        ("module._orig_mod.head.weight", "spikformer", "head.weight"),
        ("patch_embed.proj3_bn.running_var", "spikingformer", "stem.stages.3.bn.running_var"),
        ("patch_embed.block4_conv.weight", "spikingformer", "stem.last.conv.weight"),
        ("patch_embed.block0_bn.weight", "spikingformer", "stem.stages.0.bn.weight"),
        ("patch_embed.proj4_lif", "spikingformer", "stem.stages.3.lif"),
        ("block.7.attn.proj_lif", "spikingformer", "blocks.7.attn.lif"),
        ("block.0.mlp.mlp2_bn.bias", "spikingformer", "blocks.0.mlp.fc2.bn.bias"),
        ("patch_embed.proj_conv3.weight", "spikingformer", "stem.stages.3.conv.weight"),
        ("patch_embed.rpe_bn.bias", "spikingformer", "stem.last.bn.bias"),
        ("block.2.mlp.fc1_conv.weight", "spikingformer", "blocks.2.mlp.fc1.conv.weight"),
        ("block.0.attn.res_lif", "spikformer", None),
        ("patch_embed.proj_conv.weight", "spikformer", "stem.stages.0.conv.weight"),
        ("patch_embed.proj_bn3.weight", "spikformer", "stem.stages.3.bn.weight"),
        ("patch_embed.block1_conv.weight", "spikformer", "stem.stages.0.conv.weight"),
        ("patch_embed.rpe_bn.weight", "spikformer", "stem.rpe.bn.weight"),
        ("block.1.attn.proj_lif", "spikformer", "blocks.1.attn.proj.lif"),
        ("block.1.mlp.fc1_linear.bias", "spikformer", "blocks.1.mlp.fc1.conv.bias"),
        ("block.1.norm1.weight", "spikformer", None),
        ("pos_embed", "spikformer", None),
        ("head.total_ops", "spikingformer", None),
    ],
)
def test_names(official, family, ours):
    assert our_name(official, family) == ours


def test_refusals_name_the_keys():
    kwargs = {"embed_dim": 32, "depth": 1, "num_heads": 4, "img_size": 32}
    model = timm.create_model("spikingformer_cml_4_384", **kwargs)
    good = {"head.weight": torch.zeros(10, 32), "head.bias": torch.zeros(10)}
    with pytest.raises(ValueError, match=r"stem\.stages\.0\.conv\.weight|blocks.* missing from the checkpoint"):
        convert_state_dict(good, model)
    with pytest.raises(ValueError, match=r"head\.weight: shape \(100, 32\), the model's head\.weight is \(10, 32\)"):
        convert_state_dict({"state_dict": {"head.weight": torch.zeros(100, 32)}}, model)
    with pytest.raises(ValueError, match=r"encoder\.weight: no such weight in Spikingformer"):
        convert_state_dict({"encoder.weight": torch.zeros(1)}, model)
    with pytest.raises(ValueError, match="expected a model of this package, got Linear"):
        convert_state_dict({}, torch.nn.Linear(1, 1))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_weights_are_found_under_every_wrapper(wrapper):
    weights = weights_of({wrapper: {"_orig_mod.head.weight": torch.ones(1)}, "epoch": 3}, "x.pth")
    assert list(weights) == ["head.weight"]


def test_no_weights():
    for content in ({"epoch": 3}, [1], {"state_dict": {}}):
        with pytest.raises(ValueError, match=r"x\.pth: no weights in it \(expected .*under state_dict"):
            weights_of(content, "x.pth")


@pytest.mark.parametrize("name", ["spikingformer_cml_4_384", "spikformer_4_384"])
def test_our_own_state_dict_stands(name):
    model = timm.create_model(name, embed_dim=32, depth=2, num_heads=4, img_size=16)
    weights = model.state_dict()
    described = described_by(weights, model.family())
    assert (described["embed_dim"], described["depth"], described["num_classes"]) == (32, 2, 10)
    partial = {key: value for key, value in weights.items() if not key.endswith("num_batches_tracked")}
    converted = convert_state_dict(partial, model)
    assert all(torch.equal(converted[key], value) for key, value in weights.items())


def published(model, renames):
    """A state dict of `model` under published names."""
    weights = {}
    for name, value in model.state_dict().items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        weights[name] = value
    return weights


BLOCKS = [(r"^blocks\.(\d+)\.attn\.(q|k|v|proj)\.(conv|bn)", r"block.\1.attn.\2_\3")]
OLD_STEM = [
    (r"^stem\.stages\.0\.(\w+)", r"patch_embed.proj_\1"),
    (r"^stem\.stages\.(\d)\.(\w+)", r"patch_embed.proj_\2\1"),
]
FC = [(r"^blocks\.(\d+)\.mlp\.fc(\d)\.(conv|bn)", r"block.\1.mlp.fc\2_\3")]
SPIKFORMER_IMAGENET = [*BLOCKS, *OLD_STEM, *FC, (r"^stem\.rpe\.(\w+)", r"patch_embed.rpe_\1")]
MLP = [(r"^blocks\.(\d+)\.mlp\.fc(\d)\.(conv|bn)", r"block.\1.mlp.mlp\2_\3")]
SPIKINGFORMER_CIFAR = [*BLOCKS, *MLP, (r"^stem\.stages\.(\d)\.(\w+)", r"patch_embed.block\1_\2"),
                       (r"^stem\.last\.(\w+)", r"patch_embed.block4_\1")]  # fmt: skip


def small(name, **kwargs):
    return timm.create_model(name, embed_dim=32, depth=1, num_heads=4, num_classes=10, **kwargs)


def test_names_of_the_other_family_are_told():
    weights = published(small("spikformer_8_384"), SPIKFORMER_IMAGENET)
    right, other = small("spikformer_8_384"), small("spikingformer_8_384")
    assert doubts(weights, right) == []
    convert_state_dict(weights, right)
    (doubt,) = doubts(weights, other)  # an earlier Spikingformer had the same names: no refusal
    assert doubt == "block.0.mlp.fc1_conv.bias is a name of spikformer checkpoints, the model is a spikingformer"
    weights["pos_embed"] = torch.zeros(1)  # only Spikformer for event frames has it
    with pytest.raises(ValueError, match=r"one of a spikformer \(it has pos_embed\), the model is a spikingformer"):
        convert_state_dict(weights, other)


def test_names_of_the_other_downsampling_are_told():
    weights = published(small("spikingformer_4_384"), SPIKINGFORMER_CIFAR)
    assert doubts(weights, small("spikingformer_4_384")) == []
    (doubt,) = doubts(weights, small("spikingformer_cml_4_384"))
    assert doubt == ("patch_embed.block0_conv.weight is a name of checkpoints with pool='sps', the model has 'cml'")
    weights = published(small("spikformer_8_384"), SPIKFORMER_IMAGENET)
    assert "pool='sps', the model has 'cml'" in doubts(weights, small("spikformer_cml_8_384"))[0]


def test_our_own_names_leave_no_doubt():
    model = small("spikingformer_cml_4_384")
    assert doubts(model.state_dict(), small("spikingformer_4_384")) == []


def test_the_described_ratio_gives_the_hidden_width_back():
    model = timm.create_model("spikingformer_cml_4_384", embed_dim=56, depth=1, num_heads=7, mlp_ratio=1.1)
    weights = model.state_dict()
    assert int(56 * (61 / 56)) == 60, "61 hidden channels are one less after division and multiplication"
    again = timm.create_model("spikingformer_cml_4_384", num_heads=7, **described_by(weights, model.family()))
    again.load_state_dict(convert_state_dict(weights, again), strict=True)
