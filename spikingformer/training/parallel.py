"""How several processes hold one model: each all of it (DDP), or each a share (FSDP2).

Both write the same files: shares are gathered before a save and split again after a load.
"""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from spikingformer.models import SpikingTransformer
from spikingformer.training.distributed import World
from spikingformer.training.recipe import Recipe

# optimisers that update each number independently: a share of a tensor is updated as all of it would be (tested)
ELEMENTWISE = ("adam", "adamw", "momentum", "nadam", "nadamw", "radam", "rmsprop", "sgd")


def is_sharded(recipe: Recipe, world: World) -> bool:
    """Whether this run's processes hold shares; a single process has nothing to share."""
    return recipe.parallel == "fsdp" and world.size > 1


def check_parallel(recipe: Recipe) -> None:
    """Refuses settings that parallel=fsdp does not support, whatever the number of processes.

    Raises:
        ValueError: says which setting, why, and what to do.
    """
    if recipe.parallel != "fsdp":
        return
    problems = []
    if recipe.compile:
        problems.append("compile=true is not supported with it: set compile=false")
    if recipe.channels_last:
        problems.append("FSDP2 shards contiguous weights only: set channels_last=false")
    if recipe.sparsity:
        problems.append("sparsity > 0 is not supported with it: set sparsity=0")
    if recipe.precision == "fp16":
        problems.append("fp16's loss scaling is not supported with it: set precision=bf16 or fp32")
    if recipe.optimizer.name not in ELEMENTWISE:
        problems.append(
            f"optimizer.name={recipe.optimizer.name} may need whole tensors; use one of " + ", ".join(ELEMENTWISE)
        )
    if problems:
        raise ValueError("parallel: got fsdp, but\n" + "\n".join(f"  {p}" for p in problems) + "\nor use parallel=ddp")


def shard(model: nn.Module, device: torch.device, world: World) -> None:
    """Leaves this process its share of every parameter, block by block; `model` is changed.

    Each block becomes whole for its own forward and backward pass only. A model that lies on the CPU moves to
    `device` one block at a time, so that no card ever holds all of it. Buffers stay whole in every process.
    """
    if isinstance(model, SpikingTransformer):  # no layer of ours writes into another's output
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (world.size,))
    for unit in _units(model):
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to(device)  # what no unit holds


def _units(module: nn.Module) -> Iterator[nn.Module]:
    """The children with parameters; lists and sequences give their items instead."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            yield from _units(child)
        elif next(child.parameters(), None) is not None:
            yield child


def replicate(model: nn.Module, device: torch.device, world: World) -> nn.Module:
    """The model as DDP runs it: gradients are averaged once a step; the first process's buffers count."""
    if world.size == 1:
        return model
    return nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def without_exchange(model: nn.Module) -> AbstractContextManager:
    """Parts of a step before the last: DDP waits with the gradients. With shares each part's gradients are exchanged,
    because waiting would keep a whole model's gradients on every card."""
    return model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else nullcontext()


def own_share(tensor: Tensor) -> Tensor:
    """What this process holds of it: all, where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """Whole tensors: unchanged where nothing is sharded; else all processes call it and the first one gets them,
    on the CPU, one tensor at a time on the device."""
    if not any(isinstance(t, DTensor) for t in tensors.values()):
        return tensors
    whole = {}
    for name, tensor in tensors.items():
        value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if world.is_first:
            whole[name] = value.detach().cpu()
    return whole


def dealt_like(value: Tensor, held: Tensor) -> Tensor:
    """This process's share of a whole tensor, split as `held` is, without communication."""
    if not isinstance(held, DTensor) or isinstance(value, DTensor):
        return value
    whole = value.to(held.device)
    return distribute_tensor(whole, held.device_mesh, held.placements, src_data_rank=None)


def dealt_to(module: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole weights by name as the module holds them."""
    held = module.state_dict()
    return {name: dealt_like(t, held[name]) if name in held else t for name, t in weights.items()}


def deal_optimizer_state(optimizer: torch.optim.Optimizer, values: dict[int, dict[str, Any]]) -> None:
    """Cuts whole optimiser tensors (by the number of their parameter) into shares, in place."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, state in values.items():
        parameter = parameters[number]
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim:
                state[name] = dealt_like(value, parameter)
