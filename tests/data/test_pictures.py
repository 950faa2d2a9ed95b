"""Picture sets, draws, augmentation, mixing, order of samples."""

import hashlib
import os
import pickle

import numpy as np
import pytest
import torch
from timm.data.mixup import Mixup

from spikingformer.data import cifar
from spikingformer.data.batched import BatchedAugment
from spikingformer.data.cifar import CifarFiles, load_cifar
from spikingformer.data.digits import load_digits
from spikingformer.data.loading import PictureSamples
from spikingformer.data.mixing import mix_batch, soft_targets
from spikingformer.data.per_sample import evaluation_transform
from spikingformer.data.pictures import PictureSet
from spikingformer.data.rand_augment import _OPERATIONS, parse_rand_augment
from spikingformer.data.randomness import derive_seed, normal, seeded_generators, uniform
from spikingformer.data.sampling import StepPlan, evaluation_batches
from spikingformer.data.settings import AugmentSettings, DataSettings, MixSettings
from spikingformer.data.sources import Part
from spikingformer.training.distributed import World
from spikingformer.training.inputs import evaluation_loader

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


def augment(size: int = 16, **changes: object) -> BatchedAugment:
    return BatchedAugment(AugmentSettings(engine="batched", **changes), size, "bilinear", MEAN, STD, seed=7)


EVERYTHING = {
    "crop_padding": 2,
    "crop_scale": (0.5, 1.0),
    "crop_ratio": (0.75, 1.33),
    "rand_augment": "rand-m9-n2-mstd0.5-inc1",
    "erase_probability": 0.5,
}


def pictures(count: int = 32, size: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_digits_are_split_once_by_class():
    train, test = load_digits("train", 16), load_digits("test", 16)
    assert (len(train), len(test)) == (1438, 359)
    assert train.pictures.shape[1:] == (1, 16, 16)
    assert test.labels.bincount().min() >= 35
    with pytest.raises(ValueError, match="use 8 or more"):
        load_digits("train", 4)


def test_draws_are_uniform_normal_and_depend_on_all_parts():
    draws = uniform(1, np.arange(100_000), 3)
    assert 0 <= draws.min() < draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.005  # five standard errors
    assert abs(np.corrcoef(draws, uniform(1, np.arange(100_000), 4))[0, 1]) < 0.016
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.016
    gauss = normal(1, np.arange(100_000), 3)
    assert abs(gauss.mean()) < 0.016
    assert abs(gauss.std() - 1) < 0.012
    assert len({derive_seed(1, 2), derive_seed(2, 1), derive_seed(1), derive_seed(1, 2, 0)}) == 4


def test_global_generators_come_back():
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    first = torch.rand(1)
    with seeded_generators(5):
        inside = torch.rand(1)
    assert torch.equal(torch.cat([first, torch.rand(1)]), expected)
    with seeded_generators(5):
        assert torch.equal(torch.rand(1), inside)


@pytest.mark.parametrize("part", [slice(0, 32), slice(5, 6), slice(10, 31, 3)], ids=["all", "one", "some"])
def test_a_sample_is_augmented_alike_in_any_batch(part):
    x, indices = pictures(), np.arange(100, 132)
    whole = augment(**EVERYTHING)(x, indices, epoch=3)
    torch.testing.assert_close(augment(**EVERYTHING)(x[part], indices[part], epoch=3), whole[part], rtol=0, atol=1e-5)
    assert not torch.allclose(augment(**EVERYTHING)(x, indices, epoch=4), whole)


def test_without_augmentation_only_normalised():
    x = pictures(4)
    found = augment(flip=0.0)(x, np.arange(4), 0)
    expected = (x.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(found, expected)


def test_flip_mirrors():
    x = pictures(4)
    flipped, plain = augment(flip=1.0)(x, np.arange(4), 0), augment(flip=0.0)(x, np.arange(4), 0)
    assert torch.equal(flipped, plain.flip(3))


def test_shift_moves_by_whole_pixels():
    x = pictures(64)
    shifted = augment(flip=0.0, crop_padding=2)(x, np.arange(64), 0)
    plain = augment(flip=0.0)(x, np.arange(64), 0)
    places = set()
    for one, original in zip(shifted, plain, strict=True):
        found = [
            (dy, dx)
            for dy in range(-2, 3)
            for dx in range(-2, 3)
            if torch.equal(
                one[:, max(0, -dy) : 16 - max(0, dy), max(0, -dx) : 16 - max(0, dx)],
                original[:, max(0, dy) : 16 - max(0, -dy), max(0, dx) : 16 - max(0, -dx)],
            )
        ]
        assert len(found) == 1
        places.add(found[0])
    assert len(places) > 10


@pytest.mark.parametrize("name", sorted(_OPERATIONS))
@pytest.mark.parametrize("channels", [1, 3])
def test_operation_keeps_range_and_does_something_at_full_level(name, channels):
    x = (pictures()[:, :channels].float() / 255 * 0.8 + 0.1).clone()
    fill = torch.full((channels, 1, 1), 0.5)
    level, sign = np.full(32, 9.0), np.where(np.arange(32) % 2, 1.0, -1.0)
    found = _OPERATIONS[name](x.clone(), level, sign, fill)
    assert found.shape == x.shape
    assert -1e-5 <= found.min() <= found.max() <= 1 + 1e-5
    if not (name == "color" and channels == 1):
        assert not torch.allclose(found, x)


@pytest.mark.parametrize(
    ("name", "timm_name"),
    [
        ("brightness", "Brightness"),
        ("contrast", "Contrast"),
        ("color", "Color"),
        ("invert", "Invert"),
        ("auto_contrast", "AutoContrast"),
        ("equalize", "Equalize"),
        ("sharpness", "Sharpness"),
    ],
)
def test_operation_agrees_with_pillow(name, timm_name):
    """Pillow rounds to whole grey levels and weighs colours in integers: two levels of 255 apart at most."""
    from PIL import Image
    from timm.data.auto_augment import NAME_TO_OP

    x = pictures(1)
    level, sign = np.array([5.0]), np.array([-1.0])
    found = _OPERATIONS[name](x.float() / 255, level, sign, torch.zeros(3, 1, 1))[0]
    arguments = (0.55,) if name in ("brightness", "contrast", "color", "sharpness") else ()
    picture = NAME_TO_OP[timm_name](Image.fromarray(x[0].permute(1, 2, 0).numpy()), *arguments)
    expected = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    assert (found - expected).abs().max() <= 2.01 / 255


def test_erased_share_and_noise():
    x = torch.zeros(400, 3, 16, 16, dtype=torch.uint8)
    found = augment(flip=0.0, erase_probability=0.25)(x, np.arange(400), 0)
    plain = augment(flip=0.0)(x, np.arange(400), 0)
    changed = (found != plain).flatten(1).any(1)
    assert 60 < changed.sum() < 140
    assert 0.01 < (found != plain)[changed].float().mean() < 0.4


@pytest.mark.parametrize("text", ["rand-m9-n2-mstd0.5", "auto-v0", "rand-m9-q3-inc1"])
def test_rand_augment_string_is_checked(text):
    with pytest.raises(ValueError, match="augment.rand_augment: got"):
        parse_rand_augment(text)


def test_mixup_is_timms_for_the_same_weight(monkeypatch):
    x, labels = torch.randn(6, 3, 8, 8), torch.arange(6)
    mixup = Mixup(mixup_alpha=0.5, label_smoothing=0.1, num_classes=10)
    settings = MixSettings(mixup_alpha=0.5)
    mixed, targets = mix_batch(x, soft_targets(labels, 10, 0.1), settings, 1, 2, 3)
    kept = float((targets[0, 0] - 0.01) / 0.9)
    monkeypatch.setattr(mixup, "_params_per_batch", lambda: (kept, False))
    expected, expected_targets = mixup(x.clone(), labels)
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(targets, expected_targets, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (4, 5, 2, 8, 8)], ids=["pictures", "event-frames"])
def test_cutmix_cuts_a_box_of_pixels_never_channels(shape):
    x = torch.arange(4.0).view(-1, *[1] * (len(shape) - 1)).expand(shape).clone()
    settings = MixSettings(cutmix_alpha=1.0)
    for step in range(20):
        mixed, targets = mix_batch(x, soft_targets(torch.arange(4), 4, 0.0), settings, 0, 0, step)
        planes = (mixed[0] != 0).reshape(-1, 8, 8)
        assert (planes == planes[0]).all()
        assert targets[0, 3] == pytest.approx(float(planes[0].float().mean()))


def test_mixing_stops_at_its_epoch_and_is_fixed_by_the_position():
    x, targets = torch.randn(4, 1, 8, 8), torch.eye(4)
    settings = MixSettings(mixup_alpha=0.5, off_epoch=2)
    assert mix_batch(x, targets, settings, 0, 2, 0)[0] is x
    assert torch.equal(mix_batch(x, targets, settings, 0, 1, 5)[0], mix_batch(x, targets, settings, 0, 1, 5)[0])
    assert not torch.equal(mix_batch(x, targets, settings, 0, 1, 5)[1], mix_batch(x, targets, settings, 0, 1, 6)[1])


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize(("samples", "drop_last"), [(103, True), (103, False), (101, False)])
def test_every_sample_is_dealt_once_over_processes(world, samples, drop_last):
    dealt = []
    for rank in range(world):
        plan = (
            StepPlan(samples, 10, 3, drop_last, 2, rank, world)
            if world < 4
            else StepPlan(samples, 10, 3, drop_last, 1, rank, world)
        )
        order = plan.order(0)
        for step in range(plan.steps_per_epoch):
            parts, whole = plan.parts(order, step)
            assert parts
            assert whole == min(10, samples - 10 * step)
            dealt += [int(i) for part in parts for i in part]
    assert len(dealt) == len(set(dealt))
    assert len(dealt) == (100 if drop_last or samples - 100 < world else samples)


def test_epochs_have_different_orders():
    plan = StepPlan(50, 10, 3)
    assert not np.array_equal(plan.order(0), plan.order(1))
    assert np.array_equal(plan.order(1), StepPlan(50, 5, 3).order(1))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_evaluation_counts_each_sample_once(world):
    seen = np.concatenate([rows for rank in range(world) for rows in evaluation_batches(11, 3, rank, world)])
    assert sorted(seen) == list(range(11))


@pytest.mark.parametrize(("interpolation", "crop"), [("bilinear", 0.8), ("bicubic", 0.8), ("nearest", 0.75)])
def test_a_set_in_memory_is_cropped_as_one_picture_is(interpolation, crop):
    """As `predict` crops: 12 / 0.8 = 15 pixels of 32, the middle 12 (nearest: 16, at 15 one centre lies between two
    pixels and rounding decides). Pillow rounds to bytes after each of two passes
    (half a step each), and values that reach neither end are not clipped on the way."""
    settings = DataSettings(name="cifar10", image_size=12, interpolation=interpolation, crop_fraction=crop)
    pixels = torch.randint(60, 190, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mean, std = (0.0,) * 3, (1.0,) * 3
    pictures = PictureSet(pixels, torch.arange(3), ("a", "b", "c"), mean, std)
    part = Part(pictures.labels.numpy(), pictures.class_names, mean, std, pictures)
    (batch,) = evaluation_loader(part, settings, 3, 0, torch.device("cpu"), World()).batches()
    transform = evaluation_transform(12, 3, interpolation, crop, mean, std)
    alone = torch.stack([transform(PictureSamples(pictures)[i][0]) for i in range(3)])
    torch.testing.assert_close(batch.inputs, alone, rtol=0, atol=1.5 / 255)


def test_batch_too_large_or_too_small_is_named():
    with pytest.raises(ValueError, match=r"batch_size: got 200, .*100 samples: no full batch"):
        StepPlan(100, 200, 0)
    with pytest.raises(ValueError, match="at least 6 is needed"):
        StepPlan(100, 4, 0, accumulation_steps=3, world_size=2)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/never-touched-by-a-data-file",)


def write_cifar(root, monkeypatch, content=None):
    """A two-file stand-in with its own table of checksums."""
    generator = np.random.default_rng(0)
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    entry = {"data": generator.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": [i % 2 for i in range(20)]}
    files = {
        "train": content or pickle.dumps(entry),
        "test": pickle.dumps(entry),
        "meta": pickle.dumps({"names": ["a", "b"]}),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    md5 = {name: hashlib.md5(data, usedforsecurity=False).hexdigest() for name, data in files.items()}
    table = CifarFiles(
        "cifar10",
        folder.name,
        {"train": md5["train"]},
        {"test": md5["test"]},
        ("meta", md5["meta"]),
        "labels",
        "names",
        MEAN,
        STD,
    )
    monkeypatch.setattr(cifar, "cifar_files", lambda name: table)
    return folder


def test_cifar_files_are_read(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch)
    found = load_cifar("cifar10", tmp_path, "train")
    assert found.pictures.shape == (20, 3, 32, 32)
    assert found.class_names == ("a", "b")


def test_changed_cifar_file_is_named_with_the_remedy(tmp_path, monkeypatch):
    folder = write_cifar(tmp_path, monkeypatch)
    (folder / "train").write_bytes((folder / "train").read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=r"train: damaged or not the official file: MD5(.|\n)*spikingformer data cifar10 --root"
    ):
        load_cifar("cifar10", tmp_path, "train")


def test_pickled_command_in_a_cifar_file_is_refused_even_with_the_right_checksum(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch, pickle.dumps({"data": Evil(), "labels": []}))
    with pytest.raises(ValueError, match=r"train: refused to load (posix|os).system; nothing was run"):
        load_cifar("cifar10", tmp_path, "train")


def test_missing_cifar_folder_says_what_to_run(tmp_path):
    with pytest.raises(ValueError, match=r"no folder .*cifar-10-batches-py(.|\n)*Run `spikingformer data cifar10"):
        load_cifar("cifar10", tmp_path, "train")
