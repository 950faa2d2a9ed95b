"""`spikingformer evaluate` on exported files."""

import json

import numpy as np
import pytest

from spikingformer.cli import main
from spikingformer.data.events.framing import Framing
from spikingformer.export import Preprocessing, describe, export_int8, export_onnx, export_torch, export_weights
from spikingformer.native import status
from spikingformer.training.checkpoint import ModelInfo, save_model

from .conftest import small_model

NAMES = tuple("0123456789")
FITS_DIGITS = {"embed_dim": 32, "depth": 1, "num_heads": 4, "num_classes": 10, "img_size": 16, "in_chans": 1}
ON_DIGITS = ["--data", "digits", "--workers", "0"]


@pytest.fixture
def model():
    return small_model("spikingformer_cml_4_384", **FITS_DIGITS, time_steps=2)


@pytest.fixture
def metadata(model):
    return describe(model, NAMES, preprocessing=Preprocessing((16, 16), (0.306,), (0.319,)))


def evaluated(capsys, path, *words):
    assert main(["evaluate", str(path), *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_format_is_as_accurate_as_the_checkpoint(tmp_path, model, metadata, capsys):
    arguments = {**FITS_DIGITS, "time_steps": 2}
    save_model(
        tmp_path / "best.safetensors",
        model.state_dict(),
        ModelInfo("spikingformer_cml_4_384", arguments, NAMES, (0.306,), (0.319,)),
    )
    expected = evaluated(capsys, tmp_path / "best.safetensors", *ON_DIGITS)
    assert expected["samples"] == 359
    for export, name in ((export_onnx, "m.onnx"), (export_torch, "m.pt2"), (export_weights, "m.safetensors")):
        export(model, tmp_path / name, metadata=metadata, check=False)
        found = evaluated(capsys, tmp_path / name, *ON_DIGITS)
        assert found.keys() == expected.keys()
        # folded float32 weights round once more; few spikes sit so near their threshold that it matters
        assert found["top1"] == pytest.approx(expected["top1"], abs=1)
        assert found["loss"] == pytest.approx(expected["loss"], rel=0.01)
        assert len(found["top1_after_step"]) == (2 if export is export_weights else 0)
        assert found["checkpoint"] == str(tmp_path / name)


@pytest.mark.skipif(not status().available, reason=f"no compiled kernels: {status().reason}")
def test_an_int8_file_is_measured(tmp_path, model, metadata, capsys):
    path = export_int8(model, tmp_path / "8.safetensors", metadata=metadata, check=False).path
    found = evaluated(capsys, path, *ON_DIGITS)
    assert found["samples"] == 359
    assert np.isfinite(found["loss"])
    assert main(["evaluate", str(path), *ON_DIGITS]) == 0
    assert capsys.readouterr().out.startswith("spikingformer_cml_4_384 on digits, 359 test samples, 16x16\n")


def test_event_frames_are_cut_as_the_model_was_trained(tmp_path, capsys, monkeypatch):
    from spikingformer.training import inputs

    model = small_model("spikformer_2_256", img_size=32, time_steps=3)
    pre = Preprocessing((32, 32), (0.0, 0.0), (1.0, 1.0), framing=Framing("time"))
    path = export_weights(model, tmp_path / "m.safetensors", metadata=describe(model, preprocessing=pre)).path
    asked = []

    def seen(settings, *others):
        asked.append(settings)
        raise ValueError("seen")

    monkeypatch.setattr(inputs, "create_test_loader", seen)
    assert main(["evaluate", str(path), "--data", "gesture"]) == 2
    assert (asked[0].split_by, asked[0].frames, asked[0].image_size) == ("time", 3, 32)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "spikingformer_cml_4_384 does not say what it was trained on: add --data NAME"),
        (["--device", "cuda:1"], "--device cuda:1: {} is an exported file, which runs on the CPU here"),
        (["--img-size", "32"], "--img-size 32: {} is an exported file, which has a fixed picture size: omit it"),
        (["--precision", "bf16"], "--precision bf16: {} is an exported file, which has its own precision: omit it"),
        (["--anytime"], "--anytime: {} is an exported file, which is evaluated with all its time steps"),
    ],
    ids=["data", "device", "size", "precision", "anytime"],
)
def test_what_an_exported_file_cannot_do_is_said(tmp_path, model, metadata, capsys, words, message):
    path = export_torch(model, tmp_path / "m.pt2", metadata=metadata, check=False).path
    assert main(["evaluate", str(path), *(ON_DIGITS if words else []), *words]) == 2
    assert message.format(path) in capsys.readouterr().err
