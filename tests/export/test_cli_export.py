"""`spikingformer export` from a checkpoint on disk."""

import argparse
import json

import pytest
import torch

from spikingformer.cli import export as command
from spikingformer.export import load_predictor
from spikingformer.export.checkpoint import file_sha256
from spikingformer.training.checkpoint import ModelInfo, load_model, read_model_file, save_model
from spikingformer.weights import shipped_weights

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
        (["--to", "hub", "--energy", "absent.json"], "absent.json does not exist: write it with `spikingformer energy"),
    ],
    ids=["nir-whole", "nir-streaming", "weights-spikes", "suffix", "overwrite", "no-energy-file"],
)
def test_what_cannot_be_done_is_said(checkpoint, words, message):
    with pytest.raises(ValueError, match=message):
        spikingformer(checkpoint, *(str(checkpoint) if w == "SAME" else w for w in words))


def test_checkpoint_predictor_is_the_model(checkpoint):
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(load_predictor(checkpoint).logits(x), load_model(checkpoint)[0](x), rtol=0, atol=0)


def test_weights_that_come_with_the_package_are_exported_by_their_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = "spikingformer_cml_4_384.digits"
    assert spikingformer(name, "--to", "weights", "--no-check", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["path"] == f"{name}-folded.safetensors"
    assert said["checkpoint_sha256"] == shipped_weights()[name].sha256
    x = torch.rand(1, 1, 16, 16)
    torch.testing.assert_close(
        load_predictor(said["path"]).logits(x), load_predictor(name).logits(x), rtol=0, atol=1e-4
    )


def test_an_exported_file_is_not_exported_again(checkpoint):
    assert spikingformer(checkpoint, "--to", "weights", "--no-check") == 0
    for name in ("best-folded.safetensors", "best.onnx"):
        with pytest.raises(ValueError, match="is already an exported file: give the checkpoint"):
            spikingformer(checkpoint.with_name(name), "--to", "weights")


def test_a_hub_folder_is_exported_like_the_checkpoint_it_was_made_from(checkpoint, capsys):
    assert spikingformer(checkpoint, "--to", "hub") == 0
    folder = checkpoint.with_name("best-hub")
    capsys.readouterr()
    assert spikingformer(folder, "--to", "weights", "--no-check", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["path"] == str(checkpoint.with_name("best-hub-folded.safetensors"))
    assert said["checkpoint_sha256"] == file_sha256(folder / "model.safetensors")
    x = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(
        load_predictor(said["path"]).logits(x), load_predictor(checkpoint).logits(x), rtol=0, atol=1e-4
    )


def test_each_part_has_a_file_of_its_own(checkpoint):
    for part in ("blocks.0.mlp", "stem.last"):
        assert spikingformer(checkpoint, "--to", "nir", "--part", part) == 0
        assert checkpoint.with_name(f"best-{part}.nir").is_file()


@pytest.mark.parametrize(
    "words",
    [["--to", "weights"], ["--to", "weights", "--no-check"], ["--to", "hub"], ["--to", "nir", "--part", "stem.last"]],
    ids=["checked", "unchecked", "hub", "nir"],
)
def test_weights_that_are_not_numbers_are_refused(checkpoint, words):
    weights, info = read_model_file(checkpoint)
    weights["head.weight"][0, 0] = float("nan")
    save_model(checkpoint, weights, info)
    with pytest.raises(ValueError, match=r"1 of the model's weights hold NaN or infinity, first head.weight"):
        spikingformer(checkpoint, *words)
