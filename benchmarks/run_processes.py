"""Real training runs in processes of their own, started in milliseconds: one process imports, the others are forked."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "benchmarks.run_processes",
        "spikingformer.cli.train",
        "spikingformer.training.run",
        "sklearn.datasets",
        "timm.optim",
        "timm.scheduler",
        "torch._dynamo",
    ]
)
RECIPE = "recipes/digits/spikingformer_cml.yaml"
SMALL = (
    "model.embed_dim=16",
    "model.depth=1",
    "model.num_heads=2",
    "model.time_steps=2",
    "data.image_size=8",
    "threads=1",
    "log.tensorboard=false",
    "log.every_steps=1",
    "schedule.warmup_epochs=0",
    "device=cpu",
)
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")


def train_process(
    arguments: list[str], environment: dict[str, str], log: str, prepare: Callable[[], None] | None
) -> None:
    """Body of a process: `spikingformer train` with stdout and stderr in `log`; `prepare` plants a fault."""
    from spikingformer.cli import main

    for name in list(os.environ):
        if name in _LAUNCHER or name.startswith("SLURM_"):
            del os.environ[name]
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    status = main(arguments)
    sys.stdout.flush()
    os._exit(status)


def start(
    folder: Path,
    overrides: tuple[str, ...] = (),
    resume: bool = False,
    prepare: Callable[[], None] | None = None,
    ranks: int = 1,
    recipe: str = RECIPE,
) -> list[BaseProcess]:
    """Starts a run into `folder`; its words go to <folder>.log (<folder>.<rank>.log with several ranks)."""
    arguments = ["train", recipe, *overrides, "--output", str(folder), *(["--resume"] if resume else [])]
    port = str(_free_port())
    processes: list[BaseProcess] = []
    for rank in range(ranks):
        world = (
            {
                "RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            if ranks > 1
            else {}
        )
        log = f"{folder}.{rank}.log" if ranks > 1 else f"{folder}.log"
        process = CONTEXT.Process(target=train_process, args=(arguments, world, log, prepare))
        process.start()
        processes.append(process)
    return processes


def finish(processes: list[BaseProcess], timeout: float = 120) -> list[int | None]:
    """Exit codes; whoever is not done in time is killed."""
    for process in processes:
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def complete(folder: Path, overrides: tuple[str, ...] = (), **options: Any) -> list[int | None]:
    return finish(start(folder, overrides, **options))


def words(folder: Path, rank: int | None = None) -> str:
    path = Path(f"{folder}.log" if rank is None else f"{folder}.{rank}.log")
    return path.read_text() if path.exists() else ""


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor that a run leaves: state (weights, average, optimiser), best and last weights."""
    from spikingformer.training.tensor_file import read_tensors

    found = {}
    for name in ("state", "best", "last"):
        tensors, _ = read_tensors(folder / f"{name}.safetensors")
        found |= {f"{name}:{key}": value for key, value in tensors.items()}
    return found


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names that only one has, or whose bits differ."""
    return sorted(set(a) ^ set(b)) + [k for k in sorted(set(a) & set(b)) if not torch.equal(a[k], b[k])]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
