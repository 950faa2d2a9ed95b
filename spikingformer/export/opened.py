"""Opens an exported file in the form that commands work on: a module and its description."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikingformer.training.checkpoint import EXPORT_SUFFIXES, ModelInfo

from .metadata import ExportMetadata, file_kind
from .runtime import ModulePredictor, Predictor, load_predictor


class PredictorModule(nn.Module):
    """A predictor as a module: input to logits, on the CPU. It cannot be trained."""

    def __init__(self, predictor: Predictor):
        super().__init__()
        self.predictor = predictor
        self.empty = nn.Parameter(torch.empty(0), requires_grad=False)  # callers read the device from a parameter

    def forward(self, x: Tensor) -> Tensor:
        return self.predictor.logits(x.cpu())


def is_exported(path: str | Path) -> bool:
    """Whether a path names an exported file rather than a checkpoint of a run."""
    file = Path(path)
    return file.suffix in EXPORT_SUFFIXES or (file.suffix == ".safetensors" and bool(file_kind(file)))


def open_exported(path: str | Path) -> tuple[nn.Module, ModelInfo]:
    """(module that gives logits, what it is) of an exported file. Raises ValueError as `load_predictor` does."""
    predictor = load_predictor(path)
    module = predictor.model if isinstance(predictor, ModulePredictor) else PredictorModule(predictor)
    return module, model_info(predictor.metadata)


def model_info(metadata: ExportMetadata) -> ModelInfo:
    """An export's metadata in the form that checkpoints use."""
    pre = metadata.preprocessing
    arguments: dict[str, Any] = {**metadata.config, "img_size": list(pre.size), "time_steps": metadata.time_steps}
    return ModelInfo(
        name=metadata.model,
        kwargs=arguments,
        class_names=metadata.class_names,
        mean=pre.mean,
        std=pre.std,
        interpolation=pre.interpolation,
        crop_fraction=pre.crop_fraction,
        kind=metadata.input,
        framing=pre.framing,
        source=f"exported by spikingformer {metadata.package_version}",
        versions={"spikingformer": metadata.package_version},
    )
