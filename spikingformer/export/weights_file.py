"""Folded weights, without BatchNorm, in a safetensors file that is read back into our own modules."""

from pathlib import Path

import torch
from torch import Tensor

from spikingformer.files import replacing
from spikingformer.models import SpikingTransformer
from spikingformer.training import checkpoint
from spikingformer.training.tensor_file import read_tensors, write_tensors

from .fold import without_batch_norm
from .metadata import ExportMetadata
from .prepare import ExportReport, checked_target, prepare

KIND = "float32"


def export_weights(
    model: SpikingTransformer,
    path: str | Path,
    example: Tensor | None = None,
    *,
    metadata: ExportMetadata | None = None,
    check: bool = True,
) -> ExportReport:
    """Writes the folded weights of `model` to a safetensors file that `load_weights` builds the model from.

    `example`: an input to check the fold, and the written file, with. Raises ValueError for a wrong example or path,
    and for a head that is not one linear layer of num_classes outputs.
    """
    target = checked_target(path, ".safetensors")
    checkpoint.check_head(model)
    prepared = prepare(model, example, metadata, check)
    difference = None
    with replacing(target) as file:
        write_tensors(file, prepared.model.state_dict(), prepared.metadata.to_strings())
        if check:
            with torch.no_grad():
                got, expected = load_weights(file)[0](prepared.example), prepared.model(prepared.example)
            difference = float((got - expected).abs().max())
    return prepared.report(target, logit_difference=difference)


def load_weights(path: str | Path) -> tuple[SpikingTransformer, ExportMetadata]:
    """(folded model in eval mode, metadata) of a file of `export_weights`.

    Raises ValueError for another kind of file, a damaged one, and weights that do not fit the model that it names.
    """
    tensors, strings = read_tensors(Path(path))
    metadata = ExportMetadata.from_strings(strings, path)
    if metadata.kind != KIND:
        raise ValueError(f"{path} holds {metadata.kind} weights, expected {KIND}: open it with load_predictor")
    model = without_batch_norm(metadata.create_model())
    checkpoint.load_weights(model, tensors, path)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval(), metadata
