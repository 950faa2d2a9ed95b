"""One process of several: torchrun's or SLURM's environment, collective sums, one process that speaks."""

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

_Item = TypeVar("_Item")


class LostProcess(ValueError):
    """Another process of the run has ended."""


@dataclass(frozen=True)
class World:
    """This process among all of a run. local_rank: on this machine; restarts: by torchrun after a failure."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    restarts: int = 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def read_world(environment: dict[str, str] | None = None) -> World:
    """torchrun's variables, else SLURM's (several tasks), else a single process.

    Raises:
        ValueError: SLURM with several tasks but no MASTER_ADDR.
    """
    env = dict(os.environ) if environment is None else environment
    if "RANK" in env and "WORLD_SIZE" in env:
        return World(
            int(env["RANK"]),
            int(env["WORLD_SIZE"]),
            int(env.get("LOCAL_RANK", "0")),
            int(env.get("TORCHELASTIC_RESTART_COUNT", "0")),
        )
    if int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        if "MASTER_ADDR" not in env:
            raise ValueError(
                f"SLURM started {env['SLURM_NTASKS']} tasks, but MASTER_ADDR is not set: export MASTER_ADDR="
                "$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n1) and MASTER_PORT=29500 in the job script"
            )
        return World(
            int(env["SLURM_PROCID"]),
            int(env["SLURM_NTASKS"]),
            int(env.get("SLURM_LOCALID", "0")),
            int(env.get("SLURM_RESTART_COUNT", "0")),
        )
    return World()


@contextmanager
def process_group(world: World, device: torch.device) -> Iterator[None]:
    """Joins the other processes inside the block (nothing for a single one)."""
    if world.size == 1:
        yield
        return
    os.environ.setdefault("RANK", str(world.rank))
    os.environ.setdefault("WORLD_SIZE", str(world.size))
    os.environ.setdefault("MASTER_PORT", "29500")
    try:
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = _store_of_this_attempt(world)
        if store is None:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size)
        yield
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        raise LostProcess(
            f"process {world.rank} of {world.size}: another process of this run has ended ({_first_line(error)}). "
            "Its own message says why. The last checkpoint is intact: start again with --resume; "
            "under `torchrun --max-restarts N` this is done automatically."
        ) from None
    finally:
        if dist.is_initialized():
            leave_group()


def leave_group(group: dist.ProcessGroup | None = None) -> None:
    """Destroys a group (default: that of all processes), whose collectives are over.

    Gloo's threads give back their last tensors under Python's lock. A group that goes away at that moment holds the
    lock and waits for them, forever (seen with PyTorch 2.11): so they get time first.
    """
    time.sleep(0.1)
    dist.destroy_process_group(group)


def _store_of_this_attempt(world: World) -> dist.Store | None:
    """torchrun's own store outlives a restart, with the addresses of processes that are gone: keep attempts apart.

    None: no torchrun, PyTorch makes a fresh store.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world.size, is_master=False)
    return dist.PrefixStore(f"spikingformer/attempt{world.restarts}", store)


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone (gloo and NCCL say so in their text only)."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return any(words in text for words in ("gloo", "nccl", "connection closed by peer", "connection reset by peer"))


def _first_line(error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def sum_over_processes(values: torch.Tensor, world: World) -> torch.Tensor:
    """Element-wise sum over all processes (float64 sums of counts are exact)."""
    if world.size > 1:
        dist.all_reduce(values)
    return values


def agree_to_start(world: World, problem: str | None) -> None:
    """The first process tells all others whether it may write; nobody waits for one that has left.

    Raises:
        ValueError: in every process, with the first one's problem.
    """
    if world.size > 1:
        told = [problem]
        dist.broadcast_object_list(told, src=0)
        problem = told[0]
    if problem is not None:
        raise ValueError(problem)


def barrier(world: World) -> None:
    if world.size > 1:
        dist.barrier()


def in_step(own: Iterable[_Item], device: torch.device) -> Iterator[_Item | None]:
    """Every process's own items, then None until the last process has used up its own.

    For forward passes in which all processes take part, though their numbers of batches differ.
    """
    iterator = iter(own)
    while True:
        item = next(iterator, None)
        left = torch.tensor(float(item is not None), device=device)
        dist.all_reduce(left)
        if not left:
            return
        yield item
