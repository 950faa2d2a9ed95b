"""`spikingformer evaluate --anytime` on the embedded digits."""

import json

import pytest

from spikingformer.cli import main
from spikingformer.training.checkpoint import ModelInfo, save_model

from .conftest import small_model


@pytest.fixture
def digits_checkpoint(tmp_path):
    arguments = {"embed_dim": 32, "depth": 1, "num_heads": 4, "num_classes": 10, "img_size": 16, "in_chans": 1}
    model = small_model("spikingformer_cml_4_384", **arguments)
    recipe = {"data": {"name": "digits", "image_size": 16, "channels": 1}}
    names = tuple(map(str, range(10)))
    info = ModelInfo("spikingformer_cml_4_384", arguments, names, (0.3,), (0.4,), recipe=recipe)
    save_model(tmp_path / "best.safetensors", model.state_dict(), info)
    return tmp_path / "best.safetensors"


def test_curve_ends_at_the_accuracy_of_all_steps(digits_checkpoint, capsys):
    assert main(["evaluate", str(digits_checkpoint), "--anytime", "--json", "--workers", "0"]) == 0
    found = json.loads(capsys.readouterr().out)
    curve = found["anytime"]
    assert curve[-1]["threshold"] is None
    assert curve[-1]["accuracy"] == pytest.approx(found["top1"])
    assert curve[-1]["mean_steps"] == 4
    assert curve[0]["mean_steps"] <= curve[1]["mean_steps"] <= 4
    assert 0 < curve[0]["energy_mj"] <= curve[-1]["energy_mj"]
