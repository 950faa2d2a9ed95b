"""`spikingformer energy` as people type it."""

import argparse
import csv
import json
from pathlib import Path

import pytest
import timm
import torch

from spikingformer.cli import energy
from spikingformer.energy.result import LAYER_COLUMNS, SCHEMA
from spikingformer.training.checkpoint import ModelInfo, save_model

SMALL = {"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 16, "in_chans": 1, "num_classes": 10, "time_steps": 2}


def command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    energy.add_parser(parser.add_subparsers())
    args = parser.parse_args(["energy", *words])
    return args.run(args)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = timm.create_model("spikingformer_cml_2_256", **SMALL)
    recipe = {"data": {"name": "digits", "image_size": 16, "channels": 1}}
    info = ModelInfo("spikingformer_cml_2_256", SMALL, tuple("0123456789"), (0.306,), (0.319,), recipe=recipe)
    path = tmp_path_factory.mktemp("run") / "best.safetensors"
    save_model(path, model.state_dict(), info)
    return path


def test_static_table_of_a_registered_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("spikingformer_8_768", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == SCHEMA
    assert document["totals"]["dense"] == 74_970_937_344
    assert document["totals"]["energy_mj"] is None
    assert document["constants"]["fp32_add"]["value"] == 0.9
    assert "Horowitz" in document["constants"]["fp32_add"]["source"]
    assert command("spikingformer_8_768") == 0
    out = capsys.readouterr().out
    assert "74.97 G" in out
    assert "no firing rates" in out


def test_assumed_rate_and_all_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        command("spikingformer_cml_4_256", "--assume-rate", "0.1", "--also", "all", "--memory", "sram64", "--json") == 0
    )
    document = json.loads(capsys.readouterr().out)
    assert {p["preset"] for p in document["also"]} == set(energy.PRESET_NAMES) - {"exact"}
    assert document["totals"]["by_component_mj"]["memory"] > 0
    assert sum(document["totals"]["by_component_mj"].values()) == pytest.approx(document["totals"]["energy_mj"])


def test_checkpoint_on_its_own_data(checkpoint: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "layers.csv"
    assert command(str(checkpoint), "--data", "--samples", "40", "--csv", str(file)) == 0
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert tuple(rows[0]) == LAYER_COLUMNS
    assert rows[0]["name"] == "stem.stages.0.conv"
    assert command(str(checkpoint), "--data", "digits", "--samples", "40", "--batch-size", "16", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["samples"] == 40
    assert 0 <= document["accuracy"] <= 1
    assert any("only 40 samples" in w for w in document["warnings"])
    saved = tmp_path / "rates.json"
    saved.write_text(json.dumps(document))
    assert (
        command(str(checkpoint.parent), "--rates", str(saved), "--json") == 0
    )  # a run's folder; our own JSON as rates
    again = json.loads(capsys.readouterr().out)
    for a, b in zip(document["layers"], again["layers"], strict=True):
        assert a["input_rate"] == pytest.approx(b["input_rate"], rel=1e-9) or "@" in a["name"]


def test_table_of_a_checkpoint(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(str(checkpoint), "--data", "--samples", "8", "--all-rows") == 0
    out = capsys.readouterr().out
    for text in ("accuracy", "8 samples", "stem.stages.1.lif", "residual add", "neurons", "break-even"):
        assert text in out


def test_dummy_input_of_random_weights_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--img-size", "16", "--in-chans", "2", "--data", "random", "--samples", "2", "--json"]
    assert command("spikingformer_cml_2_256", *words) == 0
    warnings = " ".join(json.loads(capsys.readouterr().out)["warnings"])
    assert "untrained" in warnings
    assert "dummy input" in warnings


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["spikingformer_9"], "unknown model"),
        (["spikingformer_cml_4_384.nope"], "no weights 'nope' of this model; `spikingformer models` lists"),
        (["resnet18"], r"resnet18 is not a model of this package \(`spikingformer models` lists them\)"),
        (["absent/best.safetensors", "--data"], "absent"),
        (["spikingformer_cml_2_256", "--data"], "add --data NAME"),
        (["spikingformer_cml_2_256", "--assume-rate", "2"], r"\[0, 1\]"),
        (["spikingformer_cml_2_256", "--data", "digit", "--img-size", "16"], "digits"),
    ],
    ids=["name", "tag", "foreign", "file", "no data named", "rate", "data set"],
)
def test_errors_say_what_to_do(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command(*words)


@pytest.mark.parametrize(
    "words",
    [["--data"], ["--data", "digits"], ["--rates", "r.json"], ["--assume-rate", "0.1"], ["--preset", "exact"],
     ["--also", "all"], ["--memory", "none"], ["--csv", "x.csv"], ["--samples", "4"], ["--root", "d"], ["--all-rows"]],
    ids=" ".join,
)  # fmt: skip
def test_what_a_measurement_does_not_read_is_refused(words: list[str]) -> None:
    with pytest.raises(ValueError, match=f"{' '.join(words)}: --measure runs the model on random input"):
        command("spikingformer_cml_2_256", "--measure", *words)


@pytest.mark.parametrize(
    "words", [["--samples", "4"], ["--root", "d"], ["--batch-size", "2"], ["--device", "cuda"]], ids=" ".join
)
def test_what_counting_without_data_does_not_read_is_refused(words: list[str]) -> None:
    with pytest.raises(ValueError, match=f"{' '.join(words)}: nothing is run without --data"):
        command("spikingformer_cml_2_256", *words)


def test_a_checkpoint_fixes_its_sizes(checkpoint: Path) -> None:
    for words in (["--measure"], ["--data"], []):
        with pytest.raises(ValueError, match="--time-steps: a checkpoint fixes these"):
            command(str(checkpoint), *words, "--time-steps", "8")


def test_a_csv_file_that_cannot_be_written_is_refused_before_counting(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "_facts", lambda args: pytest.fail("counted first"))
    with pytest.raises(ValueError, match="the folder .*absent does not exist: create it, or write elsewhere"):
        command(str(checkpoint), "--data", "--csv", str(tmp_path / "absent" / "x.csv"))
    with pytest.raises(ValueError, match="--csv: .* is a folder: name a file in it"):
        command(str(checkpoint), "--data", "--csv", str(tmp_path))


def test_the_names_offered_are_the_presets_there_are() -> None:
    from spikingformer.energy import MEMORY_MODELS, PRESETS

    assert tuple(PRESETS) == energy.PRESET_NAMES
    assert tuple(MEMORY_MODELS) == energy.MEMORY_NAMES
