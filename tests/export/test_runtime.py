"""Every format runs behind one interface and gives the logits of the model it came from."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from spikingformer.export import (
    describe,
    export_aot,
    export_int8,
    export_onnx,
    export_torch,
    export_weights,
    load_predictor,
    load_weights,
)
from spikingformer.export.runtime import StepPredictor
from spikingformer.native import status

from .conftest import dyadic, exact_model, small_model

FORMATS = {
    "onnx": lambda m, folder, x: export_onnx(m, folder / "m.onnx", x),
    "onnx-steps": lambda m, folder, x: export_onnx(m, folder / "m.onnx", x, streaming=True),
    "torch": lambda m, folder, x: export_torch(m, folder / "m.pt2", x),
    "torch-steps": lambda m, folder, x: export_torch(m, folder / "m.pt2", x, streaming=True),
    "weights": lambda m, folder, x: export_weights(m, folder / "m.safetensors", x),
}


@pytest.mark.parametrize("export", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("kind", ["pictures", "events"])
def test_predictor_gives_the_models_logits(tmp_path, export, kind):
    if kind == "pictures":
        model, shape = exact_model("spikingformer_cml_4_384", time_steps=2), (3, 32, 32)
    else:
        model, shape = exact_model("spikformer_2_256", img_size=32, time_steps=3), (3, 2, 32, 32)
    report = export(model, tmp_path, dyadic(torch.randn(2, *shape)))
    x = dyadic(torch.randn(3, *shape))
    predictor = load_predictor(report.path)
    with torch.no_grad():
        expected = model(x)
    # spikes are exactly equal (see exact_model), so only the head's 32-term float32 sums may round otherwise
    torch.testing.assert_close(predictor.logits(x), expected, rtol=0, atol=1e-5)
    assert predictor.metadata == report.metadata
    assert predictor.metadata.input == kind


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "steps"])
def test_compiled_package_gives_the_models_logits(tmp_path, streaming):
    model = exact_model("spikformer_4_384", time_steps=2)
    report = export_aot(model, tmp_path / "m.pt2", streaming=streaming)
    x = dyadic(torch.randn(3, 3, 32, 32))
    with torch.no_grad():
        torch.testing.assert_close(load_predictor(report.path).logits(x), model(x), rtol=0, atol=1e-5)


def test_the_readout_can_be_reset_and_membranes_kept(tmp_path):
    model = exact_model("spikformer_2_256", img_size=32)
    frames = dyadic(torch.randn(1, 4, 2, 32, 32))
    files = [
        export_weights(model, tmp_path / "m.safetensors").path,
        export_onnx(model, tmp_path / "m.onnx", frames, streaming=True).path,
        export_torch(model, tmp_path / "m.pt2", frames, streaming=True).path,
    ]
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(frames)[2:])
    for file in files:
        predictor, state = load_predictor(file), None
        assert isinstance(predictor, StepPredictor)
        for i, frame in enumerate(frames.unbind(1)):
            state = predictor.reset_readout(state) if i == 2 else state
            logits, state = predictor.step(frame, state)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_a_stream_can_be_cut_and_resumed(tmp_path):
    model = exact_model("spikformer_2_256", img_size=32)
    frames = dyadic(torch.randn(1, 4, 2, 32, 32))
    predictor = load_predictor(export_weights(model, tmp_path / "m.safetensors").path)
    assert isinstance(predictor, StepPredictor)
    state = None
    for frame in frames.unbind(1):
        logits, state = predictor.step(frame, state)
    torch.testing.assert_close(logits, predictor.logits(frames), rtol=0, atol=1e-6)


def test_weights_come_back_bit_for_bit(tmp_path):
    model = small_model("spikformer_4_384")
    metadata = describe(model, ["a", "b", "c", "d", "e"], "0" * 64)
    export_weights(model, tmp_path / "m.safetensors", metadata=metadata)
    again, read = load_weights(tmp_path / "m.safetensors")
    assert read == metadata
    export_weights(again, tmp_path / "again.safetensors", metadata=read)
    first, second = (load_file(str(tmp_path / name)) for name in ("m.safetensors", "again.safetensors"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_wrong_files_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        load_predictor(tmp_path / "none.onnx")
    for name, message in {
        "a.onnx": "cannot be read as an ONNX model",
        "a.pt2": "is not a .pt2 archive",
        "a.safetensors": "not a complete safetensors file",
        "a.txt": "not in a format that can be run: expected .onnx, .pt2, .safetensors",
        "a.nir": "has no logits: give another format",
    }.items():
        (tmp_path / name).write_bytes(b"not a model")
        with pytest.raises(ValueError, match=message):
            load_predictor(tmp_path / name)


def test_an_int8_file_without_kernels_is_refused_in_words(tmp_path, monkeypatch):
    path = export_int8(small_model("spikformer_4_384"), tmp_path / "8.safetensors", check=False).path
    missing = replace(status(), available=False, reason="no compiler was there")
    monkeypatch.setattr("spikingformer.engine.runner.status", lambda: missing)
    with pytest.raises(ValueError, match="needs the compiled kernels: no compiler was there"):
        load_predictor(path)


def test_a_foreign_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1)}, str(tmp_path / "w.safetensors"))
    with pytest.raises(ValueError, match="was not written by `spikingformer export`"):
        load_predictor(tmp_path / "w.safetensors")


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_wrong_input_says_what_the_file_takes(tmp_path, suffix):
    export = export_onnx if suffix == "onnx" else export_torch
    path = tmp_path / f"m.{suffix}"
    export(exact_model("spikformer_4_384", time_steps=1), path, check=False)
    with pytest.raises(ValueError, match=r"takes inputs \(batch, 3, 32, 32\), got \(1, 3, 16, 16\)"):
        load_predictor(path).logits(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("write", [export_weights, export_torch], ids=["weights", "torch"])
def test_an_input_that_is_no_number_is_refused(tmp_path, write):
    model = small_model("spikformer_4_384", time_steps=1, img_size=16)
    suffix = ".pt2" if write is export_torch else ".safetensors"
    predictor = load_predictor(write(model, tmp_path / f"m{suffix}", check=False).path)
    x = torch.zeros(1, 3, 16, 16)
    x[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"the input \(1, 3, 16, 16\) holds NaN or infinity"):
        predictor.logits(x)
    if write is export_weights:
        with pytest.raises(ValueError, match="holds NaN"):
            predictor.step(x, None)
