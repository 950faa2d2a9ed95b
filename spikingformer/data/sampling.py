"""Which samples each process sees at each step: a function of (seed, epoch, step), nothing kept between steps."""

from dataclasses import dataclass

import numpy as np

from spikingformer.data.randomness import derive_seed

_ORDER = 1


@dataclass(frozen=True)
class StepPlan:
    """Distributes every epoch's shuffled samples to optimiser steps, processes and accumulation parts.

    samples: in the data set. batch_size: per optimiser step over all processes. rank, world_size: this process.
    """

    samples: int
    batch_size: int
    seed: int
    drop_last: bool = True
    accumulation_steps: int = 1
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        parts = self.world_size * self.accumulation_steps
        if self.batch_size < parts:
            raise ValueError(
                f"batch_size: got {self.batch_size} for {self.world_size} processes x {self.accumulation_steps} "
                f"accumulation steps; at least {parts} is needed"
            )
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"batch_size: got {self.batch_size}, the training part has {self.samples} samples: no full batch; "
                "use a smaller batch_size or drop_last=false"
            )

    @property
    def steps_per_epoch(self) -> int:
        full, rest = divmod(self.samples, self.batch_size)
        return full + int(not self.drop_last and rest >= self.world_size)

    def order(self, epoch: int) -> np.ndarray:
        """The epoch's permutation of the samples, int64 (samples,)."""
        return np.random.default_rng(derive_seed(self.seed, _ORDER, epoch)).permutation(self.samples)

    def parts(self, order: np.ndarray, step: int) -> tuple[list[np.ndarray], int]:
        """This process's accumulation parts of one step, and the number of samples in the whole step."""
        batch = order[step * self.batch_size : (step + 1) * self.batch_size]
        mine = np.array_split(batch, self.world_size)[self.rank]
        # as many parts in every process, none empty: processes meet in each part under SyncBatchNorm
        count = max(1, min(self.accumulation_steps, len(batch) // self.world_size))
        return list(np.array_split(mine, count)), len(batch)


def evaluation_batches(samples: int, batch_size: int, rank: int, world_size: int) -> list[np.ndarray]:
    """Batches of sample numbers that over all processes hold every sample exactly once."""
    mine = np.arange(rank, samples, world_size)
    return [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
