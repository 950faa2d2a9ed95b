"""Every code block of the README runs: Python as it stands, `spikingformer` commands through the command's own main.

`make` and `pip` lines are what CI itself runs.
"""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

from spikingformer.cli import main

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
PYTHON = [body for language, body in BLOCKS if language == "python"]
COMMANDS = [
    line.removeprefix("$ ").split("#")[0].strip()
    for language, body in BLOCKS
    if language == "console"
    for line in body.splitlines()
    if line.startswith("$ ")
]


@pytest.mark.parametrize("code", PYTHON, ids=[f"block{i}" for i in range(len(PYTHON))])
def test_python_blocks(code):
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert torch.isfinite(names["logits"]).all()


def test_a_model_trained_in_python_reaches_the_commands(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "training.md", "exec"), {})
    Image.new("RGB", (40, 30), (9, 99, 200)).save("photo.jpg")
    assert main(["predict", "mine.safetensors", "photo.jpg", "--device", "cpu", "--json"]) == 0
    assert {c["name"] for c in json.loads(capsys.readouterr().out)["classes"]} == {"cat", "dog", "owl"}


def test_commands_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ran = []
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        if program in ("make", "pip"):
            continue
        assert program == "spikingformer", command
        assert main(arguments) == 0, f"{command}\n{capsys.readouterr().err}"
        ran.append(arguments[0])
    assert {"doctor", "models", "train", "evaluate", "energy"} <= set(ran)
    assert (tmp_path / "runs" / "a" / "best.safetensors").is_file()


def test_every_link_leads_somewhere():
    root = Path(__file__).parents[1]
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert targets
    assert [t for t in targets if not (root / t).exists()] == []
