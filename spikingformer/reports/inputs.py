"""What the energy and report commands work on: a model by name or file, and the data it is shown."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import Tensor

import spikingformer.models
from spikingformer.weights import shipped_weights

if TYPE_CHECKING:
    from spikingformer.data.loading import EvaluationLoader
    from spikingformer.data.settings import DataSettings
    from spikingformer.training.checkpoint import ModelInfo

Batches = Iterator[tuple[Tensor, Tensor | None]]


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A model, in eval mode on the CPU, and what is known about it."""

    model: spikingformer.models.SpikingTransformer
    name: str
    info: ModelInfo | None  # of a checkpoint
    path: Path | None  # of a checkpoint
    trained: bool


def is_checkpoint(target: str) -> bool:
    """True where `target` is a file, a run folder or shipped weights (MODEL.TAG) rather than a registered name."""
    if target in shipped_weights():
        return True
    return not timm.is_model(target) and (Path(target).exists() or "/" in target or target.endswith(".safetensors"))


def checkpoint_file(target: str) -> Path:
    """The model file of a run folder (the best one) or the file itself. Raises ValueError where there is none."""
    path = Path(target).expanduser()
    if not path.is_dir():
        return path
    for name in ("best.safetensors", "last.safetensors"):
        if (path / name).is_file():
            return path / name
    raise ValueError(f"{path}: no best.safetensors or last.safetensors in this folder: is it a run's --output?")


def open_model(target: str, **overrides: Any) -> OpenedModel:
    """A registered name (random weights; `overrides` for timm.create_model), a model file or a run's folder.

    Raises ValueError for what is none of them.
    """
    from spikingformer.training.checkpoint import create_model, load_model

    if is_checkpoint(target):
        path = checkpoint_file(target)
        model, info = load_model(path)
        return OpenedModel(_ours(model, target), info.name, info, path, trained=True)
    torch.manual_seed(0)
    return OpenedModel(_ours(create_model(target, overrides), target).eval(), target, None, None, trained=False)


def _ours(model: torch.nn.Module, target: str) -> spikingformer.models.SpikingTransformer:
    if not isinstance(model, spikingformer.models.SpikingTransformer):
        raise ValueError(f"{target!r} is not a model of this package: `spikingformer models` lists them")
    return model


def random_batches(opened: OpenedModel, samples: int, batch_size: int) -> tuple[Batches, int]:
    """Uniform noise shaped like the model's input, without labels; and the number of samples."""
    c = opened.model.config
    events = c.in_chans == 2 or (opened.info is not None and opened.info.kind == "events")
    shape = (c.time_steps, c.in_chans, *c.img_size) if events else (c.in_chans, *c.img_size)

    def batches() -> Batches:
        generator = torch.Generator().manual_seed(0)
        for start in range(0, samples, batch_size):
            yield torch.rand(min(batch_size, samples - start), *shape, generator=generator), None

    return batches(), samples


def data_settings(opened: OpenedModel, name: str, root: str | None) -> DataSettings:
    """The recipe's `data` section of a checkpoint, with another name or folder where they are given.

    Raises ValueError where nothing says which data set to use.
    """
    from spikingformer.data.settings import DataSettings

    values: dict[str, Any] = {}
    if opened.info is not None and opened.info.recipe is not None:
        values = dict(opened.info.recipe["data"])
    elif not name:
        raise ValueError(f"{opened.name} does not say which data it was trained on: give --data NAME")
    config = opened.model.config
    if name and name != values.get("name"):
        values = {"name": name, "image_size": config.img_size[0], "channels": config.in_chans,
                  "root": values.get("root", "data"), "frames": config.time_steps}  # fmt: skip
        if opened.info is not None and opened.info.kind == "pictures":
            values |= {"mean": opened.info.mean, "std": opened.info.std, "interpolation": opened.info.interpolation,
                       "crop_fraction": opened.info.crop_fraction}  # fmt: skip
    if root is not None:
        values["root"] = root
    return DataSettings.model_validate_json(json.dumps(values))


def open_test_part(
    opened: OpenedModel, name: str, root: str | None, batch_size: int, device: torch.device
) -> tuple[EvaluationLoader, tuple[str, ...], DataSettings]:
    """The test part, its class names and its settings. Raises ValueError for missing data or other classes."""
    from spikingformer.training.distributed import World
    from spikingformer.training.inputs import create_test_loader

    settings = data_settings(opened, name, root)
    loader, classes = create_test_loader(settings, batch_size, 0, device, World())
    if len(classes) != opened.model.num_classes:
        raise ValueError(
            f"{settings.name} has {len(classes)} classes, the model {opened.model.num_classes}: "
            "name the data set it was trained on with --data"
        )
    return loader, classes, settings


def evaluation_batches(
    opened: OpenedModel, name: str, root: str | None, batch_size: int, samples: int | None
) -> tuple[Batches, int]:
    """Batches (inputs, labels) of the test part, at most `samples`; and how many samples that makes."""
    loader, _, _ = open_test_part(opened, name, root, batch_size, torch.device("cpu"))
    total = min(samples or loader.samples, loader.samples)

    def batches() -> Batches:
        left = total
        for batch in loader.batches():
            yield batch.inputs[:left], batch.labels[:left]
            left -= len(batch.labels[:left])
            if left <= 0:
                return

    return batches(), total
