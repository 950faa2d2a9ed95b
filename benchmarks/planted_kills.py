"""A small run, and faults to plant in it: kills inside a save and inside a step."""

import os
import signal

from benchmarks.run_processes import SMALL

RUN = (
    *SMALL,
    "epochs=3",
    "batch_size=256",
    "checkpoint.every_steps=2",
    "ema.decay=0.9",
    "mixing.mixup_alpha=0.5",
    "model.drop_path_rate=0.1",
)


def kill_at_disk_call(number: int) -> None:
    """Plants a SIGKILL at the n-th flush, link or rename of the process: inside a save."""
    calls = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    os.fsync, os.replace, os.link = counted(os.fsync), counted(os.replace), counted(os.link)


def kill_at_step(number: int) -> None:
    """Plants a SIGKILL before the backward pass of a step."""
    from spikingformer.training.loop import Trainer

    forward = Trainer._loss

    def call(self, *args):
        if self.progress.global_step == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, *args)

    Trainer._loss = call
