"""Int8 files: the engine runs them to the same bits as the model that they came from."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from spikingformer.engine import Engine, build_program, int8_reference
from spikingformer.export import compare_int8, export_int8, export_weights, fold_batch_norm, load_int8, load_predictor
from spikingformer.export.metadata import read_safetensors_metadata
from spikingformer.native import status

from .conftest import small_model

pytestmark = pytest.mark.skipif(not status().available, reason=f"no compiled kernels: {status().reason}")

CASES = {
    "spikingformer": ("spikingformer_cml_4_384", {}, (3, 3, 32, 32)),
    "spikformer": ("spikformer_4_384", {}, (2, 3, 32, 32)),
    "events": ("spikingformer_2_256", {"img_size": 32, "time_steps": 3}, (2, 3, 2, 32, 32)),
}


@pytest.mark.parametrize(("name", "overrides", "shape"), CASES.values(), ids=CASES)
def test_file_runs_to_the_bits_of_the_model(tmp_path, name, overrides, shape):
    model = fold_batch_norm(small_model(name, **overrides))
    x = torch.rand(shape) * 2
    path = export_int8(model, tmp_path / "m.safetensors", x).path
    predictor = load_predictor(path)
    assert predictor.metadata.kind == "int8"
    assert torch.equal(predictor.logits(x), Engine(model, "int8")(x))
    # and so do the plain integers that define it
    assert torch.equal(predictor.logits(x), int8_reference.run(load_int8(path)[0], x)[-1].float())
    assert int8_reference.run(build_program(model), x).unique().numel() > 1


@pytest.mark.parametrize("write", [export_int8, export_weights])
@pytest.mark.parametrize("head", [torch.nn.Linear(32, 3), torch.nn.Sequential(torch.nn.Linear(32, 5))])
def test_a_head_that_the_file_could_not_build_again_is_refused(tmp_path, write, head):
    model = small_model("spikingformer_cml_4_384", img_size=16)
    model.head = head
    with pytest.raises(ValueError, match="the head was replaced: "):
        write(model, tmp_path / "m.safetensors")
    assert not any(tmp_path.iterdir())


def test_file_is_a_quarter_of_the_float_one(tmp_path):
    model = small_model("spikformer_4_384", embed_dim=128)
    int8 = export_int8(model, tmp_path / "8.safetensors", check=False).size_bytes
    float32 = export_weights(model, tmp_path / "32.safetensors", check=False).size_bytes
    assert float32 / int8 > 3.5


def test_comparison_counts_accuracy_and_agreement():
    model = small_model("spikingformer_cml_4_384")
    x = torch.randn(20, 3, 32, 32)
    with torch.no_grad():
        labels = model(x).argmax(-1)
    labels[:5] = (labels[:5] + 1) % 5
    found = compare_int8(model, [(x[:12], labels[:12]), (x[12:], labels[12:])])
    assert found.samples == 20
    assert found.accuracy_float == 75.0
    assert found.same_class >= 80  # random weights: margins are small; trained ones agree more
    assert abs(found.accuracy_float - found.accuracy_int8) <= 100 - found.same_class
    with pytest.raises(ValueError, match="no samples"):
        compare_int8(model, [])


def test_damaged_files_say_what_is_wrong(tmp_path):
    path = export_int8(small_model("spikformer_4_384"), tmp_path / "m.safetensors", check=False).path
    metadata, tensors = read_safetensors_metadata(path), load_file(str(path))
    del metadata["sha256"]  # damage before it was written, which a checksum does not find
    wrong = {**tensors, "stem.rpe.weight": tensors["stem.rpe.weight"][:3]}
    save_file(wrong, str(tmp_path / "wrong.safetensors"), metadata=metadata)
    with pytest.raises(ValueError, match=r"stem.rpe.weight should be \(32, 32, 3, 3\) .* found \(3, 32, 3, 3\)"):
        load_predictor(tmp_path / "wrong.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if k != "head.bias"}, str(tmp_path / "cut.safetensors"), metadata=metadata
    )
    with pytest.raises(ValueError, match=r"head.bias should be \(5,\) .* found nothing"):
        load_predictor(tmp_path / "cut.safetensors")
    float_file = export_weights(small_model("spikformer_4_384"), tmp_path / "f.safetensors", check=False).path
    with pytest.raises(ValueError, match="holds float32 weights, expected int8"):
        load_int8(float_file)
