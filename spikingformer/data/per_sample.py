"""Transforms of one picture at a time, as the published runs use them: timm's and torchvision's, PIL in, tensor out."""

from collections.abc import Callable
from functools import partial

import torch
from PIL import Image, ImageOps

from spikingformer.data.settings import AugmentSettings, DataSettings

Transform = Callable[[Image.Image], torch.Tensor]


def training_transform(
    data: DataSettings, augment: AugmentSettings, mean: tuple[float, ...], std: tuple[float, ...]
) -> Transform:
    """Resized crop, shift, flip, RandAugment, normalise, erase; draws from the global generators."""
    from timm.data.auto_augment import rand_augment_transform
    from timm.data.random_erasing import RandomErasing
    from timm.data.transforms import RandomResizedCropAndInterpolation
    from torchvision import transforms as T

    size = data.image_size
    steps: list[Callable] = [
        RandomResizedCropAndInterpolation(
            size, augment.crop_scale, augment.crop_ratio, interpolation=data.interpolation
        )
    ]
    if augment.crop_padding:
        steps.append(T.RandomCrop(size, padding=augment.crop_padding))
    if augment.flip > 0:
        steps.append(T.RandomHorizontalFlip(augment.flip))
    if augment.rand_augment:
        fill = tuple(min(255, round(255 * value)) for value in mean)
        hints = {"translate_const": int(size * 0.45), "img_mean": fill}
        try:
            augmentation = rand_augment_transform(augment.rand_augment, hints)
        except (AssertionError, KeyError, ValueError):
            raise ValueError(
                f"augment.rand_augment: got {augment.rand_augment!r}, expected timm's form such as rand-m9-mstd0.5-inc1"
            ) from None
        for operation in augmentation.ops:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = posterize
        steps.append(augmentation)
    steps += [T.ToTensor(), T.Normalize(mean, std)]
    if augment.erase_probability > 0:
        steps.append(RandomErasing(augment.erase_probability, mode="pixel", device="cpu"))
    return T.Compose(steps)


def posterize(picture: Image.Image, bits: int, **_: object) -> Image.Image:
    """Keeps the upper bits of each value. 0 bits, timm's choice at magnitude 10, is black: Pillow 13 refuses it."""
    if bits >= 8:
        return picture
    return ImageOps.posterize(picture, bits) if bits > 0 else Image.new(picture.mode, picture.size)


def in_mode(picture: Image.Image, mode: str) -> Image.Image:
    """`picture` in Pillow's mode; a function of its own, for what reaches worker processes is pickled."""
    return picture.convert(mode)


def evaluation_transform(
    size: int | tuple[int, int],
    channels: int,
    interpolation: str,
    crop_fraction: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Transform:
    """Resize until the picture just covers size / crop_fraction, centre crop, normalise.

    size: the side of a square, or (rows, columns).
    """
    from timm.data.transforms import ResizeKeepRatio
    from torchvision import transforms as T

    rows, columns = (size, size) if isinstance(size, int) else size
    covered = int(rows / crop_fraction), int(columns / crop_fraction)
    modes = {"bilinear": T.InterpolationMode.BILINEAR, "bicubic": T.InterpolationMode.BICUBIC}
    mode = modes.get(interpolation, T.InterpolationMode.NEAREST)
    return T.Compose(
        [
            partial(in_mode, mode="L" if channels == 1 else "RGB"),
            # timm's own choice: the two round sides differently
            T.Resize(covered[0], mode) if rows == columns else ResizeKeepRatio(covered, interpolation=interpolation),
            T.CenterCrop((rows, columns)),
            T.ToTensor(),
            T.Normalize(mean, std),
        ]
    )
