"""ONNX: the whole model with its time steps unrolled, or one time step with explicit state."""

import warnings
from pathlib import Path

import torch
from torch import Tensor

from spikingformer.files import replacing
from spikingformer.models import SpikingTransformer
from spikingformer.neurons import use_backend

from .extras import require
from .graphs import OneStep, WholeModel, start_of_stream
from .metadata import ExportMetadata
from .prepare import ExportReport, checked_target, prepare


def export_onnx(
    model: SpikingTransformer,
    path: str | Path,
    example: Tensor | None = None,
    *,
    metadata: ExportMetadata | None = None,
    streaming: bool = False,
    spikes: bool = False,
    check: bool = True,
) -> ExportReport:
    """Writes `model`, folded, as an ONNX file whose batch size is free.

    example: pictures (B, C, H, W) or event frames (B, T, C, H, W) that fix H, W and T; default: the model's own sizes.
    streaming: one time step; inputs `frame`, `steps`, `feature_sum` and a membrane for each neuron layer, outputs
        `logits` and each of these as `next.*`. A stream starts from zeros.
    spikes: more outputs `spikes.<layer>`, 0 or 1, (T, B, C, H, W).
    check: check the fold in float64, and run the written file in ONNX Runtime if that is installed.

    Raises ValueError for a wrong example, path, or a missing package.
    """
    require("onnx", "onnxscript")
    target = checked_target(path, ".onnx")
    prepared = prepare(model, example, metadata, check, streaming)
    batch = torch.export.Dim("batch")
    inputs: tuple[Tensor, ...]
    graph: WholeModel | OneStep
    if streaming:
        frame = prepared.frame()
        graph = OneStep(prepared.model, spikes)
        with use_backend("reference"):
            inputs = (frame, *start_of_stream(prepared.model, frame))
        input_names = graph.input_names()
        shapes: tuple[object, ...] = ({0: batch}, {}, {0: batch}, tuple({0: batch} for _ in inputs[3:]))
    else:
        graph = WholeModel(prepared.model, spikes)
        inputs, input_names, shapes = (prepared.example,), ["input"], ({0: batch},)
    with torch.no_grad(), use_backend("reference"), warnings.catch_warnings():
        # all inputs share the batch axis, as intended
        warnings.filterwarnings("ignore", message=".*shares the same shape constraints.*")
        program = torch.onnx.export(
            graph.eval(),
            inputs,
            dynamo=True,
            verbose=False,
            input_names=input_names,
            output_names=graph.output_names(),
            dynamic_shapes=shapes,
        )
        expected = graph(*inputs)[0]
    assert program is not None
    program.model.metadata_props.update(prepared.metadata.to_strings())
    program.model.producer_name, program.model.producer_version = "spikingformer", prepared.metadata.package_version
    with replacing(target) as file:
        program.save(str(file), external_data=False)
        difference = _difference(file, inputs, expected) if check else None
    return prepared.report(target, logit_difference=difference)


def _difference(path: Path, inputs: tuple[Tensor, ...], expected: Tensor) -> float | None:
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    (logits,) = session.run(["logits"], feed)
    return float((torch.from_numpy(logits) - expected).abs().max())
