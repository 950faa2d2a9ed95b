"""Gradient routing over a training: the recipe's own steps, with a measurement in between."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikingformer.data.loading import TrainingLoader
from spikingformer.reproduce.routing import StageRouting, measure_routing
from spikingformer.training.distributed import World
from spikingformer.training.evaluation import evaluate
from spikingformer.training.inputs import create_inputs
from spikingformer.training.loop import Trainer
from spikingformer.training.recipe import Recipe
from spikingformer.training.reporting import Reporter, make_console
from spikingformer.training.setup import build_model, build_optimizer, choose_device
from spikingformer.training.signals import StopRequest


def measuring_points(steps: int, points: int) -> list[int]:
    """Steps at which to measure: 0, the last, and `points` - 2 between, closer together early on (squares)."""
    if points < 2 or steps < 1:
        raise ValueError(f"at least two points and one step are needed, got {points} and {steps}")
    return sorted({round(steps * (i / (points - 1)) ** 2) for i in range(points)})


def _first_batches(loader: TrainingLoader, pictures: int) -> tuple[Tensor, Tensor]:
    """The first training samples of epoch 0, as augmented: (inputs, labels)."""
    inputs, labels = [], []
    for step in loader.steps(0, 0):
        for part in step.parts:
            inputs.append(part.inputs)
            labels.append(part.labels)
        if sum(len(y) for y in labels) >= pictures:
            break
    return torch.cat(inputs)[:pictures], torch.cat(labels)[:pictures]


def stage_values(stage: StageRouting) -> dict[str, Any]:
    """One stage's figures for a results file; shares of all pooling windows unless named otherwise."""
    w = stage.windows
    return {
        "stage": stage.stage,
        "windows": w.windows,
        "elsewhere": w.elsewhere_share,
        "elsewhere_among_firing": None if w.silent == w.windows else w.firing_elsewhere_share,
        "silent": w.silent / w.windows,
        "single": w.single / w.windows,
        "several": w.several / w.windows,
        "elsewhere_silent": w.elsewhere_silent / w.windows,
        "elsewhere_single": w.elsewhere_single / w.windows,
        "elsewhere_several": w.elsewhere_several / w.windows,
        "firing_rate": stage.firing_rate,
        "current_cosine": stage.current_cosine,
        "weight_cosine": stage.weight_cosine,
    }


def routing_over_training(
    recipe: Recipe,
    points: int = 8,
    max_steps: int | None = None,
    pictures: int = 128,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains by a recipe (the training loop's steps, schedule and seeds) and measures on the way.

    Args:
        points: measurements, the first before training and the last after it.
        max_steps: stop after so many optimiser steps; None: the recipe's end.
        pictures: training samples that every measurement uses, the same ones.

    Returns the model's name, its measurements and its top-1 (percent) on the test part at the end.
    """
    device, world, began = choose_device(recipe.device), World(), time.monotonic()
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    inputs = create_inputs(recipe, device, world)
    model = build_model(recipe, len(inputs.class_names), inputs.kind).to(device)
    x, labels = _first_batches(inputs.train, pictures)
    per_epoch = inputs.train.steps_per_epoch
    steps = min(max_steps or recipe.total_epochs * per_epoch, recipe.total_epochs * per_epoch)
    at = measuring_points(steps, points)
    measured: list[dict[str, Any]] = []
    training_seconds = 0.0

    def measure(step: int) -> None:
        stages = [stage_values(s) for s in measure_routing(model, x, labels, recipe.label_smoothing)]
        measured.append({"step": step, "epoch": step / per_epoch, "stages": stages})
        say(f"{recipe.model.name}, step {step}/{steps}: elsewhere " + " ".join(f"{s['elsewhere']:.3f}" for s in stages))

    with tempfile.TemporaryDirectory() as folder:
        reporter = Reporter(Path(folder), make_console(False), False, 0, False)
        trainer = Trainer(
            recipe, model, build_optimizer(recipe, model), inputs, Path(folder), device, world, reporter, StopRequest()
        )
        measure(0)
        for step, (epoch, batch) in enumerate(_all_steps(inputs.train, recipe.total_epochs), start=1):
            trainer.progress.epoch = epoch
            trainer.progress.step = (step - 1) % per_epoch
            model.train()
            step_began = time.monotonic()
            trainer.train_step(batch)
            training_seconds += time.monotonic() - step_began
            if step in at:
                measure(step)
            if step == steps:
                break
    top1 = evaluate(model, inputs.test, len(inputs.class_names)).top1
    return {
        "model": recipe.model.name,
        "pool": model.config.pool,  # type: ignore[union-attr]
        "seed": recipe.seed,
        "steps": steps,
        "steps_per_epoch": per_epoch,
        "batch_size": recipe.batch_size,
        "measured_on": len(x),
        "test_top1": top1,
        "seconds": time.monotonic() - began,
        "train_samples_per_second": steps * recipe.batch_size / training_seconds,
        "threads": torch.get_num_threads(),
        "measurements": measured,
    }


def _all_steps(loader: TrainingLoader, epochs: int):
    for epoch in range(epochs):
        for batch in loader.steps(epoch, 0):
            yield epoch, batch
