"""What a run reports: console, metrics.jsonl, TensorBoard. Only the first process does."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from spikingformer.training.run_folder import MetricsFile


def make_console(speaks: bool = True) -> Console:
    """A console on stderr, wide enough in a pipe; silent unless `speaks`."""
    console = Console(stderr=True, quiet=not speaks, soft_wrap=True, highlight=False)
    if not console.is_terminal:
        console.width = 160
    return console


class Reporter:
    """Curves and progress of one run. `global_step` counts optimiser steps tried, from 0."""

    def __init__(self, folder: Path, console: Console, tensorboard: bool, first_step: int, speaks: bool) -> None:
        self.console = console
        self.speaks = speaks
        self.metrics = MetricsFile(folder)
        self._problems: list[str] = []  # of neurons, as last said
        self.writer = None
        if not speaks:
            return
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1 if first_step else None)

    def drop_after(self, global_step: int, epoch: int) -> None:
        """Forgets what an earlier attempt recorded beyond this step, and the end of this epoch or a later one."""
        if self.speaks:
            self.metrics.drop_after(global_step, epoch)

    def record(self, kind: str, global_step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and a TensorBoard point for every number in it."""
        if not self.speaks:
            return
        self.metrics.write({"kind": kind, "global_step": global_step, **values})
        if self.writer is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    self.writer.add_scalar(f"{kind}/{name}", value, global_step)

    def say(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, markup=False)

    def warn_of_neurons(self, problems: list[str]) -> None:
        """Says which neurons have died or saturated since the last call."""
        if new := [p for p in problems if p not in self._problems]:
            more = f" (and {len(new) - 1} like it)" if len(new) > 1 else ""
            self.say(f"neurons: {new[0]}{more}", "yellow")
        self._problems = problems

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class ProgressBar:
    """Steps of the whole run with the time left; silent if stderr is not a terminal."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def advance(self, text: str) -> None:
        self._progress.update(self._task, advance=1, description=text)


@contextmanager
def progress_bar(console: Console, total: int, done: int, unit: str) -> Iterator[ProgressBar]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    visible = console.is_terminal and not console.quiet and sys.stderr.isatty()
    with Progress(*columns, console=console, disable=not visible, refresh_per_second=4, transient=True) as progress:
        yield ProgressBar(progress, progress.add_task("", total=total, completed=done))


def duration(seconds: float) -> str:
    """90 -> 1:30, 3700 -> 1:01:40."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def epoch_line(values: dict[str, Any], total_epochs: int, epochs_left: float) -> str:
    """An epoch's record as one line of the console. epochs_left: counted in epochs as long as this one."""
    left = values["seconds"] * epochs_left
    number = f"{values['epoch'] + 1:>{len(str(total_epochs))}}"
    loss = f"{values['train_loss']:.4f}" if "train_loss" in values else "none"
    text = f"epoch {number}/{total_epochs}  "
    text += f"T = {values['time_steps']}  " if "time_steps" in values else ""
    text += f"train loss {loss}"
    if "top1" in values:
        text += f"  top-1 {values['top1']:.2f} %  loss {values['loss']:.4f}  best {values['best_top1']:.2f} %"
    if "firing_rate" in values:
        text += f"  firing {values['firing_rate']:.1%}  {values['energy_mj']:.3g} mJ"
    text += f"  {values['samples_per_second']:.0f} samples/s  data wait {values['data_wait_share']:.1%}"
    for name in ("skipped_steps", "unreadable"):
        text += f"  {name.replace('_', ' ')} {values[name]} in all" if values[name] else ""
    return text + f"  left {duration(left)}"
