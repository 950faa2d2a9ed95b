"""Model files: whole or refused, loadable by plain timm, no code run."""

import json
import os
import pickle
import re
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import save_file

from spikingformer import files
from spikingformer.official import weights_of
from spikingformer.training.checkpoint import (
    HELD_OUT,
    TEST_PART,
    UNKNOWN_PART,
    ModelInfo,
    create_model,
    describe_model,
    load_model,
    read_model_file,
    save_model,
)
from spikingformer.training.foreign import read_published
from spikingformer.training.tensor_file import read_tensors, write_tensors

NAME = "spikingformer_cml_4_256"
KWARGS = {"img_size": 8, "in_chans": 1, "num_classes": 10, "time_steps": 2, "embed_dim": 16, "depth": 1, "num_heads": 2}
INFO = ModelInfo(NAME, KWARGS, tuple("0123456789"), (0.3,), (0.3,), epoch=3, metrics={"top1": 50.0})


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model(NAME, KWARGS).eval()


@pytest.fixture
def file(tmp_path, model):
    save_model(tmp_path / "best.safetensors", model.state_dict(), INFO)
    return tmp_path / "best.safetensors"


def test_model_comes_back_with_its_description(file, model):
    loaded, info = load_model(file)
    assert info == INFO
    assert info.image_size == (8, 8)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded(x), model(x))


def test_plain_timm_loads_the_file(file, model):
    loaded = timm.create_model(NAME, **KWARGS, checkpoint_path=str(file)).eval()
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded(x), model(x))


def test_another_size(file):
    assert load_model(file, image_size=16)[0](torch.randn(1, 1, 16, 16)).shape == (1, 10)
    with pytest.raises(ValueError, match="multiples of 4; got 9x9"):
        load_model(file, image_size=9)


def test_truncated_anywhere_is_refused(file, tmp_path):
    content = file.read_bytes()
    damaged = tmp_path / "damaged.safetensors"
    for cut in torch.randint(0, len(content), (50,), generator=torch.Generator().manual_seed(0)).tolist():
        damaged.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"damaged.safetensors: not a complete safetensors file .*truncated"):
            load_model(damaged)


def test_flipped_bytes_anywhere_are_refused(file, tmp_path):
    content = bytearray(file.read_bytes())
    damaged = tmp_path / "damaged.safetensors"
    places = torch.randint(0, len(content), (100,), generator=torch.Generator().manual_seed(1)).tolist()
    for place in [*places, *range(0, 400, 7), len(content) - 1]:
        content[place] ^= 0x04
        damaged.write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged.safetensors: "):
            load_model(damaged)
        content[place] ^= 0x04


def test_foreign_safetensors_says_what_is_missing(tmp_path, model):
    path = tmp_path / "x.safetensors"
    save_file(model.state_dict(), path)
    with pytest.raises(ValueError, match="not a model file of ours"):
        load_model(path)


def test_weights_of_another_model_are_named(tmp_path, model):
    path = tmp_path / "x.safetensors"
    save_model(
        path, model.state_dict(), ModelInfo(**{**INFO.__dict__, "kwargs": KWARGS | {"num_classes": 11, "depth": 2}})
    )
    with pytest.raises(
        ValueError,
        match=r"weights of another model .*\n.*missing, first blocks.1(.|\n)*head.bias \(file \(10,\), model \(11,\)\)",
    ):
        load_model(path)


def test_unknown_model_names_the_nearest():
    with pytest.raises(ValueError, match="no model 'spikingformer_cml_4_25'; did you mean 'spikingformer_cml_4_256'"):
        create_model("spikingformer_cml_4_25", {})


def test_a_model_that_is_not_spiking_is_named_as_such():
    with pytest.raises(ValueError, match=r"model resnet18: .*; it is not a spiking model .* `spikingformer models`"):
        create_model("resnet18", KWARGS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_tensors_come_back_as_they_were(tmp_path, dtype):
    tensors = {"a": torch.ones(2, 3).to(dtype), "empty": torch.zeros(0).to(dtype), "scalar": torch.tensor(1).to(dtype)}
    tensors["strided"] = torch.arange(6).reshape(2, 3).to(dtype).T
    write_tensors(tmp_path / "f", tensors, {"x": "ü"})
    back, metadata = read_tensors(tmp_path / "f")
    assert metadata == {"x": "ü"}
    assert all(torch.equal(back[name], value) and back[name].dtype == dtype for name, value in tensors.items())


def test_full_disk_leaves_the_old_file(file, monkeypatch, model):
    before = file.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        save_model(file, model.state_dict(), INFO)
    assert caught.value.filename == str(file)
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


class Touch:
    """Unpickling it would run a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("form", ["torch", "bare-pickle", "legacy"])
def test_malicious_checkpoint_is_refused_and_not_run(tmp_path, form):
    target, path = tmp_path / "touched", tmp_path / "evil.pth.tar"
    content = {"state_dict": {"head.weight": torch.zeros(2, 2)}, "args": Touch(target)}
    if form == "bare-pickle":
        path.write_bytes(pickle.dumps(content["args"], protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(ValueError, match=r"evil.pth.tar: refused: .*nothing was run"):
        read_published(path)
    assert not target.exists()


def test_namespace_is_allowed_and_prefixes_go(tmp_path):
    import argparse

    path = tmp_path / "published.pth.tar"
    torch.save({"state_dict": {"module.head.weight": torch.ones(2, 2)}, "args": argparse.Namespace(lr=1.0)}, path)
    assert weights_of(read_published(path), path)["head.weight"].sum() == 4


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02}q\x00"], ids=["empty", "zip-start", "pickle-start"])
def test_damaged_published_file_is_named(tmp_path, content):
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="x.pth: (not a readable PyTorch checkpoint|refused)"):
        read_published(path)


@pytest.mark.parametrize(
    ("stored", "recipe", "part"),
    [
        (HELD_OUT, {"data": {"validation_fraction": 0.0}}, HELD_OUT),
        (None, {"data": {"validation_fraction": 0.1}}, HELD_OUT),
        (None, {"data": {"validation_fraction": 0.0}}, TEST_PART),
        (None, None, UNKNOWN_PART),
    ],
    ids=["said", "older-held-out", "older-test", "nothing-known"],
)
def test_a_description_says_which_part_its_metrics_are_of(stored, recipe, part):
    assert replace(INFO, metrics_part=stored, recipe=recipe).evaluated_on == part


def described_as(file, **changes):
    """`file` with other values in its description."""
    tensors, metadata = read_tensors(file)
    values = json.loads(metadata["spikingformer"]) | changes
    write_tensors(file, tensors, {"format": "pt", "spikingformer": json.dumps(values)})
    return file


def test_older_event_models_with_a_picture_models_statistics_load(tmp_path):
    kwargs = KWARGS | {"in_chans": 2}
    info = ModelInfo(NAME, kwargs, tuple("0123456789"), (0.0, 0.0), (1.0, 1.0), kind="events")
    save_model(tmp_path / "a.safetensors", create_model(NAME, kwargs).state_dict(), info)
    described_as(tmp_path / "a.safetensors", mean=[0.1, 0.2, 0.3], std=[0.1, 0.2, 0.3])
    assert load_model(tmp_path / "a.safetensors")[1].mean == (0.0, 0.0)


@pytest.mark.parametrize("kwargs", [[1], {"img_size": 8, "in_chans": "three"}, {}])
def test_a_malformed_description_is_refused(file, kwargs):
    with pytest.raises(ValueError, match=re.escape(str(file))):
        load_model(described_as(file, kwargs=kwargs))


def test_a_model_trained_elsewhere_describes_itself(tmp_path, model):
    info = describe_model(model, tuple("0123456789"), torch.tensor([0.5]), torch.tensor([0.25]))
    save_model(tmp_path / "a.safetensors", model.state_dict(), info)
    loaded, found = load_model(tmp_path / "a.safetensors")
    assert loaded.config == model.config
    assert (found.mean, found.std, found.kind) == ((0.5,), (0.25,), "pictures")
    with pytest.raises(ValueError, match="the model has 10 classes, got 2 names"):
        describe_model(model, ("cat", "dog"), (0.5,), (0.25,))
    with pytest.raises(ValueError, match=r"create it with timm\.create_model"):
        describe_model(type(model)(model.config), tuple("0123456789"), (0.5,), (0.25,))
    with pytest.raises(ValueError, match="expected a model of this package, got Linear"):
        describe_model(torch.nn.Linear(1, 1), (), (), ())


@pytest.mark.parametrize(
    "head",
    [torch.nn.Linear(32, 3), torch.nn.Linear(32, 10, bias=False), torch.nn.Sequential(torch.nn.Linear(32, 10))],
    ids=["other-number", "no-bias", "several-layers"],
)
def test_a_head_that_a_file_could_not_build_again_is_refused(model, head):
    model.head = head
    with pytest.raises(ValueError, match=r"the head was replaced: .* use model\.reset_classifier"):
        describe_model(model, tuple("0123456789"), (0.5,), (0.25,))


@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".nir"])
def test_an_exported_file_is_called_one(tmp_path, suffix):
    (tmp_path / f"best{suffix}").write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="an exported file, which `predict` runs; give the checkpoint"):
        read_model_file(tmp_path / f"best{suffix}")


def test_description_is_plain_json(file):
    metadata = read_tensors(file)[1]
    assert json.loads(metadata["spikingformer"])["name"] == NAME


def test_equal_content_gives_equal_bytes(tmp_path):
    for number in range(4):  # the library itself orders the text by chance
        write_tensors(tmp_path / f"{number}", {"a": torch.ones(2), "b": torch.zeros(3)}, {"x": "1", "y": "2", "é": "3"})
    contents = {(tmp_path / f"{number}").read_bytes() for number in range(4)}
    assert len(contents) == 1
    assert read_tensors(tmp_path / "0")[1] == {"x": "1", "y": "2", "é": "3"}
