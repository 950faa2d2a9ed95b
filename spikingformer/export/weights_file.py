"""Folded weights alone, in a safetensors file: no BatchNorm to keep or to run, read back into our own modules."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from spikingformer.models import SpikingTransformer

from .fold import without_batch_norm
from .metadata import ExportMetadata, read_safetensors_metadata
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

    `example`: an input to check the fold with. Raises ValueError for a wrong example or path.
    """
    target = checked_target(path, ".safetensors")
    prepared = prepare(model, example, metadata, check)
    tensors = {k: v.detach().contiguous() for k, v in prepared.model.state_dict().items()}
    save_file(tensors, str(target), metadata=prepared.metadata.to_strings())
    return prepared.report(target)


def load_weights(path: str | Path) -> tuple[SpikingTransformer, ExportMetadata]:
    """(folded model in eval mode, metadata) of a file of `export_weights`.

    Raises ValueError for another kind of file, a damaged one, and weights that do not fit the model that it names.
    """
    try:
        strings = read_safetensors_metadata(path)
        tensors = load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a safetensors file ({error}): export it again") from None
    metadata = ExportMetadata.from_strings(strings, path)
    if metadata.kind != KIND:
        raise ValueError(f"{path} holds {metadata.kind} weights, expected {KIND}: open it with load_predictor")
    model = without_batch_norm(metadata.create_model())
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ValueError(f"the weights in {path} do not fit {metadata.model}: {error}") from None
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval(), metadata
