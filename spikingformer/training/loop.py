"""The training loop: one epoch after another from wherever the run stands."""

import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import nn

from spikingformer.data.loading import EvaluationLoader, Step
from spikingformer.data.randomness import derive_seed
from spikingformer.energy.monitor import RateMonitor
from spikingformer.training.checkpoint import save_model, versions
from spikingformer.training.checkpoint_plan import CheckpointPlan
from spikingformer.training.distributed import World, barrier, sum_over_processes
from spikingformer.training.evaluation import Evaluation, evaluate
from spikingformer.training.gradient_step import GradientStep
from spikingformer.training.inputs import Inputs
from spikingformer.training.late_value import LateValue
from spikingformer.training.nonfinite import (
    NonFiniteLoss,
    explain,
    nan_unless_finite,
    nonfinite_in_any_process,
    running_statistics,
    what_is_not_finite,
)
from spikingformer.training.out_of_memory import out_of_memory
from spikingformer.training.parallel import deal_optimizer_state, dealt_to, gathered, is_sharded
from spikingformer.training.recipe import Recipe
from spikingformer.training.reporting import ProgressBar, Reporter, epoch_line
from spikingformer.training.run_folder import BEST_FILE, LAST_FILE, has_state
from spikingformer.training.setup import LearningRate, build_average, model_info, time_steps_of
from spikingformer.training.signals import StopRequest
from spikingformer.training.state import Progress, RunState, load_state, pack_optimizer, save_state, unpack_optimizer

_MAX_STEP_BACKS = 5


class StoppedBySignal(Exception):
    """The run was asked to stop; its state is saved."""


class Trainer:
    """One run in one process. `model` is the plain module, or one that `shard` has split.

    average: of the weights; None: made here if the recipe has one (a sharded model cannot be copied).
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        inputs: Inputs,
        folder: Path,
        device: torch.device,
        world: World,
        reporter: Reporter,
        stop: StopRequest,
        average: ModelEmaV3 | None = None,
    ) -> None:
        self.recipe, self.model, self.optimizer, self.inputs = recipe, model, optimizer, inputs
        self.folder, self.device, self.world, self.reporter, self.stop = folder, device, world, reporter, stop
        self.classes = len(inputs.class_names)
        self.steps_per_epoch = inputs.train.steps_per_epoch
        self.schedule = LearningRate(recipe, optimizer, self.steps_per_epoch)
        self.ema = average or build_average(recipe, model)
        self.sharded = is_sharded(recipe, world)
        self.gradient = GradientStep(recipe, model, optimizer, self.classes, device, world)
        self.progress = Progress()
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=device)  # of the epoch; read only when saving
        self._speed: dict[str, float] = {}
        self._rehearsed = device.type != "cuda" or not recipe.schedule.early_epochs
        self._statistics = running_statistics(model)
        self._checkpoints = CheckpointPlan(recipe.checkpoint, self.steps_per_epoch, device, world)
        self._unseen_loss: LateValue | None = None  # checked one step late, so that a GPU never waits for it

    def set_time_steps(self, time_steps: int) -> None:
        """Sets the model's T, if the recipe has early epochs with another T."""
        if self.recipe.schedule.early_epochs and self.model.time_steps != time_steps:
            self.model.set_time_steps(time_steps)  # type: ignore[operator]

    # --- state ---

    def _tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """All tensors of the state, as this process holds them, and the optimiser's plain values."""
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        if self.ema is not None:
            tensors |= {f"ema/{name}": value for name, value in self.ema.module.state_dict().items()}
        of_optimizer, numbers = pack_optimizer(self.optimizer)
        return tensors | of_optimizer, numbers

    def capture(self) -> RunState:
        """The whole state; where processes hold shares, all of them call it and the first one gets the tensors."""
        tensors, numbers = self._tensors()
        return RunState(
            gathered(tensors, self.world),
            numbers,
            self.gradient.scaler.state_dict(),
            self.progress,
            self.recipe.model_dump(mode="json"),
            self.world.size,
            versions(),
            self.inputs.identity(),
        )

    def restore(self, state: RunState) -> None:
        self.model.load_state_dict(dealt_to(self.model, state.part("model/")))
        if self.ema is not None:
            self.ema.module.load_state_dict(dealt_to(self.ema.module, state.part("ema/")))
        unpack_optimizer(self.optimizer, state, deal_optimizer_state)
        self.gradient.optimizer_was_loaded()
        if state.scaler:
            self.gradient.scaler.load_state_dict(state.scaler)
        self.progress = Progress(**asdict(state.progress))
        self._loss_sum.fill_(self.progress.loss_sum)
        self._unseen_loss = None
        self.reporter.drop_after(self.progress.global_step, self.progress.epoch)

    def save(self) -> None:
        """Saves the whole state (first process only).

        Raises:
            NonFiniteLoss: it is not finite; nothing is written.
        """
        self._check_finite()
        self._write_state()

    def _write_state(self) -> None:
        """Saves without checking that all is finite."""
        self.progress.loss_sum = float(self._loss_sum)
        state = self.capture() if self.world.is_first or self.sharded else None
        if state is not None and self.world.is_first:
            save_state(self.folder, state)
        self._checkpoints.saved()

    def evaluated_model(self) -> nn.Module:
        """The model with averaged weights if there is one, else the model."""
        return self.model if self.ema is None else self.ema.module

    # --- one step ---

    def _readable(self, step: Step) -> tuple[Step, int]:
        """The step with the number of samples that could be read, which its loss is the mean of, and how many could
        not; both over all processes."""
        if self.recipe.data.unreadable == "stop":
            return step, 0
        left_out = sum(part.unreadable for part in step.parts)
        if self.world.size > 1:
            left_out = int(sum_over_processes(torch.tensor(left_out, device=self.device), self.world))
        return replace(step, samples=step.samples - left_out), left_out

    def _loss(self, step: Step) -> torch.Tensor:
        """Forward and backward of the step under way.

        Raises OutOfMemory, which says what would fit, if memory does not hold it.
        """
        try:
            return self.gradient.loss(step, self.progress.epoch, self.progress.step)
        except torch.OutOfMemoryError as error:
            reason = str(error).partition("\n")[0]
        self.set_time_steps(self.recipe.model.time_steps)
        raise out_of_memory(self.gradient, step, reason)

    def _agree(self, loss: torch.Tensor) -> tuple[torch.Tensor, bool, bool]:
        """Over all processes: the step's loss, whether any was asked to stop, whether the first wants a checkpoint."""
        stop, due = bool(self.stop), self._checkpoints.after_this_step(self.progress)
        if self.world.size == 1:
            return loss, stop, due
        flags = [float(stop), float(due and self.world.is_first)]
        values = torch.tensor([0.0, *flags], device=self.device, dtype=torch.float64)
        values[0] = loss
        dist.all_reduce(values)
        return values[0].to(loss.dtype), bool(values[1] > 0), bool(values[2] > 0)

    def _check_unseen_loss(self) -> None:
        if self._unseen_loss is not None:
            loss, self._unseen_loss = self._unseen_loss.read(), None
            if not math.isfinite(loss):
                self._stop_on(what_is_not_finite(loss, self._statistics))

    def _check_finite(self) -> None:
        """Every process raises where one holds what must not be saved."""
        self._check_unseen_loss()
        if (name := nonfinite_in_any_process(self._tensors()[0], self.device, self.world)) is not None:
            self._stop_on(f"{name} is not finite")

    def _stop_on(self, what: str) -> NoReturn:
        p, rate = self.progress, self.optimizer.param_groups[0]["lr"]
        where = f"epoch {p.epoch + 1}, step {p.step}, learning rate {rate:.3g}"
        raise NonFiniteLoss(explain(what, where, self.recipe.nonfinite, p.step_backs, has_state(self.folder)))

    def _update(self) -> None:
        self.gradient.update()
        self.progress.updates += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.progress.updates)

    def train_step(self, step: Step) -> tuple[bool, bool]:
        """One optimiser step; returns whether the run was asked to stop and whether a checkpoint is due.

        Raises:
            NonFiniteLoss: under nonfinite=stop, and under step_back where no step back is left.
        """
        p, recipe = self.progress, self.recipe
        self.set_time_steps(time_steps_of(recipe, p.epoch))
        torch.manual_seed(derive_seed(recipe.seed, 2, p.epoch, p.step, self.world.rank))
        self.schedule.set(p.epoch, p.step, p.learning_rate_factor)
        self.optimizer.zero_grad(set_to_none=True)
        before = [buffer.clone() for buffer in self.model.buffers()] if recipe.nonfinite == "skip" else []
        step, unreadable = self._readable(step)
        own_loss = nan_unless_finite(self._loss(step), self._statistics)
        loss, asked, due = self._agree(own_loss)
        counted: torch.Tensor | None = loss
        if recipe.nonfinite == "stop":
            self._check_unseen_loss()
            self._unseen_loss = LateValue(loss)
            if self.device.type == "cpu":
                self._check_unseen_loss()
            self._update()
        elif bool(torch.isfinite(loss)) and self.gradient.gradients_are_finite():
            self._update()
        elif recipe.nonfinite == "skip":
            p.skipped_steps += 1
            for buffer, old in zip(self.model.buffers(), before, strict=True):
                buffer.copy_(old)
            counted = None
        else:
            self._step_back(what_is_not_finite(float(loss), self._statistics))
            return asked, False
        p.unreadable += unreadable
        self._count(step, counted)
        return asked, due

    def rehearse(self, step: Step) -> None:
        """Runs a step with all time steps and undoes its effects. If memory does not hold it, the run stops here, not
        after its early epochs.

        Raises OutOfMemory.
        """
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        self.set_time_steps(self.recipe.model.time_steps)
        self._loss(step)
        self.optimizer.zero_grad(set_to_none=True)
        for buffer, old in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(old)
        self._rehearsed = True

    def _count(self, step: Step, loss: torch.Tensor | None) -> None:
        """Advances the position; a step that was skipped has no loss."""
        p = self.progress
        if loss is not None:
            self._loss_sum += loss.double() * step.samples
            p.loss_samples += step.samples
        p.global_step += 1
        p.step += 1
        if p.global_step % self.recipe.log.every_steps == 0:
            values = {} if loss is None else {"loss": float(loss)}
            values["learning_rate"] = self.optimizer.param_groups[0]["lr"]
            self.reporter.record("step", p.global_step, values)

    def _step_back(self, what: str) -> None:
        state, _ = load_state(self.folder)
        if state is None or self.progress.step_backs >= _MAX_STEP_BACKS:
            self._stop_on(what)
        backs, factor = self.progress.step_backs + 1, self.progress.learning_rate_factor / 2
        where = f"epoch {self.progress.epoch + 1}, step {self.progress.step}"
        self.restore(state)
        self.progress.step_backs, self.progress.learning_rate_factor = backs, factor
        self.reporter.say(
            f"{what} in {where}: back to epoch {self.progress.epoch + 1}, step {self.progress.step}, "
            f"learning rate x {factor:g} from here on",
            "yellow",
        )

    # --- epochs ---

    def run(self, bar: ProgressBar) -> Evaluation | None:
        """Trains to the end; returns the last evaluation (None: the run was already finished).

        Raises:
            StoppedBySignal: after saving. NonFiniteLoss: see nonfinite.
        """
        evaluation = None
        if not self.progress.finished and self.progress.global_step == 0:
            self.save()  # a run can be resumed, or stepped back, from its first moment on
        while not self.progress.finished:
            if self._run_epoch(bar):
                evaluation = self._end_epoch()
        return evaluation

    def _run_epoch(self, bar: ProgressBar) -> bool:
        """Runs the epoch's remaining steps; False if a step back moved the position."""
        p = self.progress
        self.model.train()
        epoch, began, waited, samples = p.epoch, time.monotonic(), 0.0, 0
        steps = iter(self.inputs.train.steps(epoch, p.step))
        while self.progress.step < self.steps_per_epoch:
            asked_at = time.monotonic()
            step = next(steps)
            waited += time.monotonic() - asked_at
            if not self._rehearsed:
                self.rehearse(step)
            expected = self.progress.step + 1
            asked, due = self.train_step(step)
            if self.progress.epoch != epoch or self.progress.step != expected:
                return False
            samples += step.samples
            seconds = time.monotonic() - began
            bar.advance(
                f"epoch {epoch + 1}/{self.recipe.total_epochs}  {samples / seconds:.0f}/s  "
                f"data wait {waited / seconds:.0%}"
            )
            if asked:
                self.save()
                barrier(self.world)  # a process that left earlier would make its launcher end the one that saves
                raise StoppedBySignal
            if due:
                self.save()
        self.set_time_steps(self.recipe.model.time_steps)
        seconds = max(time.monotonic() - began, 1e-9)
        self._speed = {"seconds": seconds, "samples_per_second": samples / seconds, "data_wait_share": waited / seconds}
        return True

    def _end_epoch(self) -> Evaluation | None:
        p, recipe = self.progress, self.recipe
        self._check_finite()  # before weights are evaluated and saved
        p.loss_sum = float(self._loss_sum)
        last = p.epoch + 1 >= recipe.total_epochs
        values: dict[str, float] = {"epoch": p.epoch}
        if p.loss_samples:  # else every step was skipped
            values["train_loss"] = p.loss_sum / p.loss_samples
        values["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        time_steps = [time_steps_of(recipe, epoch) for epoch in range(p.epoch, recipe.total_epochs)]
        if recipe.schedule.early_epochs:
            values["time_steps"] = time_steps[0]
        evaluation = None
        if last or (p.epoch + 1) % recipe.evaluate_every == 0:
            evaluation = self._evaluate_and_save_weights()
            values |= {
                "top1": evaluation.top1,
                "top5": evaluation.top5,
                "loss": evaluation.loss,
                "best_top1": p.best_top1,
            }
            values |= self._rates(self.inputs.validation or self.inputs.test)
        values |= {**self._speed, "skipped_steps": p.skipped_steps, "unreadable": p.unreadable}
        p.epoch, p.step, p.loss_sum, p.loss_samples = p.epoch + 1, 0, 0.0, 0
        self._loss_sum.zero_()
        p.finished = last
        self.reporter.record("epoch", p.global_step, values)
        if self._checkpoints.after_epoch(p):
            self._write_state()
        self.reporter.say(epoch_line(values, recipe.total_epochs, sum(time_steps[1:]) / time_steps[0]))
        return evaluation

    def _evaluate_and_save_weights(self) -> Evaluation:
        p = self.progress
        model = self.evaluated_model()
        self._share_buffers(model)
        loader = self.inputs.validation or self.inputs.test
        with self.gradient.autocast():
            evaluation = self.evaluate(model, loader)
        better = evaluation.top1 > p.best_top1
        if better:
            p.best_top1, p.best_epoch = evaluation.top1, p.epoch
        p.last_metrics = evaluation.summary()
        weights = gathered(model.state_dict(), self.world)
        if self.world.is_first:  # weights before the state: a kill in between repeats the epoch and writes them again
            info = model_info(self.recipe, self.inputs, evaluation.summary(), p.epoch)
            if better:
                save_model(self.folder / BEST_FILE, weights, info)
            save_model(self.folder / LAST_FILE, weights, info)
        return evaluation

    def evaluate(self, model: nn.Module, loader: EvaluationLoader) -> Evaluation:
        """Accuracy and loss of the run's model or its average, every sample once over all processes."""
        idle = None
        if self.sharded:
            data = self.recipe.data
            frames = (data.frames,) if self.inputs.kind == "events" else ()
            shape = (1, *frames, data.channels, data.image_size, data.image_size)
            idle = torch.zeros(shape, dtype=self.gradient.dtype, device=self.device)
        return evaluate(model, loader, self.classes, world=self.world, dtype=self.gradient.dtype, idle=idle)

    def _rates(self, loader: EvaluationLoader) -> dict[str, float]:
        """Firing rate and estimated energy of the weights just evaluated; says what has died or saturated."""
        samples = self.recipe.log.rate_samples
        if not samples or not self.world.is_first or self.sharded:  # counted by one process alone
            return {}
        with self.gradient.autocast():
            monitor = RateMonitor(self.evaluated_model(), samples)
            report = monitor.look(batch.inputs.to(self.gradient.dtype) for batch in loader.batches())
        self.reporter.warn_of_neurons(report.problems())
        return report.metrics()

    def _share_buffers(self, model: nn.Module) -> None:
        """BatchNorm statistics differ by process: the first process's count, as in its checkpoints."""
        if self.world.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
