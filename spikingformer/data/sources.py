"""From a recipe's `data` section to the parts of a data set: one function a source, a table by name."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from spikingformer.data.cifar import load_cifar
from spikingformer.data.digits import load_digits
from spikingformer.data.folder import PictureFiles, part_root
from spikingformer.data.loading import Samples, Subset
from spikingformer.data.pictures import IMAGENET_MEAN, IMAGENET_STD, PictureSet, split_by_class
from spikingformer.data.settings import DataSettings
from spikingformer.data.shards import ShardPictures, TarPictures, class_names


@dataclass(frozen=True)
class Part:
    """One part of a data set: in memory (`pictures`) or sample by sample (`samples`)."""

    labels: np.ndarray
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pictures: PictureSet | None = None
    samples: Samples | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: np.ndarray) -> "Part":
        return Part(
            self.labels[indices],
            self.class_names,
            self.mean,
            self.std,
            self.pictures.subset(indices) if self.pictures is not None else None,
            Subset(self.samples, indices) if self.samples is not None else None,
        )


@dataclass(frozen=True)
class Parts:
    """train: learnt from. validation: held out of it, to choose the best epoch (None: the test part does). test."""

    train: Part
    validation: Part | None
    test: Part


def data_root(data: DataSettings) -> Path:
    return Path(os.path.expandvars(data.root)).expanduser()


def _in_memory(pictures: PictureSet) -> Part:
    return Part(pictures.labels.numpy(), pictures.class_names, pictures.mean, pictures.std, pictures=pictures)


def _digits(data: DataSettings, part: str) -> Part:
    return _in_memory(load_digits(part, data.image_size))


def _cifar(data: DataSettings, part: str) -> Part:
    return _in_memory(load_cifar(data.name, data_root(data), part))


def _files(data: DataSettings, part: str) -> Part:
    archive = data.name == "tar"
    reader = TarPictures if archive else PictureFiles
    root = data_root(data)
    numbering = None
    if part != "train":  # the training part numbers the classes
        numbering = reader(part_root(root, "train", archive), data.channels).class_to_index
    files = reader(part_root(root, part, archive), data.channels, numbering)
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if data.channels == 3 else ((0.5,) * data.channels,) * 2
    return Part(files.labels, files.class_names, mean, std, samples=files)


def _shards(data: DataSettings, part: str) -> Part:
    root = data_root(data)
    train = ShardPictures(root, data.train_shards, data.channels)  # the training part says how many classes there are
    names = class_names(root, int(train.labels.max()) + 1)
    found = train if part == "train" else ShardPictures(root, data.test_shards, data.channels)
    if int(found.labels.max()) >= len(names):
        raise ValueError(
            f"{root}: class number {found.labels.max()} in the {part} part, the training part has {len(names)}"
        )
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if data.channels == 3 else ((0.5,) * data.channels,) * 2
    return Part(found.labels, names, mean, std, samples=found)


SOURCES: dict[str, Callable[[DataSettings, str], Part]] = {
    "digits": _digits,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "folder": _files,
    "tar": _files,
    "wds": _shards,
}


def event_names() -> tuple[str, ...]:
    """Event sets by name."""
    from spikingformer.data.events.catalogue import CATALOGUE

    return (*CATALOGUE, "digits_dvs")


def load_part(data: DataSettings, part: str) -> Part:
    """The "train" or "test" part of a picture set as it lies on disk.

    Raises:
        ValueError: unknown data set, missing or damaged files, channels or statistics that do not fit.
    """
    if data.name not in SOURCES:
        known = [*SOURCES, *event_names()]
        hint = next(iter(get_close_matches(data.name, known, n=1)), None)
        raise ValueError(
            f"data.name: got {data.name!r}"
            + (f"; did you mean {hint!r}?" if hint else "")
            + f" Known: {', '.join(known)}."
        )
    found = SOURCES[data.name](data, part)
    mean, std = data.mean or found.mean, data.std or found.std
    for name, value in (("mean", mean), ("std", std)):
        if len(value) != data.channels:
            raise ValueError(
                f"data.{name}: {len(value)} values for data.channels={data.channels}; "
                f"{data.name} has {len(found.mean)} channel(s), so set data.channels={len(found.mean)}"
            )
    pictures = found.pictures
    if pictures is not None:
        pictures = PictureSet(pictures.pictures, pictures.labels, pictures.class_names, mean, std)
    return Part(found.labels, found.class_names, mean, std, pictures, found.samples)


def load_parts(data: DataSettings, seed: int) -> Parts:
    """Training, validation (if `data.validation_fraction` > 0) and test part."""
    train, test = load_part(data, "train"), load_part(data, "test")
    if data.validation_fraction == 0:
        return Parts(train, None, test)
    kept, held_out = split_by_class(train.labels, data.validation_fraction, seed)
    return Parts(train.subset(kept), train.subset(held_out), test)
