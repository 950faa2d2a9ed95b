"""A whole run: folder, data, model, loop and result."""

import json
import os
import textwrap
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console
from timm.utils import ModelEmaV3
from torch import nn

from spikingformer.files import write_atomic
from spikingformer.layers.sync_batchnorm import synchronise
from spikingformer.models import Spikingformer
from spikingformer.training.checkpoint import choosing_part, load_weights, read_model_file
from spikingformer.training.distributed import World, agree_to_start, barrier, process_group, read_world
from spikingformer.training.inputs import Inputs, create_inputs
from spikingformer.training.loop import Trainer
from spikingformer.training.nonfinite import first_nonfinite
from spikingformer.training.parallel import check_parallel, dealt_to, is_sharded, shard
from spikingformer.training.recipe import Recipe, is_free
from spikingformer.training.reporting import Reporter, duration, make_console, progress_bar
from spikingformer.training.run_folder import BEST_FILE, LAST_FILE, RESULT_FILE, has_run, locked, start_run
from spikingformer.training.setup import build_average, build_model, build_optimizer, choose_device
from spikingformer.training.signals import stop_on_signals
from spikingformer.training.state import RunState, load_state


@dataclass(frozen=True)
class Result:
    """best_top1, last_top1: percent, of the best and the last epoch, on the part that chooses the best epoch.
    test_top1: percent, of the best weights on the test part.

    seconds: of the call that finished the run; the earlier calls of a resumed run are in metrics.jsonl, epoch by epoch.
    """

    folder: str
    best_top1: float
    best_epoch: int
    last_top1: float
    test_top1: float
    seconds: float
    skipped_steps: int
    unreadable: int


# keys that may change although the result does: what a run that has stopped advises to set
_WAYS_OUT = ("nonfinite", "data.unreadable")


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if is_free(prefix + key) or prefix + key in _WAYS_OUT:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: was {a!r}, is {b!r} now")
    return found


def _with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """A saved recipe, completed with the defaults of fields that are newer than it."""
    try:
        return Recipe.model_validate_json(json.dumps(values)).model_dump(mode="json")
    except ValidationError:  # of a later version: its differences are listed as they are
        return values


def _check_same_run(folder: Path, state: RunState, recipe: Recipe) -> None:
    found = _differences(_with_defaults(state.recipe), recipe.model_dump(mode="json"))
    if found:
        raise ValueError(
            f"{folder}: holds a run with another recipe:\n"
            + "\n".join(f"  {line}" for line in found[:8])
            + f"\nResume with the recipe it was started with (`spikingformer train {folder} --resume`), "
            "or choose another --output."
        )


def _check_same_data(folder: Path, state: RunState, inputs: Inputs) -> None:
    now, then = inputs.identity(), state.data or {}
    if not then and (folder / LAST_FILE).is_file():  # an older state: its model file knows the classes
        then = {"class_names": list(read_model_file(folder / LAST_FILE)[1].class_names)}
    for name, value in now.items():
        if then.get(name, value) != value:
            raise ValueError(
                f"{folder}: its run was trained on other data: {name} was {_shortened(then[name])}, is "
                f"{_shortened(value)} now. Set data.root to the data it was started with, or choose another --output."
            )


def _shortened(value: Any) -> str:
    return textwrap.shorten(", ".join(value) if isinstance(value, list) else str(value), 60, placeholder=" ...")


def _processes(recipe: Recipe, world: World) -> str:
    if world.size == 1:
        return ", one process: nothing to share (parallel=fsdp)" if recipe.parallel == "fsdp" else ""
    held = (
        "each with a share of the model (FSDP2; firing rates are not counted)"
        if is_sharded(recipe, world)
        else "each with the whole model"
    )
    return f", {world.size} processes, {held}"


def _prepare_machine(recipe: Recipe) -> None:
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    if recipe.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = not recipe.deterministic  # shapes repeat: cuDNN's quickest convolution pays


def train(recipe: Recipe, folder: Path, resume: bool = False, world: World | None = None) -> Result:
    """Runs a recipe into a folder.

    Args:
        resume: continue from the folder's last checkpoint, if it has one; a process that torchrun restarted does so
            always.

    Raises:
        ValueError: bad recipe, data or folder, a loss that is not finite. StoppedBySignal: saved, not finished.
    """
    world = world or read_world()
    check_parallel(recipe)
    resume = resume or world.restarts > 0
    device = choose_device(recipe.device, world.local_rank)
    _prepare_machine(recipe)
    console = make_console(world.is_first)
    with ExitStack() as stack:
        stack.enter_context(process_group(world, device))
        _take_folder(stack, folder, resume, world)
        state = _read_checkpoint(folder, recipe, console)
        if state is not None and state.progress.finished and (result := _read_result(folder)) is not None:
            console.print(f"{folder}: already finished ({state.progress.epoch} epochs)", markup=False)
            console.print(_summary(result, recipe), markup=False)
            return result
        if state is None and resume and has_run(folder):
            console.print(f"{folder}: no checkpoint there yet, so the run starts from the beginning", markup=False)
        inputs = create_inputs(recipe, device, world)
        if state is not None:
            _check_same_data(folder, state, inputs)
        model, average = _build_models(recipe, inputs, device, world, console)
        optimizer = build_optimizer(recipe, model)
        if world.is_first and state is None:
            start_run(folder, recipe)
        first_step = state.progress.global_step if state is not None else 0
        reporter = Reporter(folder, console, recipe.log.tensorboard, first_step, world.is_first)
        stack.callback(reporter.close)
        stop = stack.enter_context(stop_on_signals(launched=world.size > 1))
        trainer = Trainer(recipe, model, optimizer, inputs, folder, device, world, reporter, stop, average)
        if state is not None:
            trainer.restore(state)
            _announce_resumed(trainer, state)
        _announce(trainer)
        began = time.monotonic()
        total = trainer.steps_per_epoch * recipe.total_epochs
        with progress_bar(console, total, trainer.progress.global_step, "steps") as bar:
            trainer.run(bar)
        return _finish(trainer, time.monotonic() - began)


def _take_folder(stack: ExitStack, folder: Path, resume: bool, world: World) -> None:
    """Locks the folder until the stack closes. Raises ValueError, in every process, where this run may not write."""
    problem = None
    if world.is_first:
        try:
            stack.enter_context(locked(folder))  # before the next: no --resume while another run writes there
            if not resume and has_run(folder):
                raise ValueError(
                    f"{folder}: already holds a run; add --resume to continue it, or choose another --output"
                )
        except ValueError as error:
            problem = str(error)
    agree_to_start(world, problem)


def _read_checkpoint(folder: Path, recipe: Recipe, console: Console) -> RunState | None:
    """The state to continue from; None: there is none. Raises ValueError for one of another run and for NaN in it."""
    state, warning = load_state(folder)
    if warning:
        console.print(warning, style="yellow", markup=False)
    if state is None:
        return None
    _check_same_run(folder, state, recipe)
    if (name := first_nonfinite(state.tensors)) is not None:  # older versions saved such states
        raise ValueError(
            f"{folder}: its last checkpoint holds NaN or infinity in {name}, so the run cannot continue from it: "
            "train again with another --output"
        )
    return state


def _build_models(
    recipe: Recipe, inputs: Inputs, device: torch.device, world: World, console: Console
) -> tuple[nn.Module, ModelEmaV3 | None]:
    """The model and its average (None: the recipe wants none), on the device, sharded if asked."""
    model = build_model(recipe, len(inputs.class_names), inputs.kind, partial(console.print, markup=False))
    if recipe.precision == "fp64":
        model = model.double()
    if recipe.sync_batchnorm and world.size > 1:
        model = synchronise(model, device)
    if recipe.grad_checkpointing:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    sharded = is_sharded(recipe, world)
    average = build_average(recipe, model, sharded)
    for module in [model] if average is None else [model, average.module]:
        if sharded:
            shard(module, device, world)
        else:
            module.to(device)
    return model, average


def _announce_resumed(trainer: Trainer, state: RunState) -> None:
    p, folder, processes = trainer.progress, trainer.folder, trainer.world.size
    if p.finished:
        trainer.reporter.say(f"{folder}: already finished ({p.epoch} epochs)")
        return
    trainer.reporter.say(f"{folder}: continuing from epoch {p.epoch + 1}, step {p.step} of {trainer.steps_per_epoch}")
    if state.world_size != processes:
        trainer.reporter.say(
            f"started with {state.world_size} processes, resumed with {processes}: the batches are the same, but sums "
            "are rounded and BatchNorm's statistics are taken over other shares, so the numbers differ from those of "
            "an uninterrupted run",
            "yellow",
        )


def _announce(trainer: Trainer) -> None:
    """What is trained, where and for how long, and settings that are unlikely to be meant."""
    recipe, model, say = trainer.recipe, trainer.model, trainer.reporter.say
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(
        f"{recipe.model.name}: {parameters:,} parameters, {trainer.classes} classes, on {trainer.device}"
        + _processes(recipe, trainer.world)
        + f"; {trainer.steps_per_epoch} steps an epoch, {recipe.total_epochs} epochs"
        + (f" ({recipe.schedule.cooldown_epochs} of them cool-down)" if recipe.schedule.cooldown_epochs else "")
    )
    if recipe.schedule.warmup_epochs >= recipe.epochs and recipe.schedule.name != "constant":
        say(
            f"schedule.warmup_epochs={recipe.schedule.warmup_epochs} of epochs={recipe.epochs}: the learning rate "
            "never stops rising; use fewer schedule.warmup_epochs for a real result",
            "yellow",
        )
    if recipe.batch_size == 1 and isinstance(model, Spikingformer):
        say(
            "batch_size=1: the last BatchNorm normalises over the values that the head averages, so gradients "
            "vanish; use at least 2",
            "yellow",
        )


def _read_result(folder: Path) -> Result | None:
    """The result of a finished run; None: its result file is missing or damaged."""
    try:
        return replace(Result(**json.loads((folder / RESULT_FILE).read_text())), folder=str(folder))
    except (OSError, ValueError, TypeError):
        return None


def _summary(result: Result, recipe: Recipe) -> str:
    held_out = recipe.data.validation_fraction
    return (
        f"best epoch {result.best_epoch + 1} (chosen on the {choosing_part(held_out)}): {result.best_top1:.2f} %; "
        f"last epoch {result.last_top1:.2f} %; "
        + (f"test part {result.test_top1:.2f} %; " if held_out else "")
        + f"{duration(result.seconds)}; files in {result.folder}"
    )


def _finish(trainer: Trainer, seconds: float) -> Result:
    """Best weights on the test part (when another part chose them), and the run's result file."""
    p = trainer.progress
    test_top1 = p.best_top1
    if trainer.inputs.validation is not None:
        path = trainer.folder / BEST_FILE
        barrier(trainer.world)  # the first process may still be writing it
        weights, _ = read_model_file(path)
        model = trainer.evaluated_model()
        load_weights(model, dealt_to(model, weights), path)
        test = trainer.evaluate(model, trainer.inputs.test)
        test_top1 = test.top1
        trainer.reporter.record("test", p.global_step, {**test.summary(), "epoch": p.best_epoch})
    result = Result(
        str(trainer.folder),
        p.best_top1,
        p.best_epoch,
        p.last_metrics.get("top1", -1.0),
        test_top1,
        seconds,
        p.skipped_steps,
        p.unreadable,
    )
    if trainer.world.is_first:
        write_atomic(trainer.folder / RESULT_FILE, json.dumps(result.__dict__, indent=2).encode())
    trainer.reporter.say(_summary(result, trainer.recipe))
    return result
