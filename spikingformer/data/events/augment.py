"""Augmentation of event frames on whole batches [B, T, 2, H, W]; one draw a sample, the same for all its frames.

Every random number comes from the generator that is passed in, a fixed number of them a sample, in sample order: the
same generator state gives the same batch. sample_generator makes one from (seed, epoch, sample), so that a resumed run
draws what an unbroken one draws. Mixup and soft targets are those of spikingformer.data.mixing (event frames too).

The published augmentation: a horizontal flip (p = 0.5), then one of six with equal probability (neuromorphic data
augmentation, Li et al., ECCV 2022): nothing, shear, shift in x, shift in y, rotation, cutout; nearest neighbour; 0
moves in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spikingformer.data.randomness import derive_seed
from spikingformer.data.upload import upload

OPERATIONS = ("identity", "shear_x", "translate_x", "translate_y", "rotate", "cutout")
_DRAWS = 7  # uniform numbers a sample: flip, operation, magnitude, sign, area, box row, box column
_BINS = 31  # magnitudes are steps of a linspace of 31, as published


@dataclass(frozen=True)
class EventAugment:
    """What is done to a batch; the defaults are the published strengths.

    flip                probability of a horizontal flip
    flip_swaps          pairs of labels that a flip turns into each other; () keeps the labels, as published
    operations          which of OPERATIONS to choose from, each with equal probability; () = none
    max_shear           radians
    max_shift           pixels
    max_rotation        degrees
    cutout_area         least and largest erased share of the frame
    frames              0: all T frames; n: a sorted random subset of n frames, the same for the whole batch
    """

    flip: float = 0.5
    flip_swaps: tuple[tuple[int, int], ...] = ()
    operations: tuple[str, ...] = OPERATIONS
    max_shear: float = 0.3
    max_shift: float = 5.0
    max_rotation: float = 30.0
    cutout_area: tuple[float, float] = (0.001, 0.11)
    frames: int = 0

    def __post_init__(self) -> None:
        unknown = [name for name in self.operations if name not in OPERATIONS]
        if unknown:
            raise ValueError(f"unknown event augmentation {unknown[0]!r}; expected some of {', '.join(OPERATIONS)}.")
        if not 0 <= self.flip <= 1 or self.frames < 0:
            raise ValueError(f"flip is {self.flip}, frames {self.frames}; expected 0 to 1, and at least 0.")

    def __call__(
        self, frames: Tensor, labels: Tensor, generator: torch.Generator | Sequence[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        """Augmented (frames [B, T or `frames`, 2, H, W], labels [B]); the input is not changed.

        generator  one for the batch, or one for each sample (sample_generator), on the CPU
        """
        if frames.ndim != 5 or len(labels) != len(frames) or labels.ndim != 1:
            raise ValueError(
                f"got frames {tuple(frames.shape)} and labels {tuple(labels.shape)}; expected [B, T, 2, H, W] and [B]."
            )
        if isinstance(generator, torch.Generator):
            draws = torch.rand((len(frames), _DRAWS), generator=generator, dtype=torch.float64)
        else:
            if len(generator) != len(frames):
                raise ValueError(f"got {len(generator)} generators for {len(frames)} samples; expected one each.")
            draws = torch.stack([torch.rand(_DRAWS, generator=g, dtype=torch.float64) for g in generator])
        if self.frames:
            first = generator if isinstance(generator, torch.Generator) else generator[0]
            frames = random_frames(frames, self.frames, first)
        flipped = draws[:, 0] < self.flip
        frames = torch.where(_over_batch(flipped, frames), frames.flip(-1), frames)
        labels = swap_labels(labels, flipped, self.flip_swaps)
        if self.operations:
            frames = self._one_of(frames, draws[:, 1:])
        return frames, labels

    def _one_of(self, frames: Tensor, draws: Tensor) -> Tensor:
        height, width = frames.shape[-2:]
        count = len(frames)
        choice = (draws[:, 0] * len(self.operations)).long()
        names = [self.operations[i] for i in choice.tolist()]
        # a linspace over -max..max and a random sign, as published
        magnitude = ((draws[:, 1] * _BINS).floor() * 2 / (_BINS - 1) - 1) * torch.where(draws[:, 2] < 0.5, 1.0, -1.0)
        matrices = torch.eye(2, dtype=torch.float64).repeat(count, 1, 1)
        shifts = torch.zeros(count, 2, dtype=torch.float64)
        for i, name in enumerate(names):
            m = float(magnitude[i])
            if name == "shear_x":
                matrices[i, 0, 1] = math.tan(m * self.max_shear)
            elif name == "rotate":
                angle = math.radians(m * self.max_rotation)
                cosine, sine = math.cos(angle), math.sin(angle)
                matrices[i] = torch.tensor([[cosine, -sine], [sine, cosine]], dtype=torch.float64)
            elif name == "translate_x":
                shifts[i, 0] = -int(m * self.max_shift)
            elif name == "translate_y":
                shifts[i, 1] = -int(m * self.max_shift)
        moved = torch.tensor([name not in ("identity", "cutout") for name in names])
        out = frames
        if moved.any():
            rows = upload(moved.nonzero()[:, 0], frames.device)
            out = frames.index_copy(0, rows, warp_nearest(frames[rows], matrices[moved], shifts[moved]))
        erased = torch.tensor([name == "cutout" for name in names])
        if erased.any():
            low, high = self.cutout_area
            side = ((low + draws[:, 3] * (high - low)) * height * width).sqrt().round().long()
            side = side.clamp(max=min(height, width) - 1)
            top = (draws[:, 4] * (height - side + 1)).long()
            left = (draws[:, 5] * (width - side + 1)).long()
            out = out.masked_fill(upload(_boxes(erased, top, left, side, height, width), out.device), 0.0)
        return out


def sample_generator(seed: int, epoch: int, sample: int) -> torch.Generator:
    """A CPU generator that depends on these three numbers alone."""
    return torch.Generator().manual_seed(derive_seed(seed, epoch, sample))


def swap_labels(labels: Tensor, flipped: Tensor, flip_swaps: tuple[tuple[int, int], ...]) -> Tensor:
    """Labels [B] with both of each pair exchanged where `flipped` [B]."""
    out = labels.clone()
    flipped = upload(flipped, labels.device)
    for a, b in flip_swaps:
        out = torch.where(flipped & (labels == a), b, out)
        out = torch.where(flipped & (labels == b), a, out)
    return out


def random_frames(frames: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """A sorted random subset of `count` of the T frames, the same for the whole batch (published as T_train)."""
    total = frames.shape[1]
    if not 1 <= count <= total:
        raise ValueError(f"got a subset of {count} frames of {total}; expected 1 to {total}.")
    chosen = torch.randperm(total, generator=generator)[:count].sort().values
    return frames[:, upload(chosen, frames.device)]


def warp_nearest(frames: Tensor, matrices: Tensor, shifts: Tensor) -> Tensor:
    """Each sample read at matrix * (x, y) + shift around the frame's centre: nearest neighbour, 0 outside.

    frames [B, T, 2, H, W]; matrices [B, 2, 2] and shifts [B, 2] map output to input positions (x right, y down, pixels)
    """
    batch, steps, channels, height, width = frames.shape
    x = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    y = torch.arange(height, dtype=torch.float64) - (height - 1) / 2
    grid = torch.stack(torch.broadcast_tensors(x[None, :], y[:, None]), -1).reshape(1, -1, 2)
    source = grid @ matrices.mT + shifts[:, None]
    column = (source[..., 0] + (width - 1) / 2).round().long()
    row = (source[..., 1] + (height - 1) / 2).round().long()
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    index = upload(torch.where(inside, row * width + column, 0), frames.device)
    flat = frames.reshape(batch, steps * channels, height * width)
    out = flat.gather(2, index[:, None].expand(-1, steps * channels, -1))
    return (out * upload(inside[:, None], frames.device)).reshape(frames.shape)


def _boxes(erased: Tensor, top: Tensor, left: Tensor, side: Tensor, height: int, width: int) -> Tensor:
    """True inside each sample's box, [B, 1, 1, H, W]."""
    row, column = torch.arange(height)[None, :], torch.arange(width)[None, :]
    rows = (row >= top[:, None]) & (row < (top + side)[:, None])
    columns = (column >= left[:, None]) & (column < (left + side)[:, None])
    return (erased[:, None, None] & rows[:, :, None] & columns[:, None, :])[:, None, None]


def _over_batch(flags: Tensor, frames: Tensor) -> Tensor:
    return upload(flags, frames.device).view(-1, 1, 1, 1, 1)
