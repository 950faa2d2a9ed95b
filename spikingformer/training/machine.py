"""What a result was measured on: it travels with every figure."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from spikingformer.training.checkpoint import versions

_PACKAGE = Path(__file__).resolve().parent.parent


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(["git", *args], cwd=_PACKAGE, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):  # no git here, or a slow disk
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def processor(counted: bool = False) -> str:
    """The processor's name; `counted`: followed by the number of logical ones, if the system lists them."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    if not names:
        return platform.processor() or platform.machine()
    return f"{names[0]} x{len(names)}" if counted else names[0]


def _gpu() -> str | None:
    try:
        return torch.cuda.get_device_name() if torch.cuda.is_available() else None
    except RuntimeError:  # a card that another process holds
        return None


def describe_machine() -> dict[str, Any]:
    """Time, system, processor, logical cores, instruction set, GPU, versions, commit and whether the package differed
    from it.

    For a copy of the source without its git history, the environment variable SPIKINGFORMER_COMMIT names the commit; a
    + at its end says that the copy differs from it.
    """
    told = os.environ.get("SPIKINGFORMER_COMMIT", "")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", str(_PACKAGE)) if not told else ""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "system": platform.platform(),
        "cpu": processor(counted=True),
        "cores": os.cpu_count(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "gpu": _gpu(),
        "versions": versions(),
        "commit": told.removesuffix("+") or _git("rev-parse", "--short", "HEAD"),
        "uncommitted_changes": bool(changed) or told.endswith("+"),
    }


def hardware(machine: dict[str, Any]) -> str:
    """The part of it that a table names."""
    return machine["gpu"] or machine["cpu"]


def machine_in_words(machine: dict[str, Any]) -> str:
    """A machine on one line, without the time and what is not known."""
    plain = {k: v for k, v in {**machine, **machine.get("versions", {})}.items() if v and k not in ("time", "versions")}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in plain.items())


def machine_of_run(record: dict[str, Any]) -> dict[str, Any]:
    """The machine in a run.json of any version; {}: it has none. Only what has a commit is from `describe_machine`."""
    return record.get("evidence") or record.get("machine") or {}  # "evidence": beside a shorter "machine", up to 0.1.0
