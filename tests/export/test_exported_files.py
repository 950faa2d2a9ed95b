"""Exported files on disk: damage is found, nothing of the user's is overwritten, a failed write changes nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spikingformer.export import (
    describe,
    export_aot,
    export_int8,
    export_nir,
    export_onnx,
    export_torch,
    export_weights,
    fold_batch_norm,
    load_weights,
)
from spikingformer.export.metadata import FORMAT_KEY, ExportMetadata
from spikingformer.export.prepare import checked_target
from spikingformer.export.runtime import load_predictor
from spikingformer.models import SpikingTransformer
from spikingformer.native import status
from spikingformer.training.checkpoint import load_model

from .conftest import small_model

WRITERS = {
    "onnx": (export_onnx, "m.onnx"),
    "torch": (export_torch, "m.pt2"),
    "weights": (export_weights, "m.safetensors"),
    "int8": (export_int8, "m.safetensors"),
    "nir": (lambda model, path, check: export_nir(model, path, part="stem.last"), "m.nir"),
}
needs_kernels = pytest.mark.skipif(not status().available, reason=f"no compiled kernels: {status().reason}")
SAFETENSORS = {"weights": export_weights, "int8": pytest.param(export_int8, marks=needs_kernels)}


@pytest.fixture
def model():
    return small_model("spikingformer_cml_4_384", img_size=16, time_steps=1)


@pytest.mark.parametrize(("write", "name"), WRITERS.values(), ids=WRITERS)
def test_a_file_of_another_origin_is_not_overwritten_but_an_export_is(tmp_path, model, write, name):
    path = tmp_path / name
    path.write_bytes(b"years of work")
    with pytest.raises(ValueError, match="was not written by `spikingformer export`: name another"):
        write(model, path, check=False)
    assert path.read_bytes() == b"years of work"
    path.unlink()
    write(model, path, check=False)
    assert checked_target(path, path.suffix) == path
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("folded", [False, True], ids=["normed", "folded"])
def test_the_callers_model_is_left_as_it_is(tmp_path, model, monkeypatch, folded):
    moved = []
    monkeypatch.setattr(SpikingTransformer, "cpu", lambda self: moved.append(self) or self)
    given = (fold_batch_norm(model) if folded else model).double().train()
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    export_weights(given, tmp_path / "m.safetensors")
    assert given.training
    assert given not in moved
    for name, tensor in given.state_dict().items():
        assert tensor.dtype == before[name].dtype, name
        assert torch.equal(tensor, before[name]), name
    assert next(load_weights(tmp_path / "m.safetensors")[0].parameters()).dtype == torch.float32


def test_a_write_that_fails_leaves_the_earlier_file(tmp_path, model, monkeypatch):
    path = export_nir(model, tmp_path / "m.nir", part="stem.last").path
    before = path.read_bytes()

    def full_disk(file, content):
        with open(file, "wb") as partial:
            partial.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space"):
        export_nir(model, path, part="stem.last")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# what each writer reads its own file back with
CHECKS = {
    "onnx": (export_onnx, "m.onnx", "onnxruntime.InferenceSession"),
    "torch": (export_torch, "m.pt2", "torch.export.load"),
    "aot": (export_aot, "m.pt2", "torch._inductor.aoti_load_package"),
    "weights": (export_weights, "m.safetensors", "spikingformer.export.weights_file.load_weights"),
    "int8": pytest.param(export_int8, "m.safetensors", "spikingformer.export.int8_file.load_int8", marks=needs_kernels),
}


@pytest.mark.parametrize(("write", "name", "reader"), CHECKS.values(), ids=CHECKS)
def test_a_file_that_fails_its_check_does_not_replace_the_earlier_one(
    tmp_path, model, monkeypatch, write, name, reader
):
    def compile_nothing(program, *, package_path, inductor_configs):  # the real one takes a minute
        Path(package_path).write_bytes(b"compiled")

    def unreadable(path, *args, **options):
        assert Path(path).is_file()
        raise RuntimeError("the file cannot be run")

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", compile_nothing)
    monkeypatch.setattr(reader, unreadable)
    earlier, content = tmp_path / name, f"an export with its {FORMAT_KEY}".encode()
    earlier.write_bytes(content)
    with pytest.raises(RuntimeError, match="the file cannot be run"):
        write(model, earlier)
    assert earlier.read_bytes() == content
    assert list(tmp_path.iterdir()) == [earlier]


@pytest.mark.parametrize("write", SAFETENSORS.values(), ids=SAFETENSORS)
@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_damaged_weights_are_refused(tmp_path, model, write, damage):
    path = write(model, tmp_path / "m.safetensors", check=False).path
    content = bytearray(path.read_bytes())
    content[-1000] ^= 0x10
    path.write_bytes(content if damage == "flipped" else content[:-1000])
    with pytest.raises(
        ValueError, match="damaged, its checksum" if damage == "flipped" else "not a complete safetensors"
    ):
        load_predictor(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("preprocessing", '{"size": [16]}'),
        ("preprocessing", json.dumps({"size": [16, 16], "mean": [0.5], "std": [0.5]})),
        ("preprocessing", "[]"),
        ("class_names", "[]"),
        ("config", "{}"),
        ("model", "resnet18"),
        ("time_steps", "many"),
        ("time_steps", "0"),
    ],
)
def test_damaged_metadata_name_the_file(model, field, value):
    strings = describe(model).to_strings()
    assert ExportMetadata.from_strings(strings) == describe(model)
    with pytest.raises(ValueError, match=r"^m.onnx has damaged metadata \(.+\): export the checkpoint again$"):
        ExportMetadata.from_strings({**strings, f"spikingformer.{field}": value}, "m.onnx")


def test_a_checkpoint_is_asked_for_where_an_export_was_given(tmp_path, model):
    path = export_weights(model, tmp_path / "m.safetensors", check=False).path
    with pytest.raises(ValueError, match="an exported file, which `predict` runs; give the checkpoint"):
        load_model(path)


FULL_DISK = """
import resource, sys
from pathlib import Path
from spikingformer.export import describe, export_nir, export_onnx, export_torch, export_weights
from spikingformer.export.hub import save_hub_folder
from spikingformer.export.model_card import CardFacts
from tests.export.conftest import small_model

model, folder = small_model("spikingformer_cml_4_384", time_steps=2, img_size=16), Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for name, write in (
    ("m.onnx", export_onnx),
    ("m.pt2", export_torch),
    ("m.safetensors", export_weights),
    ("m.nir", lambda model, path: export_nir(model, path, part="stem.last")),
    ("m-hub", lambda model, path: save_hub_folder(model, path, describe(model), CardFacts())),
):
    try:
        write(model, folder / name)
    except OSError as error:
        assert name in f"{error.filename} {error}", error
        assert not list(folder.iterdir()), name
    else:
        raise AssertionError(f"{name} was written")
print("refused all")
"""


def test_a_disk_that_is_full_is_an_error_that_names_the_file_and_leaves_nothing(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("nir")
    words = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.endswith("refused all\n"), done.stderr
    assert done.returncode == 0
