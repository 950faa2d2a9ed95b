"""The examples on docs/deploy/*.md run as they stand, in order, in an empty folder with a checkpoint."""

import io
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spikingformer.cli import main
from spikingformer.cli.export import FORMATS
from spikingformer.data.events import make_events, write_aedat31
from spikingformer.export import describe
from spikingformer.native import status
from spikingformer.training.checkpoint import ModelInfo, save_model

from .conftest import SMALL, small_model

PAGES = sorted((Path(__file__).parents[2] / "docs" / "deploy").glob("*.md"))
BLOCK = re.compile(r"^```(.*?)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def save(path, name, **arguments):
    model = small_model(name, **arguments)
    pre = describe(model).preprocessing
    kind = "events" if model.config.takes_events else "pictures"
    kwargs = {**SMALL, "in_chans": model.config.in_chans, **arguments}
    info = ModelInfo(name, kwargs, ("ant", "bee", "cat", "dog", "elk"), pre.mean, pre.std, kind=kind)
    path.parent.mkdir(parents=True)
    save_model(path, model.state_dict(), info)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What the pages take for granted: two runs, a picture and a recording."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "runs/a/best.safetensors", "spikingformer_cml_4_384", img_size=16, time_steps=2)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(tmp_path / "picture.png")
    return tmp_path


def write_digits_run(folder):
    arguments = {**SMALL, "num_classes": 10, "img_size": 16, "in_chans": 1}
    info = ModelInfo(
        "spikingformer_cml_4_384",
        arguments,
        tuple(map(str, range(10))),
        (0.3,),
        (0.4,),
        recipe={"data": {"name": "digits", "image_size": 16, "channels": 1}},
    )
    (folder / "runs/digits").mkdir()
    model = small_model("spikingformer_cml_4_384", **arguments)
    save_model(folder / "runs/digits/best.safetensors", model.state_dict(), info)


def write_event_files(folder):
    save(folder / "runs/gesture/best.safetensors", "spikingformer_cml_2_256", img_size=128, time_steps=4)
    rng = np.random.default_rng(0)
    t = np.sort(rng.integers(0, 1_200_000, 4000))
    events = make_events(rng.integers(0, 128, 4000), rng.integers(0, 128, 4000), t, rng.integers(0, 2, 4000))
    write_aedat31(folder / "recording.aedat", events)


def test_every_format_and_path_has_a_page():
    assert {p.stem for p in PAGES} >= {"anytime", "hub", "int8", "nir", "onnx", "streaming", "torch"}
    commands = " ".join(text for p in PAGES for kind, text in BLOCK.findall(p.read_text("utf-8")) if kind == "bash")
    missing = [name for name in FORMATS if f"--to {name}" not in commands]
    assert not missing, "export has formats that no page shows"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_examples_run(folder, page, capsys, monkeypatch):
    if page.stem == "int8" and not status().available:
        pytest.skip(f"no compiled kernels: {status().reason}")
    if page.stem in ("streaming", "int8"):
        write_event_files(folder)
    if page.stem == "anytime":
        write_digits_run(folder)
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    assert {kind for kind, _ in blocks} == {"python", "bash"}, "a block of another kind would not be run"
    names: dict[str, object] = {}
    for kind, text in blocks:
        if kind == "python":
            exec(compile(text, str(page), "exec"), names)  # our own page
            continue
        for line in text.splitlines():
            piped, _, command = line.rpartition(" | ")
            program, *words = shlex.split(command)
            assert program == "spikingformer", line
            if piped:
                cat, source = shlex.split(piped)
                assert cat == "cat", line
                pipe = type("Pipe", (), {"buffer": io.BytesIO(Path(source).read_bytes())})()
                monkeypatch.setattr(sys, "stdin", pipe)
            assert main(words) == 0, capsys.readouterr().err
