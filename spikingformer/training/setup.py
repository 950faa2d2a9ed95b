"""From a recipe to model, optimiser, schedule, averages and precision."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from spikingformer.training.checkpoint import (
    ModelInfo,
    choosing_part,
    create_model,
    load_weights,
    read_model_file,
    versions,
)
from spikingformer.training.inputs import Inputs
from spikingformer.training.recipe import Recipe, check_event_steps


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """auto, cpu, cuda or cuda:N; without N each of several processes on a machine takes its own card.

    Raises:
        ValueError: another name, or a card that is not there.
    """
    found = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", name, re.ASCII)
    if found is None:
        raise ValueError(f"device: got {name!r}, expected auto, cpu, cuda or cuda:N")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"device: got {name}, but PyTorch finds no CUDA device here; use device=cpu, or `spikingformer doctor`"
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    cards = torch.cuda.device_count()
    index = local_rank % cards if found[1] is None else int(found[1])
    if index >= cards:
        raise ValueError(f"device: got {name}, but there are {cards} here, from cuda:0 to cuda:{cards - 1}")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def model_arguments(recipe: Recipe, classes: int, kind: str) -> dict[str, Any]:
    """Arguments of timm.create_model; what a recipe leaves open stays the model's own."""
    model, data = recipe.model, recipe.data
    optional = {
        "embed_dim": model.embed_dim,
        "depth": model.depth,
        "num_heads": model.num_heads,
        "mlp_ratio": model.mlp_ratio,
        "pooled_stages": model.pooled_stages,
        "tau": model.tau,
        "surrogate": model.surrogate,
    }
    return {
        "img_size": data.image_size,
        "in_chans": data.channels,
        "num_classes": classes,
        "time_steps": data.frames if kind == "events" else model.time_steps,
        "drop_path_rate": model.drop_path_rate,
        **{name: value for name, value in optional.items() if value is not None},
    }


def time_steps_of(recipe: Recipe, epoch: int) -> int:
    """T of a training step on still pictures in an epoch, counted from 0."""
    early = epoch < recipe.schedule.early_epochs
    return recipe.schedule.early_time_steps if early else recipe.model.time_steps


def _check_early_epochs(recipe: Recipe, kind: str) -> None:
    asked, name = recipe.schedule.early_epochs, f"schedule.early_epochs: got {recipe.schedule.early_epochs}"
    if asked and kind == "events":
        raise ValueError(f"{name}, but event frames bring their own time steps: set it to 0")
    if asked >= recipe.epochs and asked:
        raise ValueError(
            f"{name} of {recipe.epochs} epochs, but some must run with all {recipe.model.time_steps} time steps: use "
            "fewer schedule.early_epochs, or a lower model.time_steps"
        )


def build_model(recipe: Recipe, classes: int, kind: str, say: Callable[[str], None] = lambda text: None) -> nn.Module:
    """The recipe's model with weights from the seed, or from model.initial_checkpoint (its head is kept only if the
    number of classes is the same; `say` gets a line about it).

    Raises ValueError for early epochs that the data or the number of epochs does not allow, and for weights that do not
    fit.
    """
    _check_early_epochs(recipe, kind)
    if kind == "events":
        check_event_steps(recipe)
    torch.manual_seed(recipe.seed)
    model = create_model(recipe.model.name, model_arguments(recipe, classes, kind))
    if recipe.model.initial_checkpoint is not None:
        path = recipe.model.initial_checkpoint
        weights, info = read_model_file(path)
        if info.kwargs.get("num_classes") != classes:
            own = model.state_dict()
            weights = {**weights, **{name: own[name] for name in own if name.startswith("head.")}}
            had = info.kwargs.get("num_classes")
            say(f"weights from {path}, except its head of {had} classes: the new head has {classes}")
        else:
            say(f"weights from {path}, with its head")
        load_weights(model, weights, path)
    return model


def model_info(recipe: Recipe, inputs: Inputs, metrics: dict[str, float], epoch: int) -> ModelInfo:
    """What the model file of a run says. metrics: of its weights; epoch: counted from 0."""
    return ModelInfo(
        name=recipe.model.name,
        kwargs=model_arguments(recipe, len(inputs.class_names), inputs.kind),
        class_names=inputs.class_names,
        mean=inputs.mean,
        std=inputs.std,
        interpolation=recipe.data.interpolation,
        crop_fraction=recipe.data.crop_fraction,
        kind=inputs.kind,
        epoch=epoch,
        metrics=metrics,
        metrics_part=choosing_part(recipe.data.validation_fraction),
        recipe=recipe.model_dump(mode="json"),
        versions=versions(),
    )


def build_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimiser of that name. Biases, one-dimensional weights and what the model's `no_weight_decay()` names
    have no decay.

    Raises:
        ValueError: timm knows no optimiser of that name.
    """
    from difflib import get_close_matches

    from timm.optim import create_optimizer_v2, list_optimizers, param_groups_weight_decay

    settings = recipe.optimizer
    if settings.name not in list_optimizers():
        near = get_close_matches(settings.name, list_optimizers(), n=1)
        raise ValueError(
            f"optimizer.name: timm knows no optimiser {settings.name!r}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    if settings.name == "muon":  # timm's goes through its matrices one by one
        from spikingformer.training.muon import Muon

        excluded: set[str] = getattr(model, "no_weight_decay", set)()
        groups = param_groups_weight_decay(model, settings.weight_decay, no_weight_decay_list=excluded)
        return Muon(groups, settings.learning_rate, settings.weight_decay, settings.momentum)
    return create_optimizer_v2(
        model,
        opt=settings.name,
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
    )


def build_average(recipe: Recipe, model: nn.Module, sharded: bool = False) -> ModelEmaV3 | None:
    """The moving average of the weights, a copy of the model as it is now; None: the recipe has ema.decay=0.

    sharded: its weights will be split; shares and whole buffers cannot be averaged in one call.
    """
    if recipe.ema.decay == 0:
        return None
    return ModelEmaV3(model, decay=recipe.ema.decay, use_warmup=recipe.ema.warmup, foreach=not sharded)


class LearningRate:
    """The learning rate as a function of the position alone, by timm's schedule; sets it on the optimiser."""

    def __init__(self, recipe: Recipe, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> None:
        from timm.scheduler import create_scheduler_v2

        settings = recipe.schedule
        self.optimizer = optimizer
        self.steps_per_epoch = steps_per_epoch
        self.every_step = settings.every_step
        self.scheduler = None
        if settings.name != "constant" or settings.warmup_epochs > 0:
            self.scheduler, _ = create_scheduler_v2(
                optimizer,
                sched=settings.name,
                num_epochs=recipe.epochs,
                warmup_epochs=settings.warmup_epochs,
                warmup_lr=settings.warmup_learning_rate,
                min_lr=settings.min_learning_rate,
                cooldown_epochs=settings.cooldown_epochs,
                decay_epochs=settings.decay_epochs,
                decay_rate=settings.decay_rate,
                step_on_epochs=not settings.every_step,
                updates_per_epoch=steps_per_epoch,
            )
        self.base = [group["lr"] for group in optimizer.param_groups]

    def set(self, epoch: int, step: int, factor: float) -> float:
        """Sets the rate of (epoch, step), times `factor`; returns the first group's."""
        if self.scheduler is None:
            for group, rate in zip(self.optimizer.param_groups, self.base, strict=True):
                group["lr"] = rate
        elif self.every_step:
            self.scheduler.step_update(epoch * self.steps_per_epoch + step)
        else:
            self.scheduler.step(epoch)
        for group in self.optimizer.param_groups:
            group["lr"] *= factor
        return float(self.optimizer.param_groups[0]["lr"])


def autocast_factory(precision: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """A fresh context for each forward pass."""
    if precision in ("fp32", "fp64"):
        return nullcontext
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return lambda: torch.autocast(device.type, dtype=dtype)
