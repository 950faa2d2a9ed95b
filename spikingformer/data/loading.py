"""Batches for training and evaluation, the same whatever the workers and wherever a run is resumed."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from spikingformer.data.batched import BatchedAugment, normalise, resize
from spikingformer.data.folder import UnreadablePicture
from spikingformer.data.per_sample import Transform
from spikingformer.data.pictures import PictureSet
from spikingformer.data.randomness import derive_seed, seeded_generators
from spikingformer.data.sampling import StepPlan, evaluation_batches
from spikingformer.data.upload import upload


@dataclass(frozen=True)
class Batch:
    """inputs: float (B, C, H, W) or (B, T, C, H, W); labels: int64 (B,); unreadable: samples left out."""

    inputs: torch.Tensor
    labels: torch.Tensor
    unreadable: int = 0


@dataclass(frozen=True)
class Step:
    """This process's parts of one optimiser step, and the samples of the step over all processes."""

    parts: list[Batch]
    samples: int


class TrainingLoader(ABC):
    """Gives the steps of an epoch, from any of them on."""

    plan: StepPlan
    steps_per_epoch: int

    @abstractmethod
    def steps(self, epoch: int, first_step: int) -> Iterator[Step]:
        """The epoch's steps from `first_step`; nothing before it is loaded."""


class EvaluationLoader(ABC):
    """Every sample once, over all processes."""

    samples: int

    @abstractmethod
    def batches(self) -> Iterator[Batch]: ...


class ReportedEvaluation(EvaluationLoader):
    """Another loader's batches; `after_batch` is called when each has been worked on."""

    def __init__(self, loader: EvaluationLoader, after_batch: Callable[[], None]) -> None:
        self.loader, self.after_batch = loader, after_batch
        self.samples = loader.samples

    def batches(self) -> Iterator[Batch]:
        for batch in self.loader.batches():
            yield batch
            self.after_batch()


class MemoryTraining(TrainingLoader):
    """A set in memory, augmented a batch at a time on the device."""

    def __init__(self, data: PictureSet, plan: StepPlan, augment: BatchedAugment, device: torch.device) -> None:
        self.plan = plan
        self.augment = augment
        self.steps_per_epoch = plan.steps_per_epoch
        self.pictures, self.labels = data.pictures.to(device), data.labels.to(device)

    def steps(self, epoch: int, first_step: int) -> Iterator[Step]:
        order = self.plan.order(epoch)
        for step in range(first_step, self.steps_per_epoch):
            parts, samples = self.plan.parts(order, step)
            batches = []
            for part in parts:
                rows = upload(part, self.pictures.device)
                batches.append(Batch(self.augment(self.pictures[rows], part, epoch), self.labels[rows]))
            yield Step(batches, samples)


class MemoryEvaluation(EvaluationLoader):
    """A set in memory, resized, cropped and normalised a batch at a time on the device."""

    def __init__(
        self,
        data: PictureSet,
        size: int,
        interpolation: str,
        crop_fraction: float,
        batch_size: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.data = data
        self.size, self.resized, self.interpolation = size, int(size / crop_fraction), interpolation
        self.device = device
        self.samples = len(data)
        self.index_batches = evaluation_batches(len(data), batch_size, rank, world_size)

    def batches(self) -> Iterator[Batch]:
        from torchvision.transforms.functional import center_crop

        for rows in self.index_batches:
            chosen = torch.from_numpy(rows)
            x = resize(upload(self.data.pictures[chosen], self.device).float() / 255, self.resized, self.interpolation)
            x = center_crop(x, [self.size, self.size])
            yield Batch(normalise(x, self.data.mean, self.data.std), upload(self.data.labels[chosen], self.device))


class Samples(Protocol):
    """Numbered samples: a picture or frames (or why there is none) and a label."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, int]: ...


class SeededSamples(Dataset):
    """Reads and transforms sample (epoch, index) with generators seeded by (seed, epoch, index)."""

    def __init__(self, samples: Samples, transform: Transform | None, seed: int) -> None:
        self.samples = samples
        self.transform = transform
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor | UnreadablePicture, int]:
        epoch, index = key
        with seeded_generators(derive_seed(self.seed, epoch, index)):
            value, label = self.samples[index]
            if self.transform is not None and not isinstance(value, UnreadablePicture):
                value = self.transform(value)
        return value if isinstance(value, UnreadablePicture) else torch.as_tensor(value), int(label)


def collate(
    samples: Sequence[tuple[torch.Tensor | UnreadablePicture, int]],
) -> tuple[torch.Tensor | None, torch.Tensor, list]:
    """Stacks the readable samples; the unreadable ones come as a list."""
    unreadable = [value for value, _ in samples if isinstance(value, UnreadablePicture)]
    readable = [(value, label) for value, label in samples if not isinstance(value, UnreadablePicture)]
    inputs = torch.stack([value for value, _ in readable]) if readable else None
    return inputs, torch.tensor([label for _, label in readable], dtype=torch.int64), unreadable


class _Keys:
    """A batch sampler whose batches of (epoch, index) can be replaced between epochs (workers persist)."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, int]]] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Workers:
    """A DataLoader over SeededSamples that turns unreadable pictures into an error or a count."""

    def __init__(self, samples: SeededSamples, workers: int, device: torch.device, unreadable: str) -> None:
        self.keys = _Keys()
        self.device = device
        self.unreadable = unreadable
        self.loader = DataLoader(
            samples,
            batch_sampler=self.keys,  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=collate,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
        )

    def _loaded(self) -> Iterator[tuple[torch.Tensor | None, torch.Tensor, list[UnreadablePicture]]]:
        """The loader's batches; a reader process that died becomes an error that says so."""
        try:
            yield from self.loader
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise ValueError(
                f"a process that reads pictures has died ({str(error).splitlines()[0]}). Usually the machine ran "
                "out of memory: use a lower workers=N (0 reads in the main process), then continue with --resume."
            ) from None

    def run(self, batches: list[list[tuple[int, int]]]) -> Iterator[Batch]:
        self.keys.batches = batches
        for inputs, labels, unreadable in self._loaded():
            if unreadable and (self.unreadable == "stop" or inputs is None):
                first = unreadable[0]
                advice = "or set data.unreadable=skip to skip such files and count them."
                if self.unreadable == "skip":
                    advice = f"data.unreadable=skip would skip all {len(unreadable)} of a batch: is the data complete?"
                raise ValueError(
                    f"{first.file}: not a readable picture ({first.reason}). Replace or remove the file, {advice}"
                )
            assert inputs is not None  # else every sample was unreadable, which is an error above
            yield Batch(
                inputs.to(self.device, non_blocking=True).float(),
                labels.to(self.device, non_blocking=True),
                len(unreadable),
            )


class SampleTraining(TrainingLoader):
    """Samples read and transformed one at a time, in worker processes."""

    def __init__(
        self,
        samples: Samples,
        transform: Transform | None,
        plan: StepPlan,
        workers: int,
        device: torch.device,
        unreadable: str,
    ) -> None:
        self.plan = plan
        self.steps_per_epoch = plan.steps_per_epoch
        self._workers = _Workers(SeededSamples(samples, transform, plan.seed), workers, device, unreadable)

    def steps(self, epoch: int, first_step: int) -> Iterator[Step]:
        order = self.plan.order(epoch)
        planned = [self.plan.parts(order, step) for step in range(first_step, self.steps_per_epoch)]
        keys = [[(epoch, int(i)) for i in part] for parts, _ in planned for part in parts]
        batches = self._workers.run(keys)
        for parts, samples in planned:
            yield Step([next(batches) for _ in parts], samples)


class SampleEvaluation(EvaluationLoader):
    """Samples read and transformed one at a time, in worker processes."""

    def __init__(
        self,
        samples: Samples,
        transform: Transform | None,
        batch_size: int,
        workers: int,
        device: torch.device,
        unreadable: str,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.samples = len(samples)
        self.index_batches = evaluation_batches(len(samples), batch_size, rank, world_size)
        self._workers = _Workers(SeededSamples(samples, transform, 0), workers, device, unreadable)

    def batches(self) -> Iterator[Batch]:
        return self._workers.run([[(0, int(i)) for i in rows] for rows in self.index_batches])


class PictureSamples:
    """A set in memory as PIL pictures, for the per-sample transforms."""

    def __init__(self, data: PictureSet) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        array = self.data.pictures[index].permute(1, 2, 0).numpy()
        return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array), int(self.data.labels[index])


class Subset:
    """Some of the samples."""

    def __init__(self, samples: Samples, indices: np.ndarray) -> None:
        self.samples = samples
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.samples[int(self.indices[index])]
