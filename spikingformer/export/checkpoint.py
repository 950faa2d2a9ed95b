"""Loads a checkpoint for export: the model, and the metadata of the exported file."""

import hashlib
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError

from spikingformer.data.events.framing import Framing
from spikingformer.models import SpikingTransformer
from spikingformer.training.checkpoint import EXPORT_SUFFIXES, load_model, named_file
from spikingformer.training.hub_folder import WEIGHTS_FILE, is_hub_folder
from spikingformer.training.tensor_file import DESCRIPTION_KEY

from .metadata import ExportMetadata, Preprocessing, describe, file_kind, read_safetensors_metadata


def load_checkpoint(path: str | Path) -> tuple[SpikingTransformer, ExportMetadata]:
    """(model in eval mode on the CPU, metadata) of a checkpoint, a run's or a hub folder, or MODEL.TAG of shipped
    weights.

    Raises ValueError for a missing, damaged or exported file, and for a model that is not of this package.
    """
    source = named_file(path)
    if file_kind(source) or source.suffix in EXPORT_SUFFIXES:
        raise ValueError(f"{path} is already an exported file: give the checkpoint that it was made from")
    model, info = load_model(source)
    if not isinstance(model, SpikingTransformer):
        raise ValueError(
            f"{path} holds {info.name}, which is no spiking model of this package: only those can be exported"
        )
    preprocessing = Preprocessing(
        info.image_size,
        tuple(info.mean),
        tuple(info.std),
        info.interpolation,
        info.crop_fraction,
        info.event_framing if info.kind == "events" else Framing(),
    )
    weights = source / WEIGHTS_FILE if is_hub_folder(source) else source
    described = describe(model, info.class_names, file_sha256(weights), preprocessing)
    return model, replace(described, input=info.kind)


def is_checkpoint(path: str | Path) -> bool:
    """Whether a safetensors file was written by training rather than by export."""
    try:
        return DESCRIPTION_KEY in read_safetensors_metadata(path)
    except (SafetensorError, OSError):
        return False


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
