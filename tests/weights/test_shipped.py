"""Weights that ship load offline, are what their table says, and are as good as it says."""

import dataclasses
import shutil

import pytest
import timm
import torch

import spikingformer  # noqa: F401  (registers the models)
from spikingformer.data.settings import DataSettings
from spikingformer.reproduce.ship import WEIGHTS_FOLDER, ship
from spikingformer.training.checkpoint import HELD_OUT, load_model, read_model_file, save_model
from spikingformer.training.distributed import World
from spikingformer.training.evaluation import evaluate
from spikingformer.training.inputs import create_test_loader
from spikingformer.weights import read_table, shipped_file, shipped_weights

NAMES = sorted(shipped_weights())
DIGITS = "spikingformer_cml_4_384.digits"


def test_there_are_weights():
    assert DIGITS in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_shipped_weights_are_what_the_table_says(name):
    entry = shipped_weights()[name]
    entry.check()
    assert (WEIGHTS_FOLDER / f"{name}.md").read_text().startswith(f"# {name}\n")
    assert entry.sha256 in (WEIGHTS_FOLDER / f"{name}.md").read_text()
    model = timm.create_model(name, pretrained=True)
    assert model.pretrained_cfg["tag"] == entry.tag
    same, info = load_model(name)
    assert info.metrics["top1"] == entry.top1
    assert info.evaluated_on == entry.part == "test part"
    assert f"top-1 {entry.top1:.2f} % on its test part" in model.pretrained_cfg["description"]
    assert f"| top-1 | {entry.top1:.2f} % on the test part, epoch" in (WEIGHTS_FOLDER / f"{name}.md").read_text()
    assert all(torch.equal(v, same.state_dict()[k]) for k, v in model.state_dict().items())
    assert name in timm.list_models(pretrained=True)


def test_no_file_lies_there_that_the_table_does_not_know():
    assert {p.name for p in WEIGHTS_FOLDER.glob("*.safetensors")} == {e.file for e in shipped_weights().values()}


@pytest.mark.parametrize(
    "data",
    [
        DataSettings(name="digits", image_size=16, channels=1),
        DataSettings(name="digits_dvs", image_size=16, channels=2, frames=8),
    ],
    ids=lambda d: d.name,
)
def test_weights_for_embedded_data_are_as_accurate_as_they_say(data):
    model, info = load_model(f"spikingformer_cml_4_384.{data.name}")
    loader, _ = create_test_loader(data, 64, 0, torch.device("cpu"), World())
    assert evaluate(model, loader, 10).top1 == pytest.approx(info.metrics["top1"], abs=0.3)  # one scan of 359


def test_event_weights_take_frames_and_say_that_their_data_are_simulated():
    name = "spikingformer_cml_4_384.digits_dvs"
    model = timm.create_model(name, pretrained=True).eval()
    assert model(torch.zeros(1, 8, 2, 16, 16)).shape == (1, 10)
    card = (WEIGHTS_FOLDER / f"{name}.md").read_text()
    assert "digits_dvs, simulated recordings" in card
    assert "compares with nothing" in card
    assert "simulated" not in (WEIGHTS_FOLDER / f"{DIGITS}.md").read_text()


def test_a_plain_name_stays_the_published_model():
    model = timm.create_model("spikingformer_cml_4_384")
    assert (model.config.embed_dim, model.config.in_chans) == (384, 3)
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model("spikingformer_cml_4_384", pretrained=True, embed_dim=32, depth=1, num_heads=2)


def test_a_tag_gives_the_size_and_the_caller_may_change_the_head():
    model = timm.create_model(DIGITS, pretrained=True, num_classes=3)
    assert (model.config.embed_dim, model.config.in_chans, model.head.out_features) == (64, 1, 3)
    whole = timm.create_model(DIGITS, pretrained=True)
    assert torch.equal(model.stem.stages[0].conv.weight, whole.stem.stages[0].conv.weight)
    assert not torch.equal(timm.create_model(DIGITS).stem.stages[0].conv.weight, whole.stem.stages[0].conv.weight)


def test_a_damaged_file_is_refused(tmp_path, monkeypatch):
    entry = shipped_weights()[DIGITS]
    copy = tmp_path / entry.file
    shutil.copy(entry.path, copy)
    data = bytearray(copy.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(bytes(data))
    monkeypatch.setattr("spikingformer.weights._FOLDER", tmp_path)
    with pytest.raises(ValueError, match="damaged: expected sha256"):
        shipped_file(DIGITS)
    with pytest.raises(ValueError, match="damaged: expected sha256"):
        timm.create_model(DIGITS, pretrained=True)
    copy.unlink()
    with pytest.raises(ValueError, match="is missing: install the package again"):
        entry.check()


def test_an_unknown_tag_is_no_file():
    assert shipped_file("spikingformer_cml_4_384.nothing") is None


def test_shipping_writes_file_row_and_card_in_half_the_size(tmp_path):
    entry = shipped_weights()[DIGITS]
    made = ship(entry.path, "copy", entry.recipe, entry.result, tmp_path, torch.bfloat16)
    assert read_table(tmp_path) == {made.name: made}
    assert (tmp_path / made.file).stat().st_size < 0.6 * entry.path.stat().st_size
    again = ship(entry.path, "other", entry.recipe, entry.result, tmp_path)
    assert sorted(read_table(tmp_path)) == [f"{entry.model}.copy", f"{entry.model}.other"]
    assert dataclasses.replace(again, tag="copy", file="", sha256="") == dataclasses.replace(made, file="", sha256="")


def test_accuracy_on_held_out_samples_ships_as_such(tmp_path):
    weights, info = read_model_file(DIGITS)
    save_model(tmp_path / "best.safetensors", weights, dataclasses.replace(info, metrics_part=HELD_OUT))
    made = ship(tmp_path / "best.safetensors", "copy", "recipe", "result", tmp_path)
    assert made.part == HELD_OUT
    assert f"{made.top1:.2f} % on the held-out training samples, epoch" in (tmp_path / f"{made.name}.md").read_text()


def test_a_card_says_that_weights_were_rounded(tmp_path):
    for name, dtype in (("whole", None), ("rounded", torch.bfloat16)):
        folder = tmp_path / name
        folder.mkdir()
        ship(shipped_weights()[DIGITS].path, "digits", "recipe", "result", folder, dtype)
        card = (folder / f"{DIGITS}.md").read_text()
        assert ("rounded to bfloat16" in card) == (dtype is not None)
