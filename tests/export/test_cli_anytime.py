"""`spikingformer evaluate --anytime` on the embedded digits."""

import json

import pytest
import timm
import torch

from spikingformer.cli import main
from spikingformer.export import anytime
from spikingformer.training.checkpoint import ModelInfo, save_model

from .conftest import small_model

FITS_DIGITS = {"num_classes": 10, "img_size": 16, "in_chans": 1}


def saved(path, model, name, arguments):
    recipe = {"data": {"name": "digits", "image_size": 16, "channels": 1}}
    info = ModelInfo(name, arguments, tuple(map(str, range(10))), (0.3,), (0.4,), recipe=recipe)
    save_model(path, model.state_dict(), info)
    return path


@pytest.fixture
def digits_checkpoint(tmp_path):
    arguments = {"embed_dim": 32, "depth": 1, "num_heads": 4, **FITS_DIGITS}
    model = small_model("spikingformer_cml_4_384", **arguments)
    return saved(tmp_path / "best.safetensors", model, "spikingformer_cml_4_384", arguments)


def test_curve_ends_at_the_accuracy_of_all_steps(digits_checkpoint, capsys, monkeypatch):
    under_autocast = []

    def watched(*arguments):
        under_autocast.append(torch.is_autocast_enabled("cpu"))
        return step_logits(*arguments)

    step_logits = anytime.step_logits
    monkeypatch.setattr(anytime, "step_logits", watched)
    words = ["evaluate", str(digits_checkpoint), "--anytime", "--json", "--workers", "0", "--precision", "bf16"]
    assert main(words) == 0
    assert under_autocast == [True]
    found = json.loads(capsys.readouterr().out)
    curve = found["anytime"]
    assert curve[-1]["threshold"] is None
    assert curve[-1]["accuracy"] == pytest.approx(found["top1"])
    assert curve[-1]["mean_steps"] == 4
    assert curve[0]["mean_steps"] <= curve[1]["mean_steps"] <= 4
    assert 0 < curve[0]["energy_mj"] <= curve[-1]["energy_mj"]


def test_a_model_without_time_steps_is_refused_before_it_is_evaluated(tmp_path, capsys, monkeypatch):
    model = timm.create_model("test_vit", **FITS_DIGITS)
    path = saved(tmp_path / "best.safetensors", model, "test_vit", FITS_DIGITS)
    monkeypatch.setattr("spikingformer.training.evaluation.evaluate", lambda *_, **__: pytest.fail("was evaluated"))
    assert main(["evaluate", str(path), "--anytime", "--workers", "0"]) == 2
    assert "--anytime: test_vit has no time steps to stop after" in capsys.readouterr().err
