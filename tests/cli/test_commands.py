"""The command as people type it: what it prints, its status, and one clear screen for each bad input."""

import io
import json
import re
import subprocess
import sys

import pytest
import timm
import torch
from PIL import Image

from spikingformer.cli import COMMANDS, main
from spikingformer.training.checkpoint import load_model
from spikingformer.training.recipe import save_recipe
from spikingformer.training.tensor_file import read_tensors, write_tensors
from tests.training.helpers import TINY, tiny_recipe

OVERRIDES = ["epochs=1", "device=cpu"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    save_recipe(tiny_recipe(), folder / "tiny.yaml")
    assert main(["train", str(folder / "tiny.yaml"), *OVERRIDES, "--output", str(folder / "run")]) == 0
    return folder


def refused(capsys, *arguments: object) -> str:
    """Runs a command that must be refused; its message, which has to fit one screen."""
    status = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    assert status == 2
    assert "Traceback" not in captured.err
    lines = captured.err.strip().splitlines()
    message = captured.err[captured.err.index(f"spikingformer {arguments[0]}: ") :]
    assert len(lines) <= 24
    return message


def test_train_writes_the_runs_files(run_folder):
    names = {p.name for p in (run_folder / "run").iterdir()}
    assert {
        "best.safetensors",
        "last.safetensors",
        "state.safetensors",
        "recipe.yaml",
        "metrics.jsonl",
        "run.json",
    } <= names


def test_train_prints_json_and_runs_again_from_its_folder(run_folder, capsys, tmp_path):
    status = main(["train", str(run_folder / "run"), "--output", str(tmp_path / "again"), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert status == 0
    assert result["best_epoch"] == 0
    first = json.loads((run_folder / "run" / "result.json").read_text())
    assert result["last_top1"] == first["last_top1"]


def test_evaluate_shows_progress_on_a_terminal_only(run_folder, capsys, monkeypatch):
    from rich.console import Console

    command = ["evaluate", str(run_folder / "run/best.safetensors"), "--device", "cpu", "--batch-size", "100"]
    assert main([*command, "--json"]) == 0
    assert capsys.readouterr().err == ""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr("spikingformer.training.reporting.make_console", lambda: console)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main([*command, "--anytime"]) == 0
    assert re.search(r"digits.*8/8.*batches", screen.getvalue()), "359 samples by 100, twice"
    assert "batches" not in capsys.readouterr().out


def test_evaluate_agrees_with_training(run_folder, capsys):
    assert main(["evaluate", str(run_folder / "run/best.safetensors"), "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["top1"] == json.loads((run_folder / "run/result.json").read_text())["best_top1"]
    assert found["samples"] == sum(row["samples"] for row in found["per_class"]) == 359
    assert len(found["top1_after_step"]) == 2
    assert found["top1_after_step"][-1] == found["top1"]
    assert main(["evaluate", str(run_folder / "run/best.safetensors"), "--img-size", "16", "--device", "cpu"]) == 0
    assert "16x16" in capsys.readouterr().out


def test_predict_files_folders_and_samples(run_folder, capsys, tmp_path):
    for name in ("a.png", "b.jpg"):
        Image.new("L", (30, 20), 128).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    checkpoint = str(run_folder / "run/best.safetensors")
    assert (
        main(["predict", checkpoint, "--samples", "2", "--top", "3", str(tmp_path), "--json", "--device", "cpu"]) == 0
    )
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["file"].rsplit("/")[-1] for row in rows[:2]] == ["a.png", "b.jpg"]
    assert len(rows) == 4
    assert all(len(row["classes"]) == 3 for row in rows)
    assert {"label"} <= rows[2].keys()


def test_a_runs_folder_stands_for_its_best_model(run_folder, capsys):
    answers = []
    for checkpoint in (run_folder / "run", run_folder / "run/best.safetensors"):
        assert main(["predict", str(checkpoint), "--samples", "2", "--json", "--device", "cpu"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert main(["evaluate", str(run_folder / "run"), "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["top1"] == json.loads((run_folder / "run/result.json").read_text())["best_top1"]
    assert main(["export", str(run_folder / "run"), "--to", "weights", "--json"]) == 0
    written = run_folder / "run/best-folded.safetensors"
    assert json.loads(capsys.readouterr().out)["path"] == str(written)
    written.unlink()


def published_weights(classes: int, **options: int) -> dict[str, torch.Tensor]:
    """A small Spikingformer's weights under published names, as DataParallel and torch.compile leave them."""
    model = timm.create_model("spikingformer_4_384", embed_dim=32, depth=1, num_heads=8, num_classes=classes,
                              **options)  # fmt: skip
    renamed = (
        ("stem.last.", "patch_embed.proj4_"), ("stem.stages.0.", "patch_embed.proj_"),
        (r"stem.stages.(\d).", r"patch_embed.proj\1_"), ("blocks.0.mlp.fc", "block.0.mlp.mlp"),
        ("blocks.0.attn.(q|k|v|proj).", r"block.0.attn.\1_"), (r"mlp(\d)\.", r"mlp\1_"),
    )  # fmt: skip
    weights = {}
    for name, value in model.state_dict().items():
        for ours, theirs in renamed:
            name = re.sub(ours, theirs, name)
        weights[f"module._orig_mod.{name}"] = value
    return weights | {"module._orig_mod.norm.weight": torch.ones(32)}


def test_convert_takes_the_size_from_the_weights(capsys, tmp_path):
    source, output = tmp_path / "published.pth.tar", tmp_path / "x.safetensors"
    torch.save({"state_dict_ema": published_weights(100), "epoch": 3}, source)
    command = ["convert", str(source), "--model", "spikingformer_4_384", "--output", str(output)]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "100 classes, 8 attention heads" in text, "the published CIFAR-100 models have 8, no weight tells"
    assert "embed_dim 32 (not 384), depth 1 (not 4)" in text
    assert "dropped, because the published models never use them: norm.weight" in text
    model, info = load_model(output)
    assert (model.config.embed_dim, model.config.num_heads, info.mean[0]) == (32, 8, 0.5071)
    assert main([*command, "--num-heads", "4", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["kwargs"]["num_heads"] == 4
    assert written["dropped"] == ["norm.weight"]


def test_convert_refuses_what_is_not_published(capsys, tmp_path):
    source, output = tmp_path / "published.pth.tar", tmp_path / "x.safetensors"
    torch.save({"state_dict": {"head.weight": torch.zeros(10, 16)}, "epoch": 3}, source)
    message = refused(capsys, "convert", source, "--model", "spikingformer_cml_4_256", "--output", output)
    assert f"{source}: no stem.stages.0.conv.weight in it: not a published checkpoint" in message
    assert not output.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mean", "0.5", "0.4"], "mean has 2 values, and the model has 3 input channels: give one for each"),
        (["--std", "0.5"], "std has 1 value, and the model has 3 input channels: give one for each"),
        (["--std", "0.2", "0", "0.2"], "std must be above 0, got (0.2, 0.0, 0.2)"),
        (["--std", "0.2", "-0.1", "0.2"], "std must be above 0, got (0.2, -0.1, 0.2)"),
        (["--std", "0.2", "nan", "0.2"], "std must be finite numbers, got (0.2, nan, 0.2)"),
        (["--mean", "0.2", "inf", "0.2"], "mean must be finite numbers, got (0.2, inf, 0.2)"),
    ],
    ids=lambda w: " ".join(w) if isinstance(w, list) else "",
)
def test_convert_refuses_statistics_that_cannot_be_used(capsys, tmp_path, words, message):
    source, output = tmp_path / "published.pth.tar", tmp_path / "x.safetensors"
    torch.save(published_weights(10), source)
    command = ["convert", source, "--model", "spikingformer_4_384", "--num-heads", "8", "--output", output, *words]
    assert message in refused(capsys, *command)
    assert not output.exists()


def test_a_file_with_statistics_that_cannot_be_used_is_refused(run_folder, capsys, tmp_path):
    weights, metadata = read_tensors(run_folder / "run/best.safetensors")
    metadata["spikingformer"] = json.dumps({**json.loads(metadata["spikingformer"]), "std": [0.0]})
    path = tmp_path / "x.safetensors"
    write_tensors(path, weights, metadata)
    assert f"{path}: std must be above 0, got (0.0,)" in refused(capsys, "predict", path, "--samples", 1)


def test_convert_of_event_weights_needs_no_statistics(tmp_path):
    source, output = tmp_path / "published.pth", tmp_path / "x.safetensors"
    torch.save(published_weights(10, in_chans=2), source)
    words = ["--model", "spikingformer_4_384", "--num-heads", "8", "--output", str(output)]
    assert main(["convert", str(source), *words]) == 0
    info = load_model(output)[1]
    assert (info.kind, info.mean, info.std) == ("events", (0.0, 0.0), (1.0, 1.0))


def test_unknown_recipe_key(capsys):
    message = refused(capsys, "train", "recipes/digits/spikingformer_cml.yaml", "lerning_rate=1")
    assert "unknown key 'lerning_rate'; did you mean 'optimizer.learning_rate'?" in message


def test_unknown_recipe(capsys):
    assert "did you mean recipes/digits/spikingformer_cml.yaml?" in refused(
        capsys, "train", "digits/spikingformer_cm.yaml"
    )


def test_missing_data_folder(run_folder, capsys, tmp_path):
    message = refused(
        capsys, "train", run_folder / "tiny.yaml", "data.name=cifar10", "data.channels=3",
        f"data.root={tmp_path}/no", "--output", tmp_path / "run",
    )  # fmt: skip
    assert f"no folder {tmp_path}/no/cifar-10-batches-py" in message
    assert "Run `spikingformer data cifar10" in message
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_unknown_data_set(run_folder, capsys, tmp_path):
    message = refused(capsys, "train", run_folder / "tiny.yaml", "data.name=cifar11", "--output", tmp_path / "run")
    assert "data.name: got 'cifar11'; did you mean 'cifar10'?" in message


def test_wrong_channels(run_folder, capsys, tmp_path):
    message = refused(capsys, "train", run_folder / "tiny.yaml", "data.channels=3", "--output", tmp_path / "run")
    assert "set data.channels=1" in message


def test_corrupt_picture_in_training(run_folder, capsys, tmp_path):
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(2):
                Image.new("L", (9, 9), 20 * i).save(tmp_path / part / name / f"{i}.png")
    (tmp_path / "train/dog/0.png").write_bytes(b"broken")
    arguments = [
        "train", run_folder / "tiny.yaml", "data.name=folder", f"data.root={tmp_path}", "augment.engine=per_sample",
        "batch_size=2", "drop_last=false", *OVERRIDES,
    ]  # fmt: skip
    message = refused(capsys, *arguments, "--output", tmp_path / "run")
    assert "train/dog/0.png: not a readable picture" in message
    assert "data.unreadable=skip" in message
    assert main([str(a) for a in [*arguments, "data.unreadable=skip", "--output", tmp_path / "run2"]]) == 0
    assert "unreadable 1" in capsys.readouterr().err


def test_wrong_number_of_classes(run_folder, capsys, tmp_path):
    for part in ("train", "val"):
        for name in ("cat", "dog", "eel"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("L", (9, 9)).save(tmp_path / part / name / "0.png")
    message = refused(
        capsys,
        "evaluate",
        run_folder / "run/best.safetensors",
        "--data",
        "folder",
        "--root",
        tmp_path,
        "--device",
        "cpu",
    )
    assert "3 classes that the model lacks, first 'cat', 'dog', 'eel' (the model has 10)" in message


def test_checkpoint_of_another_model(run_folder, capsys, tmp_path):
    message = refused(
        capsys, "train", run_folder / "tiny.yaml", "model.depth=2",
        f"model.initial_checkpoint={run_folder}/run/best.safetensors", "--output", tmp_path / "run",
    )  # fmt: skip
    assert "best.safetensors: weights of another model" in message
    assert "missing, first blocks.1" in message


def test_truncated_checkpoint(run_folder, capsys, tmp_path):
    content = (run_folder / "run/best.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:5000])
    for command in ("evaluate", "predict"):
        message = refused(
            capsys, command, tmp_path / "cut.safetensors", *(["--samples", 1] if command == "predict" else [])
        )
        assert "cut.safetensors: not a complete safetensors file" in message
        assert "truncated" in message


@pytest.mark.parametrize("command", ["evaluate", "predict", "export"])
def test_checkpoint_whose_name_is_nearly_right(capsys, command):
    options = {"predict": ["--samples", 1], "export": ["--to", "onnx"]}.get(command, [])
    found = refused(capsys, command, "spikingformer_cml_4_384.digts", *options)
    assert "no such checkpoint file; did you mean spikingformer_cml_4_384.digits?" in found
    found = refused(capsys, command, "spikingformer_cml_4_384", *options)
    assert "did you mean spikingformer_cml_4_384.cifar10 or " in found


@pytest.mark.parametrize("command", ["evaluate", "predict", "energy", "bench", "report", "export"])
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing.safetensors", "no such checkpoint file"),
        (".", "no best.safetensors or last.safetensors in this folder"),
    ],
)
def test_checkpoint_that_is_no_file(capsys, tmp_path, command, what, message):
    options = {"predict": ["--samples", 1], "export": ["--to", "onnx"]}.get(command, [])
    found = refused(capsys, command, tmp_path / what, *options)
    assert f"{tmp_path / what}: {message}" in found


def test_predict_bad_files(run_folder, capsys, tmp_path):
    checkpoint = run_folder / "run/best.safetensors"
    assert "no such file or folder" in refused(capsys, "predict", checkpoint, tmp_path / "none.png")
    assert "no file in it ends in .jpg" in refused(capsys, "predict", checkpoint, tmp_path)
    assert "nothing to predict" in refused(capsys, "predict", checkpoint)
    Image.new("L", (9, 9)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"broken")
    status = main(["predict", str(checkpoint), str(tmp_path), "--device", "cpu"])
    captured = capsys.readouterr()
    assert status == 2
    assert "bad.png: not readable" in captured.out
    assert "good.png: " in captured.out
    assert "1 of 2 files could not be read" in captured.err


def test_more_than_the_memory_is_said_without_a_traceback(run_folder, capsys):
    message = refused(capsys, "bench", run_folder / "run", "--device", "cpu", "--batch-size", 10**12)
    assert "not enough memory: use a smaller batch" in message


def test_other_runtime_errors_keep_their_traceback(monkeypatch):
    import spikingformer.cli.models

    def broken(args):
        raise RuntimeError("a mistake in the program")

    monkeypatch.setattr(spikingformer.cli.models, "run", broken)
    with pytest.raises(RuntimeError, match="a mistake"):
        main(["models"])


def test_folder_that_cannot_be_written(run_folder, capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    message = refused(capsys, "train", run_folder / "tiny.yaml", "--output", tmp_path / "file" / "run")
    assert "cannot write there" in message


@pytest.mark.parametrize(
    "words",
    [
        ["bench", "--batch", "1"],
        ["report"],
        ["evaluate"],
        ["predict", "--samples", "1"],
        ["energy", "--data", "--samples", "1"],
        ["energy", "--measure"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda", "got cuda, but PyTorch finds no CUDA device"), ("cuda:1", "got cuda:1, but PyTorch finds no CUDA"),
     ("gpu", "got 'gpu', expected auto, cpu, cuda or cuda:N"), ("cpu:3", "got 'cpu:3', expected auto")],
)  # fmt: skip
def test_a_device_that_is_not_there(run_folder, capsys, monkeypatch, words, device, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command, *options = words
    assert message in refused(capsys, command, run_folder / "run", *options, "--device", device)


def test_bench_of_random_weights_has_neurons_that_fire(capsys):
    assert main(["bench", "spikingformer_4_256", "--batch", "1", "--repeats", "1", "--device", "cpu", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["weights"] == "random, calibrated"
    assert document["results"][0]["firing_rate"] > 0.05


@pytest.mark.parametrize("threads", [0, -1])
def test_bench_on_no_threads(run_folder, capsys, threads):
    message = refused(capsys, "bench", run_folder / "run", "--threads", threads)
    assert f"--threads must be at least 1, got {threads}" in message


def test_help_names_every_command(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("train", "evaluate", "predict", "data", "models", "doctor", "convert"))


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_of_a_command(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert f"spikingformer {command}" in capsys.readouterr().out


def test_lists(capsys):
    assert main(["train", "--list"]) == 0
    assert "recipes/imagenet/spikingformer_cml_8_768.yaml" in capsys.readouterr().out
    assert main(["train", "--fields"]) == 0
    text = capsys.readouterr().out
    assert "optimizer.learning_rate  (float, default 0.0005)" in text
    assert set(TINY) - {"model", "data", "augment", "log"} <= set(text.replace("  (", "\n").splitlines())
    assert main(["train", "--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert "recipes/imagenet/spikingformer_cml_8_768.yaml" in listed
    assert listed["recipes/cifar10/spikingformer_cml_4_384_ours.yaml"].endswith("published run's 410 epochs")
    assert main(["train", "--fields", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["optimizer.learning_rate"]["default"] == 0.0005


def test_module_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "spikingformer", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("spikingformer ")
