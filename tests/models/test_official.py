"""Conversion of published checkpoints: names, refusals."""

import pytest
import timm
import torch

import spikingformer  # noqa: F401
from spikingformer.official import WRAPPERS, convert_state_dict, described_by, our_name, weights_of


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
