"""torch.export programs (.pt2), and AOTInductor packages compiled from them."""

import io
import shutil
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from spikingformer.files import replacing
from spikingformer.models import SpikingTransformer
from spikingformer.neurons import use_backend

from .graphs import OneStep, WholeModel, start_of_stream
from .metadata import ExportMetadata
from .prepare import ExportReport, Prepared, checked_target, prepare


def export_torch(
    model: SpikingTransformer,
    path: str | Path,
    example: Tensor | None = None,
    *,
    metadata: ExportMetadata | None = None,
    streaming: bool = False,
    check: bool = True,
) -> ExportReport:
    """Writes `model`, folded, as a torch.export program whose batch size is free; arguments as `export_onnx`.

    The program contains plain operators only, so it runs without this package. The metadata are extra files of the
    archive. Raises ValueError for a wrong example or path.
    """
    target = checked_target(path, ".pt2")
    prepared = prepare(model, example, metadata, check, streaming)
    program, inputs, expected = _traced(prepared)
    difference = None
    with replacing(target) as file:
        written = io.BytesIO()  # torch ends the process if the disk is full
        torch.export.save(program, written, extra_files=prepared.metadata.to_strings())
        file.write_bytes(written.getbuffer())
        if check:
            with torch.no_grad():
                got = torch.export.load(str(file)).module()(*inputs)[0]
            difference = float((got - expected).abs().max())
    return prepared.report(target, logit_difference=difference)


def export_aot(
    model: SpikingTransformer,
    path: str | Path,
    example: Tensor | None = None,
    *,
    metadata: ExportMetadata | None = None,
    streaming: bool = False,
    check: bool = True,
) -> ExportReport:
    """Writes `model`, folded, as an AOTInductor package: compiled for this machine's processor, run without Python.

    Arguments as `export_onnx`. Takes a minute or more. Raises ValueError without a C++ compiler.
    """
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        raise ValueError("AOTInductor needs a C++ compiler, and neither g++ nor clang++ is on the path: install one")
    target = checked_target(path, ".pt2")
    prepared = prepare(model, example, metadata, check, streaming)
    program, inputs, expected = _traced(prepared)
    difference = None
    with replacing(target) as file:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Inductor's own deprecations
            torch._inductor.aoti_compile_and_package(
                program,
                package_path=str(file.resolve()),
                inductor_configs={"aot_inductor.metadata": prepared.metadata.to_strings()},
            )
        if check:
            with torch.no_grad():
                outputs = torch._inductor.aoti_load_package(str(file.resolve()))(*inputs)
            got = outputs if isinstance(outputs, Tensor) else outputs[0]
            difference = float((got - expected).abs().max())
    return prepared.report(target, logit_difference=difference)


def is_aot_package(path: str | Path) -> bool:
    """Whether a .pt2 archive holds compiled code, not a program. Raises ValueError for a file that is no archive."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not a .pt2 archive: it is damaged, or was not written by `spikingformer export`")
    with zipfile.ZipFile(path) as archive:
        return any("aotinductor" in name for name in archive.namelist())


def _traced(prepared: Prepared) -> tuple[torch.export.ExportedProgram, tuple[Tensor, ...], Tensor]:
    """(program, inputs it was traced with, logits that it must give)."""
    batch = torch.export.Dim("batch", min=1)
    graph: WholeModel | OneStep
    shapes: tuple[object, ...]
    with torch.no_grad(), use_backend("reference"):
        if prepared.metadata.streaming:
            frame = prepared.frame()
            graph = OneStep(prepared.model)
            inputs = (frame, *start_of_stream(prepared.model, frame))
            shapes = ({0: batch}, {}, {0: batch}, tuple({0: batch} for _ in inputs[3:]))
        else:
            graph, inputs, shapes = WholeModel(prepared.model), (prepared.example,), ({0: batch},)
        program = torch.export.export(graph.eval(), inputs, dynamic_shapes=shapes)
        return program, inputs, graph(*inputs)[0]
