"""The event data sets, one row each: classes, sensor, official files, divisions into training and test part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .archives import Archive
from .arrays import SensorSize
from .layouts import (
    GESTURE_WINDOW_US,
    cifar10dvs_first_hundred,
    cifar10dvs_published,
    gesture_samples,
    gesture_windows,
    nmnist_listed,
    nmnist_samples,
)
from .samples import EventSample

ListSamples = Callable[[Path, tuple[str, ...]], list[EventSample]]


@dataclass(frozen=True)
class EventDataset:
    """One data set.

    splits       name -> function that lists the samples; the first one is the default
    counts       split -> (training, test) samples of the complete data set
    flip_swaps   pairs of labels that a horizontal flip turns into each other
    window_us    split -> length of a sample, for splits that cut recordings into windows
    how_to_get   where the files are and what must be done to get them
    """

    name: str
    title: str
    sensor_size: SensorSize
    class_names: tuple[str, ...]
    reader: str
    splits: Mapping[str, ListSamples]
    counts: Mapping[str, tuple[int, int]]
    archives: tuple[Archive, ...]
    how_to_get: str
    licence: str
    citation: str
    flip_swaps: tuple[tuple[int, int], ...] = ()
    window_us: Mapping[str, int] = field(default_factory=dict)


_CIFAR10DVS_FILES = {
    "airplane": ("7712788", "0afd5c4bf9ae06af762a77b180354fdd"),
    "automobile": ("7712791", "8438dfeba3bc970c94962d995b1b9bdd"),
    "bird": ("7712794", "a9c207c91c55b9dc2002dc21c684d785"),
    "cat": ("7712812", "52c63c677c2b15fa5146a8daf4d56687"),
    "deer": ("7712815", "b6bf21f6c04d21ba4e23fc3e36c8a4a3"),
    "dog": ("7712818", "f379ebdf6703d16e0a690782e62639c3"),
    "frog": ("7712842", "cad6ed91214b1c7388a5f6ee56d08803"),
    "horse": ("7712851", "e7cbbf77bec584ffbf913f00e682782a"),
    "ship": ("7712836", "41c7bd7d6b251be82557c6cce9a7d5c9"),
    "truck": ("7712839", "89f3922fd147d9aeff89e76a2b0b70a7"),
}

_ROWS = (
    EventDataset(
        name="gesture",
        title="DVS128 Gesture",
        sensor_size=(128, 128),
        class_names=(
            "hand clapping",
            "right hand wave",
            "left hand wave",
            "right arm clockwise",
            "right arm counter-clockwise",
            "left arm clockwise",
            "left arm counter-clockwise",
            "arm roll",
            "air drums",
            "air guitar",
            "other",
        ),
        reader="aedat31",
        splits={"published": gesture_samples, "windows": gesture_windows},
        window_us={"windows": GESTURE_WINDOW_US},
        counts={"published": (1176, 288)},
        archives=(Archive("DvsGesture.tar.gz", "8a5c71fb11e24e5ca5b11866ca6c00a1", "DvsGesture", 8 << 30),),
        how_to_get=(
            "IBM offers the files on its own page, http://research.ibm.com/dvsgesture (follow the download link "
            "there and accept the terms); they are not downloaded automatically. Put DvsGesture.tar.gz into DIR."
        ),
        licence="CC BY 4.0",
        citation="Amir et al., A Low Power, Fully Event-Based Gesture Recognition System, CVPR 2017",
        # right and left hand wave; right arm clockwise and left arm counter-clockwise; and the other way round
        flip_swaps=((1, 2), (3, 6), (4, 5)),
    ),
    EventDataset(
        name="cifar10dvs",
        title="CIFAR10-DVS",
        sensor_size=(128, 128),
        class_names=tuple(_CIFAR10DVS_FILES),
        reader="aedat20",
        splits={"published": cifar10dvs_published, "first_hundred": cifar10dvs_first_hundred},
        counts={"published": (9000, 1000), "first_hundred": (9000, 1000)},
        archives=tuple(
            Archive(f"{name}.zip", md5, name, 4 << 30, f"https://ndownloader.figshare.com/files/{file_id}")
            for name, (file_id, md5) in _CIFAR10DVS_FILES.items()
        ),
        how_to_get="Download the ten zips below from figshare and put them into DIR.",
        licence="CC BY 4.0",
        citation="Li et al., CIFAR10-DVS: An Event-Stream Dataset for Object Classification, Front. Neurosci. 2017",
    ),
    EventDataset(
        name="nmnist",
        title="N-MNIST",
        sensor_size=(34, 34),
        class_names=tuple("0123456789"),
        reader="nmnist",
        splits={"published": nmnist_samples, "slayer": nmnist_listed},
        counts={"published": (60000, 10000), "slayer": (100, 100)},
        archives=(
            Archive("Train.zip", "20959b8e626244a1b502305a9e6e2031", "Train", 4 << 30),
            Archive("Test.zip", "69ca8762b2fe404d9b9bad1103e97832", "Test", 1 << 30),
        ),
        how_to_get=(
            "Download Train.zip and Test.zip from https://www.garrickorchard.com/datasets/n-mnist "
            "(also Mendeley Data, doi:10.17632/468j46mzdv.1) and put them into DIR."
        ),
        licence="CC BY-SA 4.0",
        citation="Orchard et al., Converting Static Image Datasets to Spiking Neuromorphic Datasets, 2015",
    ),
)

CATALOGUE: dict[str, EventDataset] = {row.name: row for row in _ROWS}


def list_samples(data_set: EventDataset, root: Path, split: str) -> list[EventSample]:
    """All samples under `root`, in a fixed order. Raises ValueError (LayoutError, EventFileError) with what to do."""
    if split not in data_set.splits:
        raise ValueError(f"{data_set.title} has no split {split!r}; expected one of {', '.join(data_set.splits)}.")
    samples = data_set.splits[split](root, data_set.class_names)
    for part in ("train", "test"):
        if not any(sample.part == part for sample in samples):
            raise ValueError(f"{root}: the {split} split leaves no {part} sample of the {len(samples)} there.")
    return samples
