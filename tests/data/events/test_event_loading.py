"""Event batches as the trainer takes them: equal after a resume and for any division into accumulation parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spikingformer.data.events import EventParts, load_event_parts
from spikingformer.data.events.augment import EventAugment
from spikingformer.data.events.event_set import split_validation
from spikingformer.data.events.loading import EventEvaluation, EventTraining
from spikingformer.data.sampling import StepPlan

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits() -> EventParts:
    return load_event_parts("digits_dvs", "", 4, frame_size=(16, 16))


def test_a_resumed_epoch_gives_the_same_batches(digits: EventParts) -> None:
    kept, held_out = split_validation(digits.train.labels, 0.1, seed=3)
    train = digits.train.subset(kept)
    assert len(train) + len(held_out) == len(digits.train)
    loader = EventTraining(train, StepPlan(len(train), 32, seed=3), EventAugment(), CPU)
    whole = [step.parts[0] for step in loader.steps(epoch=1, first_step=0)]
    assert len(whole) == loader.steps_per_epoch == len(train) // 32
    assert whole[0].inputs.shape == (32, 4, 2, 16, 16)
    resumed = next(iter(loader.steps(epoch=1, first_step=7))).parts[0]
    assert torch.equal(resumed.inputs, whole[7].inputs)
    assert torch.equal(resumed.labels, whole[7].labels)
    # the same samples dealt to two accumulation parts
    halves = EventTraining(train, StepPlan(len(train), 32, seed=3, accumulation_steps=2), EventAugment(), CPU)
    first = next(iter(halves.steps(epoch=1, first_step=7))).parts
    assert torch.equal(torch.cat([part.inputs for part in first]), whole[7].inputs)


def test_evaluation_sees_every_sample_once(digits: EventParts) -> None:
    frames = digits.test
    batches = [batch for rank in range(2) for batch in EventEvaluation(frames, 50, CPU, rank, 2).batches()]
    assert sum(len(batch.labels) for batch in batches) == len(frames)
    assert sum(float(batch.inputs.sum()) for batch in batches) == float(frames.gather(range(len(frames))).sum())


def test_windows_of_the_real_recordings(real_events_dir: Path, tmp_path: Path) -> None:
    parts = load_event_parts(
        "gesture", real_events_dir / "dvsgesture", 10, split="windows", frame_size=(64, 64), cache=tmp_path
    )
    assert (len(parts.train), len(parts.test)) == (220, 60)
    assert parts.train.class_names[8] == "air drums"
    assert parts.train.flip_swaps == ((1, 2), (3, 6), (4, 5))


def test_a_folder_without_the_data_set_says_which_command_helps(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"spikingformer data cifar10dvs --from"):
        load_event_parts("cifar10dvs", tmp_path, 4)


def test_unknown_data_set() -> None:
    with pytest.raises(ValueError, match="expected one of gesture, cifar10dvs, nmnist, digits_dvs"):
        load_event_parts("gestures", "", 4)
