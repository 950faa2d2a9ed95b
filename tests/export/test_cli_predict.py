"""`spikingformer predict` on exported files, and on streams."""

import io
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from spikingformer.cli import main
from spikingformer.cli.prediction import predict_files
from spikingformer.data.events import make_events, write_aedat31, write_nmnist
from spikingformer.export import describe, export_int8, export_onnx, export_torch, export_weights
from spikingformer.native import status
from spikingformer.training.checkpoint import ModelInfo, save_model

from .conftest import SMALL, small_model

NAMES = ("ant", "bee", "cat", "dog", "elk")


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def predicted(capsys, *words):
    assert main(["predict", *map(str, words), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_format_predicts_what_the_checkpoint_predicts(tmp_path, picture, capsys):
    model = small_model("spikingformer_cml_4_384", time_steps=2, img_size=16)
    metadata = describe(model, NAMES)
    pre = metadata.preprocessing
    arguments = {**SMALL, "img_size": 16, "in_chans": 3, "time_steps": 2}
    info = ModelInfo("spikingformer_cml_4_384", arguments, NAMES, pre.mean, pre.std)
    save_model(tmp_path / "best.safetensors", model.state_dict(), info)
    (expected,) = predicted(capsys, tmp_path / "best.safetensors", picture)
    for export, name in (
        (export_onnx, "m.onnx"),
        (export_torch, "m.pt2"),
        (export_weights, "m.safetensors"),
    ):
        export(model, tmp_path / name, metadata=metadata, check=False)
        (row,) = predicted(capsys, tmp_path / name, picture)
        for got, wanted in zip(row["classes"], expected["classes"], strict=True):
            assert got["name"] == wanted["name"], name
            # folded float32 weights round once more; with this picture no spike sits that near its threshold
            assert got["probability"] == pytest.approx(wanted["probability"], abs=1e-4)
    if status().available:
        export_int8(model, tmp_path / "8.safetensors", metadata=metadata, check=False)
        (row,) = predicted(capsys, tmp_path / "8.safetensors", picture)
        assert len(row["classes"]) == 5


def test_a_model_that_is_not_square_is_given_its_rows_and_columns(picture):
    half = (0.5,) * 3
    info = ModelInfo("spikingformer_cml_4_384", {**SMALL, "img_size": [16, 32], "in_chans": 3}, NAMES, half, half)
    model = _Seen()
    assert len(list(predict_files(model, info, [str(picture)], 1, 1))) == 1
    assert model.batch.shape == (1, 3, 16, 32)


class _Seen(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.empty = torch.nn.Parameter(torch.empty(0))  # tells the device

    def forward(self, x):
        self.batch = x
        return torch.zeros(len(x), 5)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_photo_is_turned_as_its_camera_held_it(tmp_path, picture, suffix):
    upright = Image.open(picture)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be seen, turn it a quarter clockwise
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    options = {"lossless": True} if suffix == "webp" else {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    stored.save(tmp_path / f"turned.{suffix}", exif=exif, **options)
    half = (0.5,) * 3
    info = ModelInfo("spikingformer_cml_4_384", {**SMALL, "img_size": [16, 32], "in_chans": 3}, NAMES, half, half)
    model = _Seen()
    list(predict_files(model, info, [str(picture), str(tmp_path / f"turned.{suffix}")], 1, 2))
    tolerance = 0.05 if suffix == "jpg" else 0  # of values from -1 to 1: it loses some
    torch.testing.assert_close(model.batch[1], model.batch[0], atol=tolerance, rtol=0)


@pytest.mark.parametrize("damage", [b"Exif\0\0garbage!", b"Exif\0\0", b"MM\0*\0\0\0\x08\0\x05", b""])
def test_a_photo_with_damaged_exif_is_taken_as_it_is_stored(tmp_path, picture, damage):
    Image.open(picture).save(tmp_path / "damaged.png", exif=damage)
    half = (0.5,) * 3
    info = ModelInfo("spikingformer_cml_4_384", {**SMALL, "img_size": 16, "in_chans": 3}, NAMES, half, half)
    model = _Seen()
    rows = list(predict_files(model, info, [str(picture), str(tmp_path / "damaged.png")], 1, 2))
    assert all("classes" in row for row in rows)
    torch.testing.assert_close(model.batch[1], model.batch[0])


@pytest.fixture
def event_model(tmp_path):
    model = small_model("spikformer_2_256", img_size=32, time_steps=3)
    return export_weights(model, tmp_path / "m.safetensors", metadata=describe(model, NAMES), check=False).path


@pytest.fixture
def recording(tmp_path):
    rng = np.random.default_rng(0)
    t = np.sort(rng.integers(0, 1_000_000, 3000))
    events = make_events(rng.integers(0, 32, 3000), rng.integers(0, 32, 3000), t, rng.integers(0, 2, 3000))
    write_aedat31(tmp_path / "r.aedat", events)
    return tmp_path / "r.aedat"


def test_a_runs_folder_streams_its_best_model(event_model, recording, capsys):
    words = ["--stream", recording, "--window", 0.3, "--sensor", 32, 32]
    rows = predicted(capsys, event_model, *words)
    event_model.rename(event_model.parent / "best.safetensors")
    found = predicted(capsys, event_model.parent, *words)
    assert [r["probabilities"] for r in found] == [r["probabilities"] for r in rows]


@pytest.mark.parametrize("source", ["file", "pipe"])
def test_stream_prints_a_row_a_window(event_model, recording, capsys, monkeypatch, source):
    if source == "pipe":
        monkeypatch.setattr(sys, "stdin", type("Pipe", (), {"buffer": io.BytesIO(recording.read_bytes())})())
    stream = "-" if source == "pipe" else recording
    rows = predicted(capsys, event_model, "--stream", stream, "--window", 0.3, "--sensor", 32, 32)
    assert [r["index"] for r in rows] == [0, 1, 2]
    assert all(r["class"] in NAMES and r["latency_s"] > 0 and r["real_time_factor"] > 0 for r in rows)


@pytest.mark.parametrize("as_json", [True, False], ids=["json", "text"])
def test_a_window_without_events_is_not_labelled(event_model, tmp_path, capsys, as_json):
    t = np.concatenate([np.arange(0, 300_000, 1000), np.arange(600_000, 900_001, 1000)])  # silent from 0.3 s to 0.6 s
    write_aedat31(tmp_path / "gap.aedat", make_events(t % 32, t % 31, t, t % 2))
    words = [event_model, "--stream", tmp_path / "gap.aedat", "--window", 0.3, "--sensor", 32, 32]
    if as_json:
        rows = predicted(capsys, *words)
        assert [(r["class"] is None, r["label"] is None, r["events"] == 0) for r in rows] == [
            (silent, silent, silent) for silent in (False, True, False)
        ]
        assert rows[1]["probabilities"] == []
        return
    assert main(["predict", *map(str, words)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["no events" in line for line in lines[:3]] == [False, True, False]
    assert "%" not in lines[1]


@pytest.mark.parametrize(
    ("split", "window_us", "hinted"),
    [("windows", 1_000_000, True), ("windows", 300_000, False), ("published", 1_000_000, False)],
    ids=["long", "about-a-window", "whole-trials"],
)
def test_a_whole_recording_for_a_model_of_windows_gets_a_hint(tmp_path, capsys, split, window_us, hinted):
    model = small_model("spikformer_2_256", img_size=32, time_steps=3)
    arguments = {**SMALL, "img_size": 32, "in_chans": 2, "time_steps": 3}
    recipe = {"data": {"name": "gesture", "split": split, "split_by": "number"}}
    info = ModelInfo("spikformer_2_256", arguments, NAMES, (0.0, 0.0), (1.0, 1.0), kind="events", recipe=recipe)
    save_model(tmp_path / "best.safetensors", model.state_dict(), info)
    t = np.arange(0, window_us, 1000)
    write_aedat31(tmp_path / "r.aedat", make_events(t % 32, t % 31, t, t % 2))
    assert main(["predict", str(tmp_path / "best.safetensors"), str(tmp_path / "r.aedat")]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{tmp_path}/r.aedat: ")
    assert (f"--stream {tmp_path}/r.aedat --window 0.2" in captured.err) is hinted
    write_nmnist(tmp_path / "r.bs2", make_events(t % 32, t % 31, t, t % 2))  # which --stream does not read
    assert main(["predict", str(tmp_path / "best.safetensors"), str(tmp_path / "r.bs2")]) == 0
    said = capsys.readouterr().err
    assert ("were taken as one input" in said) is hinted
    assert f"--stream {tmp_path}" not in said


def test_events_that_come_late_are_said_to_be_dropped(event_model, tmp_path, capsys):
    t = np.arange(0, 900_001, 1000)
    write_aedat31(tmp_path / "first.aedat", make_events(t % 32, t % 31, t, t % 2))
    t = np.concatenate([np.arange(7), np.arange(900_001, 1_800_001, 1000)])  # a sensor whose clock jumped back
    write_aedat31(tmp_path / "second.aedat", make_events(t % 32, t % 31, t, t % 2))
    _, _, packets = (tmp_path / "second.aedat").read_bytes().partition(b"#!END-HEADER\r\n")
    both = tmp_path / "both.aedat"
    both.write_bytes((tmp_path / "first.aedat").read_bytes() + packets)
    words = [event_model, "--stream", both, "--window", 0.3, "--sensor", 32, 32]
    assert [r["late_events"] for r in predicted(capsys, *words)] == [0, 0, 0, 7, 0]
    assert main(["predict", *map(str, words)]) == 0
    assert (
        capsys.readouterr()
        .out.splitlines()[-1]
        .endswith("; 7 events came late and were dropped; 300 events are in no complete window and were not classified")
    )


def test_a_picture_alone_is_given_to_weights_that_ship(picture, capsys):
    assert main(["predict", str(picture), "--top", "1", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["classes"][0]["name"] in ("airplane", "automobile", "bird", "cat", "deer", "dog",
                                                              "frog", "horse", "ship", "truck")  # fmt: skip
    assert "no model given: using spikingformer_cml_4_384.cifar10_minutes" in captured.err
    assert main(["predict", str(picture.parent), "--top", "1", "--json"]) == 0
    assert "no model given" in capsys.readouterr().err


def test_a_recording_can_be_looped(event_model, recording, capsys):
    words = ["predict", str(event_model), "--stream", str(recording), "--window", "0.3", "--sensor", "32", "32"]
    assert main([*words, "--loop", "4"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 14
    assert out[-1].startswith("13 windows, 3.9 s of events in ")


@pytest.mark.parametrize(
    ("words", "message"), [([], "has no events, or is shorter"), (["--loop", "9"], "no events to loop")]
)
def test_a_recording_without_events_is_said_to_be_one(event_model, tmp_path, capsys, words, message):
    write_aedat31(tmp_path / "none.aedat", make_events([], [], [], []))
    assert main(["predict", str(event_model), "--stream", str(tmp_path / "none.aedat"), *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(not status().available, reason=f"no compiled kernels: {status().reason}")
def test_an_int8_file_streams_window_by_window(tmp_path, event_model, recording, capsys):
    model = small_model("spikformer_2_256", img_size=32, time_steps=3)
    export_int8(model, tmp_path / "8.safetensors", metadata=describe(model, NAMES), check=False)
    words = ["--stream", recording, "--window", 0.3, "--sensor", 32, 32]
    rows = predicted(capsys, tmp_path / "8.safetensors", *words)
    floats = predicted(capsys, event_model, *words)
    assert [(r["start_us"], r["events"]) for r in rows] == [(r["start_us"], r["events"]) for r in floats]
    assert all(r["class"] in NAMES and 0 < r["latency_s"] <= r["compute_s"] for r in rows)
    assert main(["predict", str(tmp_path / "8.safetensors"), *map(str, words), "--keep-state"]) == 2
    assert "no state can be kept: give one that steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--window", "20"], "shorter than one window of 20 s"),
        (["--sensor", "16", "16"], "larger than the sensor's (16, 16)"),
        (["--window", "0.000001"], "less than a microsecond for each of its 3 frames"),
        (["--loop", "nan"], "more than 0 seconds, got nan"),
        (["--samples", "2"], "but --samples was given too"),
        (["--device", "cuda:0"], "--device cuda:0: windows of --stream run on the CPU here"),
        (["--top", "3"], "--top 3: --stream shows the most likely class of each window"),
        (["--batch-size", "4"], "--batch-size 4: --stream takes one window at a time"),
        (["--window", "0.3", "--device", "cpu"], ""),
    ],
    ids=["window", "sensor", "microseconds", "loop", "samples", "device", "top", "batch size", "fine"],
)
def test_wrong_streams_exit_with_a_message(event_model, recording, capsys, words, message):
    words = words if "--sensor" in words else [*words, "--sensor", "32", "32"]
    code = main(["predict", str(event_model), "--stream", str(recording), *words])
    assert code == (2 if message else 0)
    assert message in capsys.readouterr().err


def test_unreadable_pictures_are_named_in_plain_words(tmp_path, picture, capsys):
    (tmp_path / "text.png").write_text("hello")
    assert main(["predict", "spikingformer_cml_4_384.cifar10", str(picture), str(tmp_path / "text.png")]) == 2
    captured = capsys.readouterr()
    assert "text.png: not readable (not a picture of a known format)" in captured.out
    assert "1 of 2 files could not be read" in captured.err


def test_only_our_modules_say_the_class_after_each_step(tmp_path, recording, capsys):
    if not status().available:
        pytest.skip(f"no compiled kernels: {status().reason}")
    model = small_model("spikformer_2_256", img_size=32, time_steps=3)
    rng = np.random.default_rng(0)
    few = make_events(rng.integers(0, 32, 50), rng.integers(0, 32, 50), np.arange(50), rng.integers(0, 2, 50))
    write_aedat31(tmp_path / "r.aedat", few)
    export_int8(model, tmp_path / "8.safetensors", metadata=describe(model, NAMES), check=False)
    export_weights(model, tmp_path / "m.safetensors", metadata=describe(model, NAMES), check=False)
    (whole,) = predicted(capsys, tmp_path / "8.safetensors", tmp_path / "r.aedat")
    (stepped,) = predicted(capsys, tmp_path / "m.safetensors", tmp_path / "r.aedat")
    assert "after_step" not in whole
    assert len(stepped["after_step"]) == 3


@pytest.mark.parametrize(
    "words", [["--window", "0.2"], ["--sensor", "32", "32"], ["--keep-state"], ["--loop", "9"]], ids=lambda w: w[0]
)
def test_an_option_of_streams_without_one_is_refused(event_model, recording, capsys, words):
    assert main(["predict", str(event_model), str(recording), *words]) == 2
    assert f"{' '.join(words)}: only with --stream RECORDING" in capsys.readouterr().err


def test_a_number_of_samples_below_none_is_refused(event_model, capsys):
    assert main(["predict", str(event_model), "--samples", "-1"]) == 2
    assert "--samples must be at least 0, got -1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples", "2"], "does not say what data it was trained on"),
        (["X.png", "--device", "cuda:1"], "--device cuda:1: "),
    ],
    ids=["samples", "device"],
)
def test_what_an_exported_file_cannot_do_is_said(event_model, capsys, words, message):
    assert main(["predict", str(event_model), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_recording_without_a_model_is_said_to_be_one(recording, capsys):
    assert main(["predict", str(recording)]) == 2
    assert f"give an event model before it, `spikingformer predict MODEL {recording}`" in capsys.readouterr().err


def test_a_file_of_torch_with_the_name_of_a_recording_is_said_to_be_no_checkpoint(tmp_path, picture, capsys):
    torch.save({"head.weight": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    assert main(["predict", str(tmp_path / "pytorch_model.bin"), str(picture)]) == 2
    assert "`spikingformer convert` makes one" in capsys.readouterr().err


def test_files_of_the_other_kind_are_refused_before_any_is_classified(event_model, recording, picture, capsys):
    for model, files, made_for in (
        (event_model, [recording, picture], "recordings of event cameras"),
        ("spikingformer_cml_4_384.cifar10", [picture, recording], "pictures"),
    ):
        assert main(["predict", str(model), *map(str, files)]) == 2
        captured = capsys.readouterr()
        assert f"{files[1]}: {model} was trained on {made_for}" in captured.err
        assert not captured.out


def test_without_a_readable_file_nothing_is_said_to_be_classified(event_model, tmp_path, capsys):
    (tmp_path / "r.aedat").write_text("hello")
    assert main(["predict", str(event_model), str(tmp_path / "r.aedat")]) == 2
    assert capsys.readouterr().err.endswith("1 of 1 files could not be read (named above)\n")


@pytest.mark.parametrize(
    ("name", "message"),
    [("r.bs2", "is an N-MNIST recording, which is short: give it as a file"), ("r.aedat", "r.aedat is empty")],
)
def test_files_that_cannot_be_streamed_are_named(event_model, tmp_path, capsys, name, message):
    (tmp_path / name).touch()
    assert main(["predict", str(event_model), "--stream", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err
