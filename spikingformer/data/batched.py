"""Augmentation of a whole batch on the training device: shift, flip, resized crop, RandAugment, erasing."""

import numpy as np
import torch
import torch.nn.functional as F

from spikingformer.data.rand_augment import affine_sample, parse_rand_augment, rand_augment
from spikingformer.data.randomness import derive_seed, uniform
from spikingformer.data.settings import AugmentSettings
from spikingformer.data.upload import constant, upload

_SHIFT_X, _SHIFT_Y, _FLIP, _AREA, _RATIO, _PLACE_X, _PLACE_Y = range(7)
_ERASE, _ERASE_AREA, _ERASE_RATIO, _ERASE_X, _ERASE_Y = range(20, 25)


def normalise(pictures: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Float pictures (B, C, H, W) in [0, 1], less the mean, over the standard deviation."""
    offset, scale = (constant(tuple(v), pictures.dtype, pictures.device).view(-1, 1, 1) for v in (mean, std))
    return (pictures - offset) / scale


def resize(pictures: torch.Tensor, size: int, interpolation: str) -> torch.Tensor:
    """Float (B, C, H, W) -> (B, C, size, size), antialiased; unchanged when it has that size."""
    if pictures.shape[-2:] == (size, size):
        return pictures
    if interpolation == "nearest":
        return F.interpolate(pictures, size=(size, size), mode="nearest-exact")  # Pillow's: the pixel at the centre
    return F.interpolate(pictures, size=(size, size), mode=interpolation, align_corners=False, antialias=True).clamp(
        0, 1
    )


class BatchedAugment:
    """uint8 (B, C, H, W) -> normalised float32 (B, C, size, size), the same for a sample whatever its batch."""

    def __init__(
        self,
        settings: AugmentSettings,
        size: int,
        interpolation: str,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        seed: int,
    ) -> None:
        self.settings = settings
        self.size = size
        self.interpolation = interpolation
        self.mean = mean
        self.std = std
        self.seed = seed
        self.rand_augment = parse_rand_augment(settings.rand_augment) if settings.rand_augment else None

    def __call__(self, pictures: torch.Tensor, indices: np.ndarray, epoch: int) -> torch.Tensor:
        seed = derive_seed(self.seed, epoch)
        x = resize(pictures.float() / 255, self.size, self.interpolation)
        fill = constant(tuple(self.mean), x.dtype, x.device).view(-1, 1, 1)
        x = self._shift_and_flip(x, indices, seed)
        if self.settings.crop_scale != (1.0, 1.0) or self.settings.crop_ratio != (1.0, 1.0):
            x = self._resized_crop(x, indices, seed, fill)
        if self.rand_augment is not None:
            x = rand_augment(x, indices, seed, self.rand_augment, fill)
        x = normalise(x, self.mean, self.std)
        return self._erase(x, indices, seed) if self.settings.erase_probability > 0 else x

    def _shift_and_flip(self, x: torch.Tensor, indices: np.ndarray, seed: int) -> torch.Tensor:
        padding, size = self.settings.crop_padding, self.size
        positions = np.arange(size)[None]
        columns = np.repeat(positions, len(indices), 0)
        flipped = uniform(seed, indices, _FLIP) < self.settings.flip
        columns[flipped] = columns[flipped, ::-1]
        rows = np.repeat(positions, len(indices), 0)
        if padding:
            columns = columns + (uniform(seed, indices, _SHIFT_X) * (2 * padding + 1)).astype(int)[:, None]
            rows = rows + (uniform(seed, indices, _SHIFT_Y) * (2 * padding + 1)).astype(int)[:, None]
            x = F.pad(x, (padding,) * 4)
        device = x.device
        sample = torch.arange(len(indices), device=device).view(-1, 1, 1, 1)
        channel = torch.arange(x.shape[1], device=device).view(1, -1, 1, 1)
        row, column = upload(np.stack([rows, columns]), device)
        row, column = row[:, None, :, None], column[:, None, None, :]
        return x[sample, channel, row, column]

    def _resized_crop(self, x: torch.Tensor, indices: np.ndarray, seed: int, fill: torch.Tensor) -> torch.Tensor:
        low, high = self.settings.crop_scale
        area = low + (high - low) * uniform(seed, indices, _AREA)
        log_low, log_high = np.log(self.settings.crop_ratio)
        ratio = np.exp(log_low + (log_high - log_low) * uniform(seed, indices, _RATIO))
        width, height = np.minimum(1, np.sqrt(area * ratio)), np.minimum(1, np.sqrt(area / ratio))
        left = (1 - width) * (2 * uniform(seed, indices, _PLACE_X) - 1)
        top = (1 - height) * (2 * uniform(seed, indices, _PLACE_Y) - 1)
        zero = np.zeros_like(width)
        matrix = np.stack([width, zero, left, zero, height, top], 1).reshape(-1, 2, 3).astype(np.float32)
        return affine_sample(x, torch.from_numpy(matrix), fill)

    def _erase(self, x: torch.Tensor, indices: np.ndarray, seed: int) -> torch.Tensor:
        """Random erasing (Zhong et al. 2020): one box of 2-33 % of the area, aspect 0.3-3.3, filled with noise."""
        members = np.flatnonzero(uniform(seed, indices, _ERASE) < self.settings.erase_probability)
        if not len(members):
            return x
        chosen, size = indices[members], self.size
        area = (0.02 + (1 / 3 - 0.02) * uniform(seed, chosen, _ERASE_AREA)) * size * size
        ratio = np.exp(np.log(0.3) * (1 - 2 * uniform(seed, chosen, _ERASE_RATIO)))
        height = np.clip(np.round(np.sqrt(area * ratio)), 1, size)
        width = np.clip(np.round(np.sqrt(area / ratio)), 1, size)
        top = np.floor(uniform(seed, chosen, _ERASE_Y) * (size - height + 1))
        left = np.floor(uniform(seed, chosen, _ERASE_X) * (size - width + 1))
        position = np.arange(size)
        inside_rows = (position >= top[:, None]) & (position < (top + height)[:, None])
        inside_columns = (position >= left[:, None]) & (position < (left + width)[:, None])
        box = upload(inside_rows[:, None, :, None] & inside_columns[:, None, None, :], x.device)
        noise = torch.stack(
            [
                torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(derive_seed(seed, int(i))))
                for i in chosen
            ]
        )
        rows = upload(members, x.device)
        x[rows] = torch.where(box, upload(noise, x.device), x[rows])
        return x
