"""Event augmentation: equal to torchvision's operations, the same for all frames, reproducible, labels swapped."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from torchvision.transforms import InterpolationMode

from spikingformer.data.events.augment import (
    OPERATIONS,
    EventAugment,
    random_frames,
    sample_generator,
    warp_nearest,
)
from spikingformer.data.events.catalogue import CATALOGUE
from spikingformer.data.mixing import mix_batch, soft_targets
from spikingformer.data.settings import MixSettings

GESTURE_SWAPS = CATALOGUE["gesture"].flip_swaps


def counts(batch: int = 6, steps: int = 3, size: int = 32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 20, (batch, steps, 2, size, size), generator=generator).float()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("degrees", [-30.0, -14.0, 2.0, 30.0])
def test_rotation_is_torchvisions(degrees: float) -> None:
    frames, angle = counts(1), math.radians(degrees)
    matrix = torch.tensor(
        [[[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]], dtype=torch.float64
    )
    ours = warp_nearest(frames, matrix, torch.zeros(1, 2, dtype=torch.float64))
    theirs = TF.rotate(frames[0], degrees, InterpolationMode.NEAREST, fill=0)
    # a source that lies within rounding of the border between two pixels may go either way (float32 there)
    assert (ours[0] == theirs).float().mean() > 0.995


@pytest.mark.parametrize("radians", [-0.3, 0.1, 0.3])
def test_shear_is_torchvisions(radians: float) -> None:
    frames = counts(1)
    matrix = torch.tensor([[[1.0, math.tan(radians)], [0.0, 1.0]]], dtype=torch.float64)
    ours = warp_nearest(frames, matrix, torch.zeros(1, 2, dtype=torch.float64))
    theirs = TF.affine(frames[0], 0, [0, 0], 1.0, [math.degrees(radians), 0.0], InterpolationMode.NEAREST, fill=0)
    assert (ours[0] == theirs).float().mean() > 0.995


@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_draw_a_sample_for_all_frames_and_channels(operation: str) -> None:
    frames = counts(8, steps=1).expand(-1, 4, -1, -1, -1).clone()
    frames[:, :, 1] = frames[:, :, 0]
    out, labels = EventAugment(flip=0.5, operations=(operation,))(frames, torch.arange(8), generator())
    assert out.shape == frames.shape
    assert (out == out[:, :1, :1]).all()
    assert labels.tolist() == list(range(8))
    if operation != "identity":
        assert not torch.equal(out, frames)
    assert set(out.unique().tolist()) <= {*frames.unique().tolist(), 0.0}  # counts stay counts


@pytest.mark.parametrize(("operation", "axis"), [("translate_x", -1), ("translate_y", -2)])
def test_shifts_are_whole_pixels_of_five_at_most(operation: str, axis: int) -> None:
    frames = torch.zeros(200, 1, 2, 32, 32)
    frames[:, :, :, 16, 16] = 7.0
    out, _ = EventAugment(flip=0.0, operations=(operation,))(frames, torch.zeros(200).long(), generator())
    other = -3 - axis
    moved = out[:, 0, 0].sum(other).argmax(-1) - 16
    assert (out[:, 0, 0].sum(axis)[:, 16] == 7).all()
    assert (int(moved.min()), int(moved.max())) == (-5, 5)


def test_cutout_erases_one_square_of_the_stated_area() -> None:
    out, _ = EventAugment(flip=0.0, operations=("cutout",))(
        torch.ones(300, 2, 2, 64, 64), torch.zeros(300).long(), generator()
    )
    erased = (out[:, 0, 0] == 0).sum((1, 2)).float() / 64**2
    assert 0.0 < float(erased.min()) < 0.01
    assert 0.09 < float(erased.max()) < 0.12
    sides = (out[:, 0, 0] == 0).any(1).sum(1), (out[:, 0, 0] == 0).any(2).sum(1)
    assert torch.equal(*sides)


def test_half_of_the_samples_are_flipped_and_no_other_label_changes() -> None:
    frames = torch.zeros(6000, 1, 2, 8, 8)
    frames[:, :, :, 0, 0] = 1.0
    flipped, labels = EventAugment(operations=(), flip_swaps=((0, 1),))(frames, torch.zeros(6000).long(), generator())
    assert abs(float(flipped[:, 0, 0, 0, 7].mean()) - 0.5) < 0.03
    assert torch.equal(flipped[:, 0, 0, 0, 7].long(), labels)


def test_same_generators_same_batch_whatever_the_batch_around_it() -> None:
    frames, labels = counts(6), torch.arange(6)
    augment = EventAugment()
    whole, _ = augment(frames, labels, [sample_generator(3, 7, i) for i in range(6)])
    for rows in ([4], [5, 0], [2, 3, 4]):
        part, _ = augment(frames[rows], labels[rows], [sample_generator(3, 7, i) for i in rows])
        assert torch.equal(part, whole[rows])
    other, _ = augment(frames, labels, [sample_generator(3, 8, i) for i in range(6)])
    assert not torch.equal(other, whole)
    assert torch.equal(augment(frames, labels, generator(5))[0], augment(frames, labels, generator(5))[0])
    assert torch.equal(frames, counts(6))  # the input is left as it was


def test_flip_swaps_left_and_right_gestures_unless_published() -> None:
    labels = torch.arange(11)
    augment = EventAugment(flip=1.0, operations=(), flip_swaps=GESTURE_SWAPS)
    frames, swapped = augment(counts(11), labels, generator())
    assert swapped.tolist() == [0, 2, 1, 6, 5, 4, 3, 7, 8, 9, 10]
    assert torch.equal(frames, counts(11).flip(-1))
    back = augment(frames, swapped, generator())
    assert back[1].tolist() == labels.tolist()
    published = EventAugment(flip=1.0, operations=())
    assert published(counts(11), labels, generator())[1].tolist() == labels.tolist()


def test_random_frames_are_a_sorted_subset_for_the_whole_batch() -> None:
    frames = torch.arange(16.0).view(1, 16, 1, 1, 1).expand(3, -1, 2, 4, 4)
    chosen = random_frames(frames, 10, generator())[:, :, 0, 0, 0]
    assert chosen.shape == (3, 10)
    assert (chosen.diff(dim=1) > 0).all()
    assert (chosen == chosen[:1]).all()
    out, _ = EventAugment(flip=0.0, operations=(), frames=5)(frames, torch.zeros(3).long(), generator())
    assert out.shape[1] == 5
    with pytest.raises(ValueError, match="a subset of 17 frames of 16"):
        random_frames(frames, 17, generator())


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_treats_time_and_polarity_alike(kind: str) -> None:
    frames = torch.zeros(2, 4, 2, 32, 32)
    frames[1] = 1.0
    settings = MixSettings(**{f"{kind}_alpha": 1.0})
    targets = soft_targets(torch.tensor([0, 1]), 2, 0.0)
    mixed, mixed_targets = mix_batch(frames, targets, settings, seed=1, epoch=0, step=0)
    assert (mixed == mixed[:, :1, :1]).all()  # never a cut through channels or frames
    assert 0 < float(mixed[0].mean()) < 1
    np.testing.assert_allclose(float(mixed[0].mean()), float(mixed_targets[0, 1]), atol=1e-6)  # float32 sums


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: EventAugment(operations=("shear",)), "unknown event augmentation 'shear'"),
        (lambda: EventAugment()(torch.zeros(2, 2, 8, 8), torch.zeros(2), generator()), r"expected \[B, T, 2, H, W\]"),
        (lambda: EventAugment()(counts(2), torch.zeros(2), [generator()]), "1 generators for 2 samples"),
    ],
    ids=["operation", "shape", "generators"],
)
def test_augment_errors(call, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()
