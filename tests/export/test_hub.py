"""Hub folders: written offline, read back by plain timm, from a folder and through its hub loader."""

import json
from dataclasses import replace

import pytest
import timm
import torch

from spikingformer.data.events.framing import Framing
from spikingformer.export import Preprocessing, describe, export_weights, fold_batch_norm
from spikingformer.export.checkpoint import load_checkpoint
from spikingformer.export.hub import arguments_beyond_variant, push_hub_folder, save_hub_folder
from spikingformer.export.metadata import ExportMetadata
from spikingformer.export.model_card import CardFacts, EnergyEstimate, model_card
from spikingformer.export.opened import open_exported
from spikingformer.training.checkpoint import ModelInfo, load_model, save_model

from .conftest import SMALL, small_model

NAMES = ["ant", "bee", "cat", "dog", "elk"]


def saved(folder, name="spikingformer_cml_4_384", **overrides):
    model = small_model(name, **{"img_size": 16, "time_steps": 2, **overrides})
    chans = model.config.in_chans
    preprocessing = Preprocessing(tuple(model.config.img_size), (0.1,) * chans, (0.5,) * chans, "bilinear", 0.875)
    metadata = describe(model, NAMES, "ab" * 32, preprocessing)
    save_hub_folder(model, folder, metadata, CardFacts(data="digits", metrics={"top1": 97.5}))
    return model


@pytest.mark.parametrize(
    ("name", "overrides", "shape"),
    [
        ("spikingformer_cml_4_384", {}, (2, 3, 16, 16)),
        ("spikformer_2_256", {"img_size": 32, "time_steps": 4}, (2, 4, 2, 32, 32)),
        ("spikformer_4_384", {"pooled_stages": (1, 2, 3), "in_chans": 1}, (2, 1, 16, 16)),
    ],
    ids=["pictures", "events", "other-stem"],
)
def test_plain_timm_loads_the_folder(tmp_path, name, overrides, shape):
    model = saved(tmp_path / "hub", name, **overrides)
    said = json.loads((tmp_path / "hub" / "config.json").read_text())["pretrained_cfg"]
    chans = model.config.in_chans
    assert (said["input_size"], said["mean"]) == ([chans, *model.config.img_size], [0.1] * chans)
    again = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    assert again.time_steps == model.time_steps
    x = torch.rand(shape) * 2
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    cfg = timm.data.resolve_model_data_config(again)
    assert tuple(cfg["input_size"]) == (model.config.in_chans, *model.config.img_size)
    assert cfg["interpolation"] == "bilinear"
    assert cfg["crop_pct"] == 0.875
    assert set(cfg["mean"]) == {0.1}  # timm repeats the mean of a single channel
    assert list(again.pretrained_cfg["label_names"]) == NAMES


def test_a_failed_export_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    saved(tmp_path / "hub")
    before = {path.name: path.read_bytes() for path in (tmp_path / "hub").iterdir()}

    def fail(*args):
        raise RuntimeError("planted")

    monkeypatch.setattr("spikingformer.export.hub.model_card", fail)
    for folder in ("hub", "new"):
        with pytest.raises(RuntimeError, match="planted"):
            saved(tmp_path / folder)
    assert {path.name: path.read_bytes() for path in (tmp_path / "hub").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


def test_timms_hub_loader_reads_the_same_files(tmp_path, monkeypatch):
    model = saved(tmp_path / "hub")
    asked = []

    def from_folder(repo_id, filename, **_):
        asked.append((repo_id, filename))
        return str(tmp_path / "hub" / filename)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", from_folder)
    again = timm.create_model("hf-hub:someone/digits", pretrained=True).eval()
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    assert ("someone/digits", "config.json") in asked
    assert ("someone/digits", "model.safetensors") in asked


def test_a_loaded_folder_can_be_tuned_for_other_classes(tmp_path):
    saved(tmp_path / "hub")
    model = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True, num_classes=3)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 3)


def test_config_holds_only_what_differs_from_the_variant(tmp_path):
    model = saved(tmp_path / "hub")
    assert arguments_beyond_variant(describe(model)) == {
        "embed_dim": 32,
        "depth": 1,
        "num_heads": 4,
        "img_size": (16, 16),
        "num_classes": 5,
        "time_steps": 2,
    }
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["architecture"] == "spikingformer_cml_4_384"
    assert config["checkpoint_sha256"] == "ab" * 32


def test_card_states_the_run_and_nothing_else(tmp_path):
    info = ModelInfo(
        name="spikformer_4_384",
        kwargs={"img_size": 32, "in_chans": 3},
        class_names=tuple(NAMES),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        epoch=12,
        metrics={"top1": 91.234, "loss": 0.31},
        recipe={"data": {"name": "cifar10", "validation_fraction": 0.0}},
        versions={"torch": "9.9"},
    )
    energy = {"preset": {"name": "exact"}, "totals": {"energy_mj": 0.1234}, "samples": 1000, "memory_model": "none"}
    (tmp_path / "energy.json").write_text(json.dumps(energy))
    facts = CardFacts.from_run(info, EnergyEstimate.read(tmp_path / "energy.json"), "cc-by-4.0")
    model = small_model("spikformer_4_384")
    card = model_card(describe(model, NAMES), facts)
    assert card.startswith("---\nlibrary_name: timm\nlicense: cc-by-4.0\n")
    for text in (
        "Trained on cifar10; 5 classes: ant, bee",
        "| top1 | 91.23 |",
        "One run, after epoch 13. Counted on the test part.",
        "0.1234 mJ per sample, estimated, not measured: preset `exact`",
        "rates of 1000 samples",
        "- torch 9.9",
        "## Licence\n\ncc-by-4.0",
    ):
        assert text in card
    held_out = CardFacts.from_run(replace(info, recipe={"data": {"name": "cifar10", "validation_fraction": 0.1}}))
    assert "Counted on the held-out training samples." in model_card(describe(model, NAMES), held_out)
    unknown = CardFacts(metrics={"top1": 50.0})
    assert "One run. Counted on the part that was not recorded." in model_card(describe(model, NAMES), unknown)
    bare = model_card(describe(model, NAMES), CardFacts())
    assert "## Accuracy\n\nNot recorded." in bare
    assert "## Energy\n\nNot estimated." in bare
    assert "Trained on not recorded" in bare


def test_wrong_use_says_what_to_do(tmp_path):
    model = small_model("spikformer_4_384")
    with pytest.raises(ValueError, match="give it before BatchNorm is folded"):
        save_hub_folder(fold_batch_norm(model), tmp_path, describe(model), CardFacts())
    other_head = small_model("spikformer_4_384")
    other_head.head = torch.nn.Linear(32, 3)
    with pytest.raises(ValueError, match="the head was replaced: "):
        save_hub_folder(other_head, tmp_path, describe(other_head), CardFacts())
    (tmp_path / "diary.txt").write_text("private")
    with pytest.raises(ValueError, match=r"holds other files \(diary.txt\): name a new folder"):
        save_hub_folder(model, tmp_path, describe(model), CardFacts())
    with pytest.raises(ValueError, match=r"has no config.json"):
        push_hub_folder(tmp_path, "a/b")
    saved(tmp_path / "hub")
    with pytest.raises(ValueError, match="named \"user/name\", got 'b'"):
        push_hub_folder(tmp_path / "hub", "b")
    with pytest.raises(ValueError, match="is not an energy estimate"):
        EnergyEstimate.read(tmp_path / "diary.txt")


def test_card_of_an_event_model_speaks_of_counts():
    model = small_model("spikformer_2_256", img_size=32)
    card = model_card(describe(model), CardFacts())
    assert "Input: raw counts of events, channel 0 OFF, 1 ON, summed into 32x32 cells." in card
    assert "crop" not in card


@pytest.mark.parametrize(
    ("name", "overrides", "shape", "kind"),
    [
        ("spikingformer_cml_4_384", {}, (2, 3, 16, 16), "pictures"),
        ("spikformer_2_256", {"img_size": 32, "time_steps": 4}, (2, 4, 2, 32, 32), "events"),
    ],
)
def test_commands_read_the_folder(tmp_path, name, overrides, shape, kind):
    model = saved(tmp_path / "hub", name, **overrides)
    again, info = load_model(tmp_path / "hub")
    x = torch.rand(shape) * 2
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    assert (info.class_names, info.kind, info.crop_fraction) == (tuple(NAMES), kind, 0.875)
    assert info.image_size == tuple(model.config.img_size)


def test_every_file_remembers_how_recordings_were_framed(tmp_path):
    model = small_model("spikformer_2_256", img_size=32, time_steps=3)
    arguments = {**SMALL, "img_size": 32, "in_chans": 2}
    recipe = {"data": {"name": "gesture", "split": "windows", "split_by": "time"}}
    info = ModelInfo("spikformer_2_256", {**arguments, "time_steps": 3}, tuple(NAMES), (0.0, 0.0), (1.0, 1.0),
                     kind="events", recipe=recipe)  # fmt: skip
    save_model(tmp_path / "best.safetensors", model.state_dict(), info)
    loaded, metadata = load_checkpoint(tmp_path / "best.safetensors")
    framing = Framing("time", 200_000)
    assert metadata.preprocessing.framing == framing
    folded = export_weights(loaded, tmp_path / "folded.safetensors", metadata=metadata, check=False).path
    assert open_exported(folded)[1].event_framing == framing
    save_hub_folder(loaded, tmp_path / "hub", metadata, CardFacts())
    assert load_model(tmp_path / "hub")[1].event_framing == framing
    older = metadata.to_strings()
    described = json.loads(older["spikingformer.preprocessing"])
    del described["framing"]
    older["spikingformer.preprocessing"] = json.dumps(described)
    assert ExportMetadata.from_strings(older).preprocessing.framing == Framing()


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"architecture": "x", "num_classes": 5, "pretrained_cfg": {"input_size": [3, 16]}}']
)
def test_a_damaged_description_is_refused(tmp_path, text):
    saved(tmp_path / "hub")
    (tmp_path / "hub" / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config.json: not the description of a hub folder"):
        load_model(tmp_path / "hub")
