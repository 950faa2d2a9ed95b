"""Batches of event frames for training and evaluation; the same whatever a run is resumed from."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from spikingformer.data.loading import Batch, EvaluationLoader, Step, TrainingLoader
from spikingformer.data.sampling import StepPlan, evaluation_batches
from spikingformer.data.upload import upload

from .augment import EventAugment, sample_generator
from .event_set import EventFrames


class EventTraining(TrainingLoader):
    """Batches gathered from the frame cache and augmented on the device; the draws of a sample depend on
    (seed, epoch, sample) alone, the subset of frames on the batch's first sample."""

    def __init__(self, data: EventFrames, plan: StepPlan, augment: EventAugment, device: torch.device) -> None:
        self.data, self.plan, self.augment, self.device = data, plan, augment, device
        self.steps_per_epoch = plan.steps_per_epoch

    def steps(self, epoch: int, first_step: int) -> Iterator[Step]:
        order = self.plan.order(epoch)
        for step in range(first_step, self.steps_per_epoch):
            parts, samples = self.plan.parts(order, step)
            batches = []
            for part in parts:
                frames, labels = self.data.batch(part)
                generators = [sample_generator(self.plan.seed, epoch, int(index)) for index in part]
                frames, labels = self.augment(upload(frames, self.device), upload(labels, self.device), generators)
                batches.append(Batch(frames, labels))
            yield Step(batches, samples)


class EventEvaluation(EvaluationLoader):
    """Every sample once, as it is."""

    def __init__(
        self, data: EventFrames, batch_size: int, device: torch.device, rank: int = 0, world_size: int = 1
    ) -> None:
        self.data, self.device = data, device
        self.samples = len(data)
        self.index_batches = evaluation_batches(len(data), batch_size, rank, world_size)

    def batches(self) -> Iterator[Batch]:
        for rows in self.index_batches:
            frames, labels = self.data.batch(rows)
            yield Batch(upload(frames, self.device), upload(labels, self.device))
