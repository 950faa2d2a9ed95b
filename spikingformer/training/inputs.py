"""From a recipe to loaders: which set, in memory or by workers, for this process of all."""

from dataclasses import dataclass
from typing import Any

import torch

from spikingformer.data.batched import BatchedAugment
from spikingformer.data.class_numbers import are_numbers, check_class_count, check_class_names
from spikingformer.data.loading import (
    EvaluationLoader,
    MemoryEvaluation,
    MemoryTraining,
    PictureSamples,
    SampleEvaluation,
    SampleTraining,
    TrainingLoader,
)
from spikingformer.data.per_sample import evaluation_transform, training_transform
from spikingformer.data.sampling import StepPlan
from spikingformer.data.settings import DataSettings
from spikingformer.data.sources import Part, Parts, data_root, event_names, load_part, load_parts
from spikingformer.training.checkpoint import ModelInfo
from spikingformer.training.distributed import World
from spikingformer.training.first_on_machine import first_on_machine
from spikingformer.training.recipe import Recipe


@dataclass(frozen=True)
class Inputs:
    """Loaders, and what a model file must say about its input.

    validation: the part that chooses the best epoch; None: the test part does.
    """

    train: TrainingLoader
    validation: EvaluationLoader | None
    test: EvaluationLoader
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    kind: str

    def identity(self) -> dict[str, Any]:
        """What a resumed run compares: it must learn from the same data."""
        return {
            "class_names": list(self.class_names),
            "training_samples": self.train.plan.samples,
        }


def _plan(recipe: Recipe, samples: int, world: World) -> StepPlan:
    return StepPlan(
        samples, recipe.batch_size, recipe.seed, recipe.drop_last, recipe.accumulation_steps, world.rank, world.size
    )


def evaluation_loader(
    part: Part, data: DataSettings, batch_size: int, workers: int, device: torch.device, world: World
) -> EvaluationLoader:
    """Every sample of the part once, over all processes."""
    if part.pictures is not None:
        return MemoryEvaluation(
            part.pictures,
            data.image_size,
            data.interpolation,
            data.crop_fraction,
            batch_size,
            device,
            world.rank,
            world.size,
        )
    assert part.samples is not None
    transform = evaluation_transform(
        data.image_size, data.channels, data.interpolation, data.crop_fraction, part.mean, part.std
    )
    return SampleEvaluation(
        part.samples, transform, batch_size, workers, device, data.unreadable, world.rank, world.size
    )


def _picture_training(recipe: Recipe, part: Part, device: torch.device, world: World) -> TrainingLoader:
    data, augment, plan = recipe.data, recipe.augment, _plan(recipe, len(part), world)
    if augment.engine == "batched":
        if part.pictures is None:
            raise ValueError(
                f"augment.engine=batched needs a set that fits into memory; data.name={data.name} is read file by "
                "file: use augment.engine=per_sample"
            )
        batched = BatchedAugment(augment, data.image_size, data.interpolation, part.mean, part.std, recipe.seed)
        return MemoryTraining(part.pictures, plan, batched, device)
    samples = PictureSamples(part.pictures) if part.pictures is not None else part.samples
    assert samples is not None
    transform = training_transform(data, augment, part.mean, part.std)
    return SampleTraining(samples, transform, plan, recipe.workers, device, data.unreadable)


def _event_inputs(recipe: Recipe, device: torch.device, world: World) -> Inputs:
    from spikingformer.data.events.augment import OPERATIONS, EventAugment
    from spikingformer.data.events.catalogue import CATALOGUE
    from spikingformer.data.events.event_set import split_validation
    from spikingformer.data.events.loading import EventEvaluation, EventTraining

    data, augment = recipe.data, recipe.augment
    built = None
    if world.size > 1 and data.name in CATALOGUE:
        built = first_on_machine(world, lambda: load_events(data, recipe.workers))
    train, test = built or load_events(data)
    validation = None
    if data.validation_fraction > 0:
        kept, held_out = split_validation(train.labels, data.validation_fraction, recipe.seed, train.groups)
        train, validation = train.subset(kept), train.subset(held_out)
    event_augment = EventAugment(
        flip=augment.flip,
        flip_swaps=train.flip_swaps if augment.flip_swaps_labels else (),
        operations=OPERATIONS if augment.events == "published" else (),
        frames=augment.train_frames,
    )
    size, channels = recipe.evaluation_batch_size, data.channels
    return Inputs(
        EventTraining(train, _plan(recipe, len(train), world), event_augment, device),
        None if validation is None else EventEvaluation(validation, size, device, world.rank, world.size),
        EventEvaluation(test, size, device, world.rank, world.size),
        tuple(train.class_names),
        (0.0,) * channels,
        (1.0,) * channels,
        "events",
    )


def load_events(data: DataSettings, workers: int = 0):
    """Training and test part of an event set; its frame cache is built, by `workers` processes, if there is none."""
    from spikingformer.data.events.event_set import load_event_parts

    if data.channels != 2:
        raise ValueError(
            f"data.channels: got {data.channels}, {data.name} has event frames with 2 (OFF, ON): set data.channels=2, "
            "or choose a data set of pictures"
        )
    return load_event_parts(
        data.name,
        data_root(data),
        data.frames,
        data.split_by,
        data.split,
        (data.image_size, data.image_size),
        data.cache,
        workers,
    )


def create_inputs(recipe: Recipe, device: torch.device, world: World) -> Inputs:
    """Loaders of a run.

    Raises:
        ValueError: data missing or damaged, or settings that do not fit it.
    """
    if recipe.data.name in event_names():
        return _event_inputs(recipe, device, world)
    parts: Parts = load_parts(recipe.data, recipe.seed)

    def evaluation(part: Part) -> EvaluationLoader:
        return evaluation_loader(part, recipe.data, recipe.evaluation_batch_size, min(recipe.workers, 2), device, world)

    return Inputs(
        _picture_training(recipe, parts.train, device, world),
        None if parts.validation is None else evaluation(parts.validation),
        evaluation(parts.test),
        parts.train.class_names,
        parts.train.mean,
        parts.train.std,
        "pictures",
    )


def class_names_of(info: ModelInfo) -> tuple[str, ...]:
    """The names that a model file gives its classes; (): it does not name them, or not each by another name.

    A file that was converted without names has "0", "1", ... in their place.
    """
    names = info.class_names
    unnamed = are_numbers(names) and info.source != "trained"
    return () if unnamed or len(set(names)) != info.kwargs.get("num_classes") else names


def create_test_loader(
    data: DataSettings,
    batch_size: int,
    workers: int,
    device: torch.device,
    world: World,
    of_model: tuple[str, ...] = (),
    classes: int | None = None,
) -> tuple[EvaluationLoader, tuple[str, ...]]:
    """The test part alone, for `evaluate`, and its class names; every label is a number of one of them.

    Args:
        of_model: the model's class names, which number the classes of files; (): not known.
        classes: how many classes the model has; None: as many as the data.

    Raises:
        ValueError: data missing or damaged, or of other classes than the model.
    """
    loader, names = _test_part(data, batch_size, workers, device, world, of_model)
    if of_model:
        check_class_names(names, of_model, data.name)
    if classes is not None:
        check_class_count(len(names), classes, data.name)
    return loader, names


def _test_part(
    data: DataSettings, batch_size: int, workers: int, device: torch.device, world: World, of_model: tuple[str, ...]
) -> tuple[EvaluationLoader, tuple[str, ...]]:
    if data.name in event_names():
        from spikingformer.data.events.loading import EventEvaluation

        _, test = load_events(data)
        return EventEvaluation(test, batch_size, device, world.rank, world.size), tuple(test.class_names)
    part = load_part(data, "test", of_model)
    return evaluation_loader(part, data, batch_size, workers, device, world), part.class_names
