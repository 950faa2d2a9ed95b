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
    path: Path | None  # of a model file, beside which a run's records may lie; not of a hub folder or shipped weights
    trained: bool


def is_checkpoint(target: str) -> bool:
    """True where `target` is a file, a run folder or shipped weights (MODEL.TAG) rather than a registered name."""
    if target in shipped_weights():
        return True
    return not timm.is_model(target) and (Path(target).exists() or "/" in target or target.endswith(".safetensors"))


def open_model(target: str, **overrides: Any) -> OpenedModel:
    """A registered name (random weights; `overrides` for timm.create_model), MODEL.TAG of weights that come with the
    package, a model file, a run's folder or a hub folder.

    Raises ValueError for anything else.
    """
    from spikingformer.training.checkpoint import checkpoint_file, create_model, load_model

    if is_checkpoint(target):
        path = checkpoint_file(target)
        model, info = load_model(path)
        return OpenedModel(_ours(model, target), info.name, info, path if path.is_file() else None, trained=True)
    torch.manual_seed(0)
    return OpenedModel(_ours(create_model(target, overrides), target).eval(), target, None, None, trained=False)


def _ours(model: torch.nn.Module, target: str) -> spikingformer.models.SpikingTransformer:
    if not isinstance(model, spikingformer.models.SpikingTransformer):
        raise ValueError(f"{target!r} is not a model of this package: `spikingformer models` lists them")
    return model


def random_batches(opened: OpenedModel, samples: int, batch_size: int) -> tuple[Batches, int]:
    """Uniform noise shaped like the model's input, without labels; and the number of samples."""
    c = opened.model.config
    events = c.takes_events or (opened.info is not None and opened.info.kind == "events")
    shape = (c.time_steps, c.in_chans, *c.img_size) if events else (c.in_chans, *c.img_size)

    def batches() -> Batches:
        generator = torch.Generator().manual_seed(0)
        for start in range(0, samples, batch_size):
            yield torch.rand(min(batch_size, samples - start), *shape, generator=generator), None

    return batches(), samples


def checkpoint_data(
    info: ModelInfo, name: str | None = None, root: str | None = None, image_size: int | None = None
) -> DataSettings:
    """The data section to read a checkpoint's test part by: its recipe's (or that of the data set `name`, or in the
    folder `root`), with the picture size, channels and statistics that the model was made for.

    Raises ValueError if nothing says which data set to use, and for a model that does not take squares.
    """
    from spikingformer.data.settings import DataSettings

    values = dict((info.recipe or {}).get("data", {}))
    if name and values.get("name") != name:
        values = {"name": name, "root": values.get("root", "data")}
    if not values:
        raise ValueError(f"{info.name} does not say what it was trained on: add --data NAME and --root DIR")
    if root is not None:
        values["root"] = root
    values |= {"image_size": image_size or _side(info.image_size), "channels": info.channels}
    values |= {"interpolation": info.interpolation, "crop_fraction": info.crop_fraction}
    if info.kind == "pictures":
        values |= {"mean": info.mean, "std": info.std}
    else:
        values |= {"frames": info.kwargs["time_steps"], "split_by": info.event_framing.split_by}
    return DataSettings.model_validate_json(json.dumps(values))


def _side(size: tuple[int, int]) -> int:
    rows, columns = size
    if rows != columns:
        raise ValueError(
            f"this model takes {rows}x{columns} pixels, but data sets are read as squares: pass files to "
            "`spikingformer predict`, or a square size to --img-size if the command has it"
        )
    return rows


def data_settings(opened: OpenedModel, name: str, root: str | None) -> DataSettings:
    """The data section for a model: `checkpoint_data`, or what fits a model with random weights.

    Raises ValueError as `checkpoint_data` does.
    """
    from spikingformer.data.settings import DataSettings

    if opened.info is not None:
        return checkpoint_data(opened.info, name, root)
    if not name:
        raise ValueError(f"{opened.name} has random weights and no data set of its own: add --data NAME")
    config = opened.model.config
    return DataSettings(
        name=name,
        root=root or "data",
        image_size=_side(config.img_size),
        channels=config.in_chans,
        frames=config.time_steps,
    )


def open_test_part(
    opened: OpenedModel, name: str, root: str | None, batch_size: int, device: torch.device
) -> tuple[EvaluationLoader, tuple[str, ...], DataSettings]:
    """The test part, its class names and its settings. Raises ValueError for missing data or other classes."""
    from spikingformer.training.distributed import World
    from spikingformer.training.inputs import class_names_of, create_test_loader

    settings = data_settings(opened, name, root)
    of_model = class_names_of(opened.info) if opened.info is not None else ()
    classes = opened.model.num_classes
    loader, names = create_test_loader(settings, batch_size, 0, device, World(), of_model, classes)
    return loader, names, settings


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
