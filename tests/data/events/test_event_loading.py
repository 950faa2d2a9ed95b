"""Event batches as the trainer takes them: equal after a resume and for any division into accumulation parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from spikingformer.data.events import EventParts, load_event_parts, write_aedat31
from spikingformer.data.events.augment import EventAugment
from spikingformer.data.events.event_set import split_validation
from spikingformer.data.events.loading import EventEvaluation, EventTraining
from spikingformer.data.sampling import StepPlan
from tests.data.events.event_recordings import random_events

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


def test_held_out_windows_are_of_people_that_training_does_not_see(tmp_path: Path) -> None:
    folder = tmp_path / "DvsGesture"
    folder.mkdir()
    users = range(1, 7)
    for user in users:
        write_aedat31(folder / f"user{user:02d}_led.aedat", random_events(400))
        rows = "1,0,400000\n2,500000,900000\n3,500000,900000\n" if user > 1 else "1,0,400000\n"
        (folder / f"user{user:02d}_led_labels.csv").write_text("class,startTime_usec,endTime_usec\n" + rows)
    names = [f"user{user:02d}_led.aedat\n" for user in users]
    (folder / "trials_to_train.txt").write_text("".join(names[:-1]))
    (folder / "trials_to_test.txt").write_text(names[-1])
    parts = load_event_parts("gesture", tmp_path, 2, split="windows", frame_size=(16, 16), cache=tmp_path)
    train = parts.train
    assert len(train) == 13 * 9  # windows of 200 ms every 25 ms
    kept, held_out = split_validation(train.labels, 0.2, 0, train.groups)
    assert sorted([*kept, *held_out]) == list(range(len(train)))
    trained, validated = train.subset(kept), train.subset(held_out)
    assert set(trained.groups).isdisjoint(validated.groups)
    assert len(set(train.groups)) == 5
    assert set(validated.labels.tolist()) == set(trained.labels.tolist()) == {0, 1, 2}
    with pytest.raises(ValueError, match="no group of recordings can be held out"):
        split_validation(train.labels, 0.2, 0, np.zeros(len(train), int))


def test_samples_that_belong_to_no_group_are_held_out_as_ever() -> None:
    labels = torch.tensor([0, 1, 0, 1, 2, 0, 1, 1, 0, 1])
    for groups in (None, np.arange(10)):
        assert [split_validation(labels, f, 3, groups)[1].tolist() for f in (0.3, 0.9)] == [
            [1, 5, 7, 8],
            [0, 1, 2, 3, 5, 6, 7, 8, 9],  # the only sample of class 2 is trained on
        ]


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
