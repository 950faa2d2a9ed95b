"""ONNX files run in ONNX Runtime: same spikes, same logits, whole and step by step."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from spikingformer.export import ExportMetadata, describe, export_onnx, observed_spikes
from spikingformer.export.graphs import neuron_names
from spikingformer.neurons import use_backend

from .conftest import dyadic, exact_model, small_model

# Every sum before a neuron is exact (see exact_model); the mean over tokens and steps and the head's product are not:
# some 100 float32 terms of size ~1, so 100 * 6e-8 * 1 at most.
LOGITS = {"rtol": 0, "atol": 1e-5}


def run(path, **feed):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(None, {k: np.ascontiguousarray(v) for k, v in feed.items()}), strict=True))


def reference(model, x):
    with torch.no_grad(), use_backend("reference"), observed_spikes(model) as spikes:
        return model(x), {k: v.clone() for k, v in spikes.items()}


@pytest.mark.parametrize(
    ("name", "shape", "overrides"),
    [
        ("spikingformer_cml_4_384", (3, 3, 32, 32), {}),
        ("spikformer_4_384", (1, 3, 32, 32), {"time_steps": 2}),
        ("spikformer_2_256", (2, 3, 2, 32, 32), {"img_size": 32}),
    ],
    ids=["spikingformer-pictures", "spikformer-batch1", "spikformer-events-3-steps"],
)
def test_whole_model_fires_the_same_spikes(tmp_path, name, shape, overrides):
    model = exact_model(name, **overrides)
    export_onnx(model, tmp_path / "m.onnx", dyadic(torch.randn(2, *shape[1:])), spikes=True)
    x = dyadic(torch.randn(shape))  # another batch size than the one traced
    logits, spikes = reference(model, x)
    out = run(tmp_path / "m.onnx", input=x.numpy())
    for layer, expected in spikes.items():
        assert np.array_equal(out[f"spikes.{layer}"], expected.numpy()), layer
    assert any(0 < s.mean() < 1 for s in spikes.values())
    np.testing.assert_allclose(out["logits"], logits.numpy(), **LOGITS)


def test_steps_with_explicit_state_equal_the_whole(tmp_path):
    model = exact_model("spikformer_2_256", img_size=32)
    frames = dyadic(torch.randn(2, 4, 2, 32, 32))
    export_onnx(model, tmp_path / "step.onnx", frames, streaming=True, spikes=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "step.onnx"), providers=["CPUExecutionProvider"])
    state = {
        i.name: np.zeros([2 if isinstance(d, str) else d for d in i.shape], np.float32)
        for i in session.get_inputs()
        if i.name != "frame"
    }
    assert [n.removeprefix("membrane.") for n in state if n.startswith("membrane.")] == neuron_names(model)
    logits, spikes = reference(model, frames)
    names = [o.name for o in session.get_outputs()]
    for t in range(4):
        out = dict(zip(names, session.run(None, {"frame": frames[:, t].numpy(), **state}), strict=True))
        for layer, expected in spikes.items():
            assert np.array_equal(out[f"spikes.{layer}"][0], expected[t].numpy()), (t, layer)
        state = {name: out[f"next.{name}"] for name in state}
    assert state["steps"] == 4
    np.testing.assert_allclose(out["logits"], logits.numpy(), **LOGITS)


def test_ordinary_weights_agree(tmp_path):
    model = small_model("spikingformer_cml_4_384")
    x = torch.randn(2, 3, 32, 32)
    report = export_onnx(model, tmp_path / "m.onnx", x)
    assert report.fold is not None
    assert report.fold.exact
    # a sum rounded the other way can flip a spike that sits within 1e-6 of the threshold; with this seed none does
    assert report.logit_difference < 1e-5
    assert report.size_bytes == (tmp_path / "m.onnx").stat().st_size


def test_the_file_says_what_it_is(tmp_path):
    model = small_model("spikformer_4_384", num_classes=2)
    metadata = describe(model, ["cat", "dog"], "ab" * 32)
    export_onnx(model, tmp_path / "m.onnx", metadata=metadata, check=False)
    strings = {p.key: p.value for p in onnx.load(str(tmp_path / "m.onnx")).metadata_props}
    read = ExportMetadata.from_strings(strings)
    assert read == metadata
    assert read.class_names == ("cat", "dog")
    assert read.preprocessing.size == (32, 32)
    assert read.create_model().config == model.config


@pytest.mark.parametrize(
    ("example", "path", "message"),
    [
        (torch.zeros(1, 4, 32, 32), "m.onnx", "takes 3 channels, got 4"),
        (torch.zeros(1, 3, 30, 32), "m.onnx", "multiples of 4; got 30x32"),
        (torch.full((1, 3, 32, 32), float("nan")), "m.onnx", "NaN or infinity"),
        (torch.zeros(1, 3, 32, 32), "m.pt", r"written to \*.onnx files, got 'm.pt': name it m.onnx"),
        (torch.zeros(1, 3, 32, 32), "none/m.onnx", "does not exist: create it"),
    ],
    ids=["channels", "size", "nan", "suffix", "folder"],
)
def test_wrong_input_says_what_to_do(tmp_path, example, path, message):
    with pytest.raises(ValueError, match=message):
        export_onnx(small_model("spikformer_4_384"), tmp_path / path, example)


def test_wrong_class_names_say_what_to_do():
    with pytest.raises(ValueError, match="5 classes but 1 class names"):
        describe(small_model("spikformer_4_384"), ["cat"])
