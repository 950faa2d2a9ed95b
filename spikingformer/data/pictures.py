"""Picture sets held in memory: unsigned bytes (N, C, H, W) with labels and class names."""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class PictureSet:
    """A whole data set in memory.

    pictures: uint8 (N, C, H, W). labels: int64 (N,). mean, std: per channel, for pictures scaled to [0, 1].
    """

    pictures: torch.Tensor
    labels: torch.Tensor
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: np.ndarray) -> "PictureSet":
        chosen = torch.from_numpy(np.ascontiguousarray(indices))
        return PictureSet(self.pictures[chosen], self.labels[chosen], self.class_names, self.mean, self.std)


def split_by_class(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the kept and the held-out part: `fraction` of every class, the same for the same seed.

    Raises:
        ValueError: a class is too small to give at least one sample to each part.
    """
    generator = np.random.default_rng(seed)
    held_out = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = round(len(members) * fraction)
        if not 0 < count < len(members):
            raise ValueError(
                f"class {label} has {len(members)} samples: {fraction:.3g} of them leaves one part empty; "
                "change data.validation_fraction"
            )
        held_out.append(generator.permutation(members)[:count])
    chosen = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen
