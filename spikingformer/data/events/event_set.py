"""Event data sets as PyTorch takes them: frames from the cache, one sample or a whole batch at once."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from .arrays import SensorSize
from .catalogue import CATALOGUE, list_samples
from .frame_cache import SHARD_SAMPLES, FrameFormat, Progress, build_frame_cache, default_cache_folder, open_frame_cache
from .frames import SplitBy
from .layouts import LayoutError
from .prepare import simulated_note


class EventFrames(Dataset[tuple[torch.Tensor, int]]):
    """Frames [T, 2, H, W] (float32 counts; channel 0 OFF, 1 ON) with labels.

    title        name to show; says "simulated" where the recordings are
    class_names  a name a label
    flip_swaps   pairs of labels that a horizontal flip turns into each other
    simulated    True if no camera took the recordings
    groups       a number a sample; samples of the same number show the same person
    """

    def __init__(
        self,
        shards: Sequence[NDArray[Any]],
        indices: NDArray[np.int64],
        labels: NDArray[np.int64],
        title: str,
        class_names: tuple[str, ...],
        flip_swaps: tuple[tuple[int, int], ...] = (),
        simulated: bool = False,
        groups: NDArray[np.int64] | None = None,
    ) -> None:
        self.title, self.class_names = title, class_names
        self.flip_swaps, self.simulated = flip_swaps, simulated
        self._shards = list(shards)
        self._starts = np.cumsum([0, *(len(shard) for shard in shards)])
        self._indices = np.asarray(indices, np.int64)
        self._all_labels = np.asarray(labels, np.int64)
        self._all_groups = np.arange(len(self._all_labels)) if groups is None else groups
        self.labels = torch.from_numpy(self._all_labels[self._indices])
        self.groups = self._all_groups[self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def frame_shape(self) -> tuple[int, int, int, int]:
        """(T, 2, H, W)"""
        return tuple(self._shards[0].shape[1:])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.gather([index])[0], int(self.labels[index])

    def gather(self, indices: Sequence[int] | NDArray[np.int64] | torch.Tensor) -> torch.Tensor:
        """Frames of a batch, [B, T, 2, H, W] float32, copied from the memory map in one pass."""
        batch = self._indices[np.asarray(indices, np.int64)]
        frames = np.empty((len(batch), *self.frame_shape), np.float32)
        for row, sample in enumerate(batch):
            shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
            frames[row] = self._shards[shard][sample - self._starts[shard]]
        return torch.from_numpy(frames)

    def batch(self, indices: Sequence[int] | NDArray[np.int64] | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """([B, T, 2, H, W] float32, labels [B] int64)"""
        return self.gather(indices), self.labels[torch.as_tensor(indices, dtype=torch.int64)]

    def subset(self, indices: Sequence[int] | NDArray[np.int64]) -> EventFrames:
        """The samples `indices` as a set of their own (same frames on disk)."""
        return EventFrames(
            self._shards,
            self._indices[np.asarray(indices, np.int64)],
            self._all_labels,
            self.title,
            self.class_names,
            self.flip_swaps,
            self.simulated,
            self._all_groups,
        )


class EventParts(NamedTuple):
    """Training and test part of a data set."""

    train: EventFrames
    test: EventFrames


def load_event_parts(
    name: str,
    root: str | Path,
    time_steps: int,
    split_by: SplitBy = "number",
    split: str = "published",
    frame_size: SensorSize | None = None,
    cache: str | Path | None = None,
    workers: int = 0,
    progress: Progress | None = None,
) -> EventParts:
    """The parts of an event data set, its frame cache built if it is not there.

    name        "gesture", "cifar10dvs", "nmnist", or "digits_dvs" (simulated in memory; root, cache are not used)
    root        folder that holds the unpacked data set
    time_steps  T frames a recording
    split       name of the division into parts, see CATALOGUE
    frame_size  (H, W) of the frames, at most the sensor's; None: the sensor's
    cache       folder for ready frames; None: beside the data, or in the user's cache folder
    progress    called with (samples done, all) while the cache is built; None: a line on stderr now and then
    Raises ValueError (LayoutError, EventFileError, FrameCacheError) with what to do.
    """
    if name == "digits_dvs":
        from .digits_dvs import load_digits_dvs

        return load_digits_dvs(time_steps, split_by, split, frame_size)
    if name not in CATALOGUE:
        known = ", ".join([*CATALOGUE, "digits_dvs"])
        raise ValueError(f"unknown event data set {name!r}; expected one of {known}.")
    row, root = CATALOGUE[name], Path(root)
    try:
        samples = list_samples(row, root, split)
    except LayoutError as error:
        advice = f"`spikingformer data {name} --from {root}` says what to download, checks and unpacks it."
        raise LayoutError(f"{error} {advice}") from None
    frame_format = FrameFormat(name, row.reader, row.sensor_size, frame_size or row.sensor_size, time_steps, split_by)
    folder = Path(cache) if cache else default_cache_folder(root)
    path = build_frame_cache(folder, samples, frame_format, root, workers, progress or _say_progress)
    shards, description = open_frame_cache(path)
    labels = np.array(description["labels"], np.int64)
    names = [sample.group or f"sample {i}" for i, sample in enumerate(samples)]
    groups = np.unique(names, return_inverse=True)[1]
    simulated = simulated_note(root) is not None
    title = f"{row.title} (simulated)" if simulated else row.title
    parts = []
    for part in ("train", "test"):
        chosen = np.array([i for i, sample in enumerate(samples) if sample.part == part], np.int64)
        parts.append(EventFrames(shards, chosen, labels, title, row.class_names, row.flip_swaps, simulated, groups))
    return EventParts(*parts)


def split_validation(
    labels: torch.Tensor, fraction: float, seed: int = 0, groups: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices (training, validation): the share `fraction` of every class held out, the same for the same seed.

    groups  a number a sample; samples of the same number stay together, so more or less may be held out (None: each
            sample for itself)
    Raises ValueError for another fraction than between 0 and 1, and where nothing can be held out.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"validation fraction is {fraction}; expected a number above 0 and below 1.")
    classes = labels.numpy()
    number = np.arange(len(classes)) if groups is None else np.unique(groups, return_inverse=True)[1]
    samples_of = np.split(np.argsort(number, kind="stable"), np.cumsum(np.bincount(number))[:-1])
    trained = np.bincount(classes)  # samples of each class that are left to train on
    held_out = np.zeros(len(classes), bool)
    tried: set[int] = set()
    draw = np.random.default_rng(seed)
    for label in range(len(trained)):
        members = np.flatnonzero(classes == label)
        count = math.ceil(len(members) * fraction) if len(members) > 1 else 0
        for group in number[draw.permutation(members)].tolist():
            if len(members) - trained[label] >= count:
                break
            if group in tried:
                continue
            tried.add(group)
            taken = np.bincount(classes[samples_of[group]], minlength=len(trained))
            if taken.sum() == 1 or (trained - taken)[taken > 0].all():  # else a class is left with nothing to train on
                held_out[samples_of[group]] = True
                trained -= taken
    if not held_out.any():
        raise ValueError(
            f"no group of recordings can be held out: {len(classes)} samples in {len(samples_of)} groups, and "
            "training needs samples of every class. Use more recordings, or data.validation_fraction=0."
        )
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _say_progress(done: int, total: int) -> None:
    """A line on stderr at every tenth of a long build."""
    tenth = max(1, total // 10)
    if total > 1000 and (done // tenth != (done - SHARD_SAMPLES) // tenth or done == total):
        print(f"building the frame cache: {done} of {total} recordings", file=sys.stderr, flush=True)
