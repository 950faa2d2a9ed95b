"""The whole state of a run in one file, so that weights, optimiser and position always belong together.

Tensors: model/*, ema/*, optimizer/<parameter>/<name>, group/<number>/<name>. Text: position, bests, counts, scaler,
recipe, versions.
The random generators need no saving: every draw is derived from the seed and the position (data/randomness.py,
and PyTorch's generators are re-seeded before each step).
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from spikingformer.files import keep_previous
from spikingformer.training.tensor_file import DESCRIPTION_KEY, read_tensors, write_tensors

FORMAT = "spikingformer-state-1"
STATE_FILE, PREVIOUS_FILE = "state.safetensors", "state.previous.safetensors"


@dataclass
class Progress:
    """Where a run stands. epoch and step name the next step to run; sums belong to the current epoch."""

    epoch: int = 0
    step: int = 0  # within the epoch
    global_step: int = 0  # optimiser steps tried
    updates: int = 0  # optimiser steps taken
    loss_sum: float = 0.0
    loss_samples: int = 0
    best_top1: float = -1.0
    best_epoch: int = -1
    skipped_steps: int = 0
    unreadable: int = 0
    step_backs: int = 0
    learning_rate_factor: float = 1.0
    finished: bool = False
    last_metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RunState:
    tensors: dict[str, torch.Tensor]
    optimizer: dict[str, Any]  # param_groups and the numbers in its state
    scaler: dict[str, Any]
    progress: Progress
    recipe: dict[str, Any]
    world_size: int
    versions: dict[str, str]
    data: dict[str, Any] | None = None  # what it was trained on (Inputs.identity); None in older states

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors by name and everything else as plain values."""
    whole = optimizer.state_dict()
    tensors, numbers = {}, {}
    for parameter, values in whole["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer/{parameter}/{name}"] = value
            else:
                numbers[f"{parameter}/{name}"] = value
    groups = []
    for number, group in enumerate(whole["param_groups"]):
        plain = {k: v for k, v in group.items() if isinstance(v, (int, float, str, bool, type(None)))}
        groups.append(plain)
        # some optimisers (timm's LAMB) count steps in a tensor of the group
        tensors |= {f"group/{number}/{k}": v for k, v in group.items() if isinstance(v, torch.Tensor)}
    return tensors, {"numbers": numbers, "groups": groups}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer,
    state: RunState,
    deal: Callable[[torch.optim.Optimizer, dict[int, dict[str, Any]]], None] | None = None,
) -> None:
    """Puts back what `pack_optimizer` gave; `deal` may change the values by parameter number before (shares)."""
    whole = optimizer.state_dict()
    values: dict[int, dict[str, Any]] = {}
    for name, tensor in state.part("optimizer/").items():
        parameter, _, key = name.partition("/")
        values.setdefault(int(parameter), {})[key] = tensor
    for name, number in state.optimizer["numbers"].items():
        parameter, _, key = name.partition("/")
        values.setdefault(int(parameter), {})[key] = number
    groups = [{**group, **saved} for group, saved in zip(whole["param_groups"], state.optimizer["groups"], strict=True)]
    for group, own in zip(groups, whole["param_groups"], strict=True):
        if "capturable" in own:  # of the device here, not of the one before
            group["capturable"] = own["capturable"]
    for name, tensor in state.part("group/").items():
        number, _, key = name.partition("/")
        groups[int(number)][key] = tensor
    if deal is not None:
        deal(optimizer, values)
    optimizer.load_state_dict({"state": values, "param_groups": groups})


def save_state(folder: Path, state: RunState) -> None:
    """Writes atomically; the state before it stays as state.previous.safetensors.

    Raises:
        ValueError: disk full, no permission; the old state is untouched.
    """
    text = {
        "format": FORMAT,
        "optimizer": state.optimizer,
        "scaler": state.scaler,
        "progress": asdict(state.progress),
        "recipe": state.recipe,
        "world_size": state.world_size,
        "versions": state.versions,
        "data": state.data,
    }
    try:
        keep_previous(folder / STATE_FILE, folder / PREVIOUS_FILE)
        write_tensors(folder / STATE_FILE, state.tensors, {DESCRIPTION_KEY: json.dumps(text, sort_keys=True)})
    except OSError as error:
        size = sum(tensor.numel() * tensor.element_size() for tensor in state.tensors.values())
        kept = (
            "The checkpoint before it is intact" if (folder / STATE_FILE).exists() else "There is no earlier checkpoint"
        )
        raise ValueError(
            f"{folder / STATE_FILE}: the checkpoint could not be written ({error.strerror or error}); it needs "
            f"{size / 1e6:.1f} MB there besides the old one. {kept}: free some space, then continue with --resume."
        ) from None


def _read(path: Path) -> RunState:
    tensors, metadata = read_tensors(path)
    try:
        text = json.loads(metadata[DESCRIPTION_KEY])
        if text["format"] != FORMAT:
            raise KeyError("format")
        return RunState(
            tensors,
            text["optimizer"],
            text["scaler"],
            Progress(**text["progress"]),
            text["recipe"],
            text["world_size"],
            text["versions"],
            text.get("data"),
        )
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: not a training state of this version ({FORMAT})") from None


def load_state(folder: Path) -> tuple[RunState | None, str | None]:
    """The newest intact state, and a warning if it is not the newest file. (None, None): no state yet.

    Raises:
        ValueError: there are states, but all are damaged; names them.
    """
    paths = [path for path in (folder / STATE_FILE, folder / PREVIOUS_FILE) if path.exists()]
    problems = []
    for path in paths:
        try:
            state = _read(path)
        except ValueError as error:
            problems.append(str(error))
        else:
            return state, (f"{problems[0]}\nContinuing from {path.name}, one checkpoint earlier." if problems else None)
    if problems:
        raise ValueError("\n".join([*problems, f"No intact checkpoint in {folder}: start again in another folder."]))
    return None, None
