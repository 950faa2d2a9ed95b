"""Random numbers that depend on (seed, epoch, sample, purpose) alone, never on workers, batches or earlier draws.

A counter-based generator: the counter is hashed with the splitmix64 finaliser (Steele, Lea, Flood 2014,
"Fast splittable pseudorandom number generators"), so a resumed run draws what an unbroken one draws.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def derive_seed(*parts: int) -> int:
    """One 63-bit seed from whole numbers; order matters."""
    state = 0
    for part in parts:
        word = np.array([(state + _GOLDEN + (int(part) & _MASK)) & _MASK], dtype=np.uint64)
        state = int(_mix(word)[0])
    return state >> 1


def uniform(seed: int, indices: np.ndarray, stream: int) -> np.ndarray:
    """Uniform numbers in [0, 1), one a sample: shape of `indices`, float64."""
    key = np.uint64(derive_seed(seed, stream))
    counter = (np.asarray(indices).astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    return (_mix(_mix(counter ^ key) + key) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normal(seed: int, indices: np.ndarray, stream: int) -> np.ndarray:
    """Standard normal numbers, one a sample (Box and Muller 1958); uses streams `stream` and `stream + 1`."""
    radius = np.sqrt(-2.0 * np.log1p(-uniform(seed, indices, stream)))
    return radius * np.cos(2.0 * np.pi * uniform(seed, indices, stream + 1))


@contextmanager
def seeded_generators(seed: int) -> Iterator[None]:
    """Seeds `random`, numpy's and PyTorch's CPU generator inside the block and restores them after it.

    timm's and torchvision's transforms draw from these global generators.
    """
    saved = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(saved[0])
        np.random.set_state(saved[1])
        torch.set_rng_state(saved[2])
