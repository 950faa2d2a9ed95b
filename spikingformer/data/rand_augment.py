"""RandAugment (Cubuk et al. 2020) on a batch of tensors, with timm's operations, strengths and string format.

Pictures are float (B, C, H, W) in [0, 1]. Every draw depends on (seed, sample) alone.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from spikingformer.data.randomness import normal, uniform
from spikingformer.data.upload import constant, upload

_APPLY_PROBABILITY = 0.5  # timm applies each drawn operation with this probability
_MAX_LEVEL = 10.0


@dataclass(frozen=True)
class RandAugmentSpec:
    """magnitude 0..10, its standard deviation, and operations a picture."""

    magnitude: float
    deviation: float
    layers: int


def parse_rand_augment(text: str) -> RandAugmentSpec:
    """Reads timm's string. The batched engine has the increasing operation set only (inc1).

    Raises:
        ValueError: another string than rand-m<level>[-n<layers>][-mstd<deviation>]-inc1.
    """
    values = {"m": 10.0, "n": 2.0, "mstd": 0.0, "inc": 0.0}
    head, *parts = text.split("-")
    matches = [re.fullmatch(r"(mstd|m|n|inc)(\d+(?:\.\d+)?)", part) for part in parts]
    if head != "rand" or not all(matches):
        raise ValueError(f"augment.rand_augment: got {text!r}, expected such as rand-m9-n1-mstd0.5-inc1")
    values |= {match[1]: float(match[2]) for match in matches if match}
    if values["inc"] != 1:
        raise ValueError(
            f"augment.rand_augment: got {text!r}; augment.engine=batched needs ...-inc1 (or use per_sample)"
        )
    return RandAugmentSpec(values["m"], values["mstd"], int(values["n"]))


def affine_sample(pictures: torch.Tensor, matrices: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    """Samples each picture where its (2, 3) matrix sends the output grid ([-1, 1] coordinates); outside is `fill`."""
    matrices = upload(matrices, pictures.device).to(pictures.dtype)
    grid = F.affine_grid(matrices, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures - fill, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + fill


def _grey(x: torch.Tensor) -> torch.Tensor:
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    weights = constant((0.299, 0.587, 0.114), x.dtype, x.device).view(1, 3, 1, 1)  # ITU-R 601
    return (x * weights).sum(1, keepdim=True)


def _blend(base: torch.Tensor, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return (base + factor * (x - base)).clamp(0, 1)


def _autocontrast(x: torch.Tensor) -> torch.Tensor:
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp_min(1e-6), x)


def _equalize(x: torch.Tensor) -> torch.Tensor:
    from torchvision.transforms.v2.functional import equalize

    return equalize((x * 255).round().to(torch.uint8)).to(x.dtype) / 255


def _sharpness(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    kernel = constant((1, 1, 1, 1, 5, 1, 1, 1, 1), x.dtype, x.device).view(3, 3) / 13  # PIL's SMOOTH
    smooth = x.clone()
    smooth[..., 1:-1, 1:-1] = F.conv2d(x, kernel.expand(x.shape[1], 1, 3, 3), groups=x.shape[1])
    return _blend(smooth, x, factor)


def _shape(value: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return upload(value, like.device).to(like.dtype).view(-1, 1, 1, 1)


def _affine(rows: Callable[[np.ndarray, float], list]) -> Callable:
    def run(x: torch.Tensor, level: np.ndarray, sign: np.ndarray, fill: torch.Tensor) -> torch.Tensor:
        entries = rows(level * sign, x.shape[3] / x.shape[2])
        matrix = np.stack([np.broadcast_to(entry, level.shape) for entry in entries], 1).reshape(-1, 2, 3)
        return affine_sample(x, torch.from_numpy(matrix.astype(np.float32)), fill)

    return run


def _rotate_rows(level: np.ndarray, aspect: float) -> list:
    angle = np.deg2rad(level / _MAX_LEVEL * 30.0)
    return [np.cos(angle), -np.sin(angle) / aspect, 0.0, np.sin(angle) * aspect, np.cos(angle), 0.0]


# level in 0..10, sign +-1; the strengths are those of timm's "increasing" set
_OPERATIONS: dict[str, Callable[[torch.Tensor, np.ndarray, np.ndarray, torch.Tensor], torch.Tensor]] = {
    "auto_contrast": lambda x, level, sign, fill: _autocontrast(x),
    "equalize": lambda x, level, sign, fill: _equalize(x),
    "invert": lambda x, level, sign, fill: 1 - x,
    "rotate": _affine(_rotate_rows),
    "posterize": lambda x, level, sign, fill: _posterize(x, 4 - np.trunc(level / _MAX_LEVEL * 4)),
    "solarize": lambda x, level, sign, fill: torch.where(
        x * 255 < _shape(256 - np.minimum(256, np.trunc(level / _MAX_LEVEL * 256)), x), x, 1 - x
    ),
    "solarize_add": lambda x, level, sign, fill: torch.where(
        x * 255 < 128, (x + _shape(np.minimum(128, np.trunc(level / _MAX_LEVEL * 110)) / 255, x)).clamp_max(1), x
    ),
    "color": lambda x, level, sign, fill: _blend(_grey(x), x, _enhance(level, sign, x)),
    "contrast": lambda x, level, sign, fill: _blend(_grey(x).mean((2, 3), keepdim=True), x, _enhance(level, sign, x)),
    "brightness": lambda x, level, sign, fill: _blend(torch.zeros_like(x), x, _enhance(level, sign, x)),
    "sharpness": lambda x, level, sign, fill: _sharpness(x, _enhance(level, sign, x)),
    "shear_x": _affine(lambda level, aspect: [1.0, level / _MAX_LEVEL * 0.3 / aspect, 0.0, 0.0, 1.0, 0.0]),
    "shear_y": _affine(lambda level, aspect: [1.0, 0.0, 0.0, level / _MAX_LEVEL * 0.3 * aspect, 1.0, 0.0]),
    "translate_x": _affine(lambda level, aspect: [1.0, 0.0, level / _MAX_LEVEL * 0.9, 0.0, 1.0, 0.0]),
    "translate_y": _affine(lambda level, aspect: [1.0, 0.0, 0.0, 0.0, 1.0, level / _MAX_LEVEL * 0.9]),
}


def _enhance(level: np.ndarray, sign: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return _shape(np.maximum(0.1, 1.0 + sign * level / _MAX_LEVEL * 0.9), like)


def _posterize(x: torch.Tensor, bits: np.ndarray) -> torch.Tensor:
    step = _shape(2.0 ** (8 - bits), x)
    return torch.floor((x * 255).round() / step) * step / 255


def rand_augment(
    pictures: torch.Tensor, indices: np.ndarray, seed: int, spec: RandAugmentSpec, fill: torch.Tensor
) -> torch.Tensor:
    """Applies `spec.layers` drawn operations to each picture.

    Args:
        pictures: float (B, C, H, W) in [0, 1]; changed in place.
        indices: the samples' numbers (B,), which with `seed` fix every draw.
        fill: (C, 1, 1) colour for what moves in from outside.
    """
    names = list(_OPERATIONS)
    for layer in range(spec.layers):
        stream = 100 + 10 * layer
        chosen = (uniform(seed, indices, stream) * len(names)).astype(int)
        applied = uniform(seed, indices, stream + 1) < _APPLY_PROBABILITY
        sign = np.where(uniform(seed, indices, stream + 2) < 0.5, -1.0, 1.0)
        level = np.clip(spec.magnitude + spec.deviation * normal(seed, indices, stream + 3), 0.0, _MAX_LEVEL)
        for number, name in enumerate(names):
            members = np.flatnonzero(applied & (chosen == number))
            if len(members):
                rows = upload(members, pictures.device)
                pictures[rows] = _OPERATIONS[name](pictures[rows], level[members], sign[members], fill)
    return pictures
