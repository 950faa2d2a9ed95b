"""When a run's state is saved: after so many epochs, steps or seconds."""

import time

import torch

from spikingformer.training.distributed import World, sum_over_processes
from spikingformer.training.recipe import CheckpointSettings
from spikingformer.training.state import Progress


class CheckpointPlan:
    """Says after each step and each epoch whether a checkpoint is due. `saved` restarts the clock of every_seconds."""

    def __init__(self, settings: CheckpointSettings, steps_per_epoch: int, device: torch.device, world: World) -> None:
        self.settings, self.steps_per_epoch, self.device, self.world = settings, steps_per_epoch, device, world
        self.saved()

    def saved(self) -> None:
        self._last_saved = time.monotonic()

    def after_this_step(self, progress: Progress) -> bool:
        """By steps or by this process's clock; never an epoch's last step, which `after_epoch` looks after."""
        inside = progress.step + 1 < self.steps_per_epoch
        return inside and (self._by_steps(progress.global_step + 1) or self._time_is_up())

    def after_epoch(self, progress: Progress) -> bool:
        """After the epochs so far; all processes call it and agree."""
        best_was_saved = progress.best_epoch == progress.epoch - 1  # the state has to know which weights are the best
        by_epochs = progress.finished or best_was_saved or progress.epoch % self.settings.every_epochs == 0
        if by_epochs or self._by_steps(progress.global_step):
            return True
        if not self.settings.every_seconds:
            return False
        first_wants = torch.tensor(float(self.world.is_first and self._time_is_up()), device=self.device)
        return bool(sum_over_processes(first_wants, self.world))

    def _by_steps(self, steps: int) -> bool:
        every = self.settings.every_steps
        return every > 0 and steps % every == 0

    def _time_is_up(self) -> bool:
        return 0 < self.settings.every_seconds <= time.monotonic() - self._last_saved
