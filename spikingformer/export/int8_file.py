"""Weights in 8 bits for the integer engine: a quarter of the size. Only weights and currents are rounded.

A safetensors file: for each product its int8 weight (O, C, k, k) with a float32 scale and bias per channel, in
the engine's fixed-point units, and the head in float32. The engine gives the same bits from a file as from its model.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from spikingformer.engine import Engine, Program, build_program
from spikingformer.engine.fixed_point import FRACTION_BITS, input_bits, quantize_product
from spikingformer.engine.program import Product, Step
from spikingformer.files import replacing
from spikingformer.models import SpikingTransformer
from spikingformer.training.checkpoint import check_head
from spikingformer.training.evaluation import evaluating
from spikingformer.training.tensor_file import read_tensors, write_tensors

from .metadata import ExportMetadata
from .prepare import ExportReport, checked_target, prepare

KIND = "int8"
_ONE = 2.0**FRACTION_BITS


def export_int8(
    model: SpikingTransformer,
    path: str | Path,
    example: Tensor | None = None,
    *,
    metadata: ExportMetadata | None = None,
    check: bool = True,
) -> ExportReport:
    """Writes `model` with int8 weights to a safetensors file; `example` checks the fold, and the engine's int8 form.

    The report's `logit_difference` is between the int8 engine and the float model on the example: the effect of
    rounding, which `compare_int8` measures as accuracy. Raises ValueError for a model that the integer engine cannot
    run; no file is written then.
    """
    target = checked_target(path, ".safetensors")
    check_head(model)
    prepared = prepare(model, example, metadata, check)
    program = build_program(prepared.model)
    bits = input_bits(program)
    tensors = {"head.weight": program.head_weight.float(), "head.bias": program.head_bias.float()}
    for step in program.steps:
        if isinstance(step, Product):
            q = quantize_product(step, bits if step.source == "picture" else 0)
            tensors |= {f"{step.name}.weight": q.weight, f"{step.name}.scale": q.scale, f"{step.name}.bias": q.bias}
    described = replace(prepared.metadata, kind=KIND)
    difference = None
    with replacing(target) as temporary:
        write_tensors(temporary, tensors, described.to_strings())
        if check:
            with torch.no_grad():
                expected = prepared.model(prepared.example)
            difference = float((Engine(load_int8(temporary)[0], "int8")(prepared.example) - expected).abs().max())
    return replace(prepared, metadata=described).report(target, logit_difference=difference)


def load_int8(path: str | Path) -> tuple[Program, ExportMetadata]:
    """(program for `spikingformer.engine.Engine(program, "int8")`, metadata) of a file of `export_int8`.

    The program's weights are those of the file, so that quantising them again gives the file's numbers exactly.
    Raises ValueError for another kind of file, a damaged one, and one whose tensors do not fit its model.
    """
    tensors, strings = read_tensors(Path(path))
    metadata = ExportMetadata.from_strings(strings, path)
    if metadata.kind != KIND:
        raise ValueError(f"{path} holds {metadata.kind} weights, expected {KIND}: open it with load_predictor")
    with torch.device("meta"):
        shape = build_program(metadata.create_model().eval())
    bits = input_bits(shape)

    def take(name: str, like: Tensor) -> Tensor:
        if name not in tensors or tensors[name].shape != like.shape:
            found = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise ValueError(
                f"{path}: {name} should be {tuple(like.shape)} for {metadata.model}, found {found}: export it again"
            )
        return tensors[name].double()

    steps: list[Step] = []
    for step in shape.steps:
        if isinstance(step, Product):
            scale = take(f"{step.name}.scale", step.bias) / _ONE
            unit = scale * 2.0**bits if step.source == "picture" else scale
            weight = take(f"{step.name}.weight", step.weight) * unit[:, None, None, None]
            steps.append(replace(step, weight=weight, bias=take(f"{step.name}.bias", step.bias) / _ONE))
        else:
            steps.append(step)
    head = (take("head.weight", shape.head_weight), take("head.bias", shape.head_bias))
    return replace(shape, steps=tuple(steps), head_weight=head[0], head_bias=head[1]), metadata


@dataclass(frozen=True)
class Int8Comparison:
    """The float model and its int8 form on the same samples."""

    samples: int
    accuracy_float: float  # percent
    accuracy_int8: float  # percent
    same_class: float  # percent of samples that get the same class from both


@torch.no_grad()
def compare_int8(model: SpikingTransformer, batches: Iterable[tuple[Tensor, Tensor]]) -> Int8Comparison:
    """Runs `model` (in eval mode) and its int8 engine over batches of (inputs, labels)."""
    samples = right = right_int8 = same = 0
    with evaluating(model):
        engine = Engine(model, "int8")
        for x, labels in batches:
            ours, theirs = model(x).argmax(-1), engine(x).argmax(-1)
            samples += len(labels)
            right += int((ours == labels).sum())
            right_int8 += int((theirs == labels).sum())
            same += int((ours == theirs).sum())
    if not samples:
        raise ValueError("there are no samples to compare on")
    return Int8Comparison(samples, 100 * right / samples, 100 * right_int8 / samples, 100 * same / samples)
