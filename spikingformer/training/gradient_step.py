"""One training step in one process: forward, backward and the optimiser's update."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from spikingformer.data.loading import Step
from spikingformer.data.mixing import mix_batch, soft_targets
from spikingformer.energy.sparsity import SparsityTerm
from spikingformer.training.distributed import World
from spikingformer.training.nonfinite import gradients_are_finite
from spikingformer.training.parallel import is_sharded, replicate, without_exchange
from spikingformer.training.recipe import Recipe
from spikingformer.training.setup import autocast_factory
from spikingformer.training.step_graph import StepGraph
from spikingformer.training.update import DeviceUpdate, is_capturable


class GradientStep:
    """How a recipe computes gradients and applies them.

    `model`: the plain module, or one that `shard` has split; DDP and `torch.compile` wrap it here.
    Raises ValueError for a recipe with both sparsity and compile.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        classes: int,
        device: torch.device,
        world: World,
    ) -> None:
        self.recipe, self.model, self.optimizer = recipe, model, optimizer
        self.classes, self.device, self.world = classes, device, world
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
        self.autocast: Callable[[], AbstractContextManager] = autocast_factory(recipe.precision, device)
        self.dtype = torch.float64 if recipe.precision == "fp64" else torch.float32
        if recipe.sparsity and recipe.compile:
            raise ValueError("sparsity > 0 reads the layers' inputs, which compile=true hides: set one of them off")
        self._sparsity = SparsityTerm(model).__enter__() if recipe.sparsity else None  # for as long as the run
        self.forward: nn.Module = self._wrap(model)
        whole = world.size == 1 and not (recipe.compile or recipe.sparsity)
        self._graph = (
            StepGraph(self._one_part, model) if device.type == "cuda" and recipe.cuda_graph and whole else None
        )
        # fp64 needs rates and bias corrections that are no tensors of float32; fp16's scaler steps by itself
        on_device = device.type == "cuda" and world.size == 1 and recipe.precision in ("fp32", "bf16")
        self._device_update = (
            DeviceUpdate(optimizer, self._apply_gradients, device, recipe.cuda_graph)
            if on_device and is_capturable(optimizer)
            else None
        )

    def _wrap(self, model: nn.Module) -> nn.Module:
        wrapped = model if is_sharded(self.recipe, self.world) else replicate(model, self.device, self.world)
        return torch.compile(wrapped) if self.recipe.compile else wrapped  # type: ignore[return-value]

    def loss(self, step: Step, epoch: int, number: int) -> torch.Tensor:
        """Forward and backward over this process's parts; returns its share of the step's mean loss.

        `number`: the step's place in its epoch, counted from 0.
        """
        total = torch.zeros((), device=self.device, dtype=self.dtype)
        for position, part in enumerate(step.parts):
            targets = soft_targets(part.labels, self.classes, self.recipe.label_smoothing).to(self.dtype)
            mixed = number * self.recipe.accumulation_steps + position
            inputs, targets = mix_batch(
                part.inputs.to(self.dtype), targets, self.recipe.mixing, self.recipe.seed, epoch, mixed
            )
            if self.recipe.channels_last and inputs.ndim == 4:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            # each process's gradient is averaged over processes: weigh by samples, so uneven shares count right
            weight = self.world.size / step.samples
            with self._no_exchange(position < len(step.parts) - 1):
                run = self._one_part if self._graph is None or len(step.parts) > 1 else self._graph
                loss = run(inputs, targets, weight)
            total += loss / self.world.size
        return total

    def _one_part(self, inputs: torch.Tensor, targets: torch.Tensor, weight: float) -> torch.Tensor:
        """Forward and backward of one part; returns its loss: the sum over its samples times `weight`."""
        with self.autocast():
            logits = self.forward(inputs)
        logits = logits if self.dtype == torch.float64 else logits.float()
        loss = -(targets * F.log_softmax(logits, 1)).sum() * weight
        if self._sparsity is not None:
            loss = loss + self.recipe.sparsity * len(inputs) * weight * self._sparsity.value()
        self.scaler.scale(loss).backward()
        return loss.detach()

    def _no_exchange(self, waits: bool) -> AbstractContextManager:
        """Gradients are exchanged once a step, with the last part."""
        inner = self.forward._orig_mod if self.recipe.compile else self.forward
        assert isinstance(inner, nn.Module)
        return without_exchange(inner) if waits else nullcontext()

    def gradients_are_finite(self) -> bool:
        """In every process. Under fp16 the scaler leaves out steps whose gradients are not, and continues."""
        return self.scaler.is_enabled() or gradients_are_finite(self.model, self.world)

    def update(self) -> None:
        """The optimiser's step, with the gradients clipped first if the recipe says so."""
        if self._device_update is not None:
            self._device_update()
        else:
            self._apply_gradients()

    def _apply_gradients(self) -> None:
        self.scaler.unscale_(self.optimizer)
        if self.recipe.optimizer.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optimizer.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def optimizer_was_loaded(self) -> None:
        """Must be called after a state was loaded into the optimiser: a CUDA graph would go on with the old tensors."""
        if self._device_update is not None:
            self._device_update.forget()

    def drop_graphs(self) -> bool:
        """Frees what CUDA graphs hold, for good; whether there were any."""
        had = any(graph is not None and graph.holds_memory for graph in (self._graph, self._device_update))
        self._graph = self._device_update = None
        return had
