"""From a recipe's `data` section to the parts of a data set: one function a source, a table by name."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from spikingformer.data.cifar import load_cifar
from spikingformer.data.class_numbers import are_numbers
from spikingformer.data.digits import load_digits
from spikingformer.data.folder import PictureFiles, part_root
from spikingformer.data.loading import Samples, Subset
from spikingformer.data.pictures import PictureSet, split_by_class
from spikingformer.data.settings import DataSettings
from spikingformer.data.shards import ShardPictures, TarPictures, class_names
from spikingformer.picture_statistics import IMAGENET_MEAN, IMAGENET_STD

ClassNames = tuple[str, ...]


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
    """validation: held out of the training part, to choose the best epoch; None: the test part does."""

    train: Part
    validation: Part | None
    test: Part


def data_root(data: DataSettings) -> Path:
    return Path(os.path.expandvars(data.root)).expanduser()


def _in_memory(pictures: PictureSet) -> Part:
    return Part(pictures.labels.numpy(), pictures.class_names, pictures.mean, pictures.std, pictures=pictures)


def _digits(data: DataSettings, part: str, of_model: ClassNames) -> Part:
    return _in_memory(load_digits(part, data.image_size))


def _cifar(data: DataSettings, part: str, of_model: ClassNames) -> Part:
    return _in_memory(load_cifar(data.name, data_root(data), part))


def _statistics(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,) * channels,) * 2


def _files(data: DataSettings, part: str, of_model: ClassNames) -> Part:
    """Classes are numbered by the model that will read the files, else by the training part."""
    archive = data.name == "tar"
    reader = TarPictures if archive else PictureFiles
    root = data_root(data)
    numbering, numbered_by = None, "training part"
    if of_model:
        numbering, numbered_by = {name: number for number, name in enumerate(of_model)}, "model"
    elif part != "train":
        numbering = reader(part_root(root, "train", archive), data.channels).class_to_index
    files = reader(part_root(root, part, archive), data.channels, numbering, numbered_by)
    return Part(files.labels, files.class_names, *_statistics(data.channels), samples=files)


def _shards(data: DataSettings, part: str, of_model: ClassNames) -> Part:
    """Classes have numbers already; their names are those of classes.txt, of the model, or the numbers."""
    root = data_root(data)
    found = ShardPictures(root, data.train_shards if part == "train" else data.test_shards, data.channels)
    names, source = class_names(root), "in classes.txt"
    if of_model and (names is None or are_numbers(of_model)):
        names, source = of_model, "of the model"
    if names is None:  # the training part says how many classes there are
        train = found if part == "train" else ShardPictures(root, data.train_shards, data.channels)
        names, source = tuple(str(n) for n in range(int(train.labels.max()) + 1)), "in the training part"
    if int(found.labels.max()) >= len(names):
        raise ValueError(
            f"{root}: the {part} part has class number {found.labels.max()}, expected 0 to {len(names) - 1}, as many "
            f"as there are classes {source}"
        )
    return Part(found.labels, names, *_statistics(data.channels), samples=found)


SOURCES: dict[str, Callable[[DataSettings, str, ClassNames], Part]] = {
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


def load_part(data: DataSettings, part: str, of_model: ClassNames = ()) -> Part:
    """The "train" or "test" part of a picture set as it lies on disk.

    Args:
        of_model: class names of the model that will read it; they number the classes of files; (): not known.

    Raises:
        ValueError: unknown data set, missing or damaged files, channels or statistics that do not fit, or classes in
            files that the model lacks.
    """
    if data.name not in SOURCES:
        known = [*SOURCES, *event_names()]
        hint = next(iter(get_close_matches(data.name, known, n=1)), None)
        raise ValueError(
            f"data.name: got {data.name!r}"
            + (f"; did you mean {hint!r}?" if hint else ".")
            + f" Known: {', '.join(known)}."
        )
    found = SOURCES[data.name](data, part, of_model)
    if len(found.mean) != data.channels:
        raise ValueError(
            f"data.channels: got {data.channels}, {data.name} has {len(found.mean)}: set "
            f"data.channels={len(found.mean)}, or choose other data"
        )
    mean, std = data.mean or found.mean, data.std or found.std
    for name, value in (("mean", mean), ("std", std)):
        if len(value) != data.channels:
            raise ValueError(
                f"data.{name}: {len(value)} values for data.channels={data.channels}: give {data.channels}, "
                f"or null for {data.name}'s own"
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
