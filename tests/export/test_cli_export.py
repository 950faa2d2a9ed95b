"""`spikingformer export` from a checkpoint on disk."""

import argparse
import json

import pytest
import torch

from spikingformer.cli import export as command
from spikingformer.export import load_predictor
from spikingformer.export.checkpoint import file_sha256
from spikingformer.training.checkpoint import ModelInfo, load_model, save_model

from .conftest import SMALL, small_model


@pytest.fixture
def checkpoint(tmp_path):
    model = small_model("spikingformer_cml_4_384", time_steps=2, img_size=16)
    info = ModelInfo(
        name="spikingformer_cml_4_384",
        kwargs={**SMALL, "img_size": 16, "in_chans": 3, "time_steps": 2},
        class_names=("ant", "bee", "cat", "dog", "elk"),
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
        interpolation="bilinear",
        crop_fraction=0.9,
    )
    path = tmp_path / "best.safetensors"
    save_model(path, model.state_dict(), info)
    return path


def spikingformer(*words):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["export", *map(str, words)])
    return args.run(args)


@pytest.mark.parametrize(
    ("words", "file"),
    [
        (["--to", "onnx"], "best.onnx"),
        (["--to", "torch", "--streaming"], "best-step.pt2"),
        (["--to", "weights"], "best-folded.safetensors"),
    ],
    ids=["onnx", "torch-steps", "weights"],
)
def test_exported_file_predicts_what_the_checkpoint_predicts(checkpoint, capsys, words, file):
    assert spikingformer(checkpoint, *words, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["fold_spikes_different"] == 0
    predictor = load_predictor(checkpoint.with_name(file))
    x = torch.randn(2, 3, 16, 16)
    # folded float32 weights round once more (1e-7 relative); with this seed no spike sits that near its threshold
    torch.testing.assert_close(predictor.logits(x), load_predictor(checkpoint).logits(x), rtol=0, atol=1e-4)
    said = predictor.metadata
    assert said.class_names == ("ant", "bee", "cat", "dog", "elk")
    assert said.preprocessing.mean == (0.1, 0.2, 0.3)
    assert said.preprocessing.interpolation == "bilinear"
    assert said.preprocessing.crop_fraction == 0.9
    assert said.checkpoint_sha256 == file_sha256(checkpoint) == summary["checkpoint_sha256"]
    assert said.time_steps == 2


def test_a_part_goes_to_nir(checkpoint, tmp_path, capsys):
    assert spikingformer(checkpoint, "--to", "nir", "--part", "blocks.0.mlp", "-o", tmp_path / "mlp.nir") == 0
    assert "mlp.nir" in capsys.readouterr().out


def test_hub_folder_has_a_card(checkpoint, capsys):
    assert spikingformer(checkpoint, "--to", "hub", "--licence", "mit", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["files"] == ["README.md", "config.json", "model.safetensors"]
    assert "license: mit" in (checkpoint.parent / "best-hub" / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "nir"], r"stem.stages.2 cannot be written to NIR"),
        (["--to", "nir", "--streaming"], "--streaming is for --to onnx and torch, got --to nir"),
        (["--to", "weights", "--spikes"], "--spikes is for --to onnx, got --to weights"),
        (["--to", "onnx", "-o", "x.bin"], r"\*.onnx files, got 'x.bin'"),
        (["--to", "weights", "-o", "SAME"], "would overwrite the checkpoint"),
    ],
    ids=["nir-whole", "nir-streaming", "weights-spikes", "suffix", "overwrite"],
)
def test_what_cannot_be_done_is_said(checkpoint, words, message):
    with pytest.raises(ValueError, match=message):
        spikingformer(checkpoint, *(str(checkpoint) if w == "SAME" else w for w in words))


def test_checkpoint_predictor_is_the_model(checkpoint):
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(load_predictor(checkpoint).logits(x), load_model(checkpoint)[0](x), rtol=0, atol=0)
