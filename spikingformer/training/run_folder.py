"""A run's folder: one writer at a time, how the run was made, its curves and its checkpoints."""

import json
import os
import platform
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from spikingformer.files import remove_leftovers, write_atomic
from spikingformer.training.machine import describe_machine
from spikingformer.training.recipe import Recipe, save_recipe
from spikingformer.training.state import PREVIOUS_FILE, STATE_FILE

try:
    import fcntl
except ModuleNotFoundError:  # not a POSIX system: files can be read there, `locked` says that nothing can be trained
    fcntl = None  # type: ignore[assignment]

RECIPE_FILE, RUN_FILE, METRICS_FILE, LOCK_FILE = "recipe.yaml", "run.json", "metrics.jsonl", ".lock"
BEST_FILE, LAST_FILE, RESULT_FILE = "best.safetensors", "last.safetensors", "result.json"
_FILES = (RECIPE_FILE, RUN_FILE, METRICS_FILE, BEST_FILE, LAST_FILE, RESULT_FILE, STATE_FILE, PREVIOUS_FILE)

_held: set[IO[str]] = set()


def _let_go_in_child() -> None:
    """A forked reader process must not keep the folder locked after its parent was killed."""
    for file in _held:
        file.close()
    _held.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_let_go_in_child)


def _hold(folder: Path) -> tuple[IO[str], bool]:
    """The folder's lock file, held, and whether the folder was made here. Raises as `locked` does."""
    if fcntl is None:
        raise ValueError(
            f"{folder}: training needs a POSIX system, such as Linux or macOS, whose file locks keep two runs apart, "
            f"and this is {platform.system()}: use one of those, or WSL"
        )
    while True:
        try:
            made = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            file = open(folder / LOCK_FILE, "a+")  # noqa: SIM115 (held by the caller)
        except OSError as error:
            raise ValueError(f"{folder}: cannot write there ({error.strerror}); choose another --output") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK_FILE)):
                return file, made
            file.close()  # its holder took the file away meanwhile
        except FileNotFoundError:
            file.close()
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "unknown process"
            file.close()
            raise ValueError(
                f"{folder}: another run is writing there ({holder}); choose another --output or wait for it"
            ) from None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder. The system releases it when the process ends, however it ends.

    What a killed run has left half-written is removed. A folder that was made here is removed after an error that left
    it empty.

    Raises:
        ValueError: another process holds it, or the folder cannot be written.
    """
    file, made = _hold(folder)
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        _held.add(file)
        for name in _FILES:
            remove_leftovers(folder / name)
            (folder / f".{name}.partial").unlink(missing_ok=True)  # an earlier version's
        try:
            yield
        except BaseException:
            with suppress(OSError):  # the error that is on its way says more
                if made and [path.name for path in folder.iterdir()] == [LOCK_FILE]:
                    (folder / LOCK_FILE).unlink()
                    folder.rmdir()
            raise
        finally:
            _held.discard(file)


def has_state(folder: Path) -> bool:
    return any((folder / name).exists() for name in (STATE_FILE, PREVIOUS_FILE))


def has_run(folder: Path) -> bool:
    return has_state(folder) or (folder / RECIPE_FILE).exists()


def start_run(folder: Path, recipe: Recipe) -> None:
    """Writes how the run is made: the whole recipe; the command, the time and the machine with its versions."""
    save_recipe(recipe, folder / RECIPE_FILE)
    description = {
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": describe_machine(),
    }
    write_atomic(folder / RUN_FILE, json.dumps(description, indent=2).encode())


def read_run_record(folder: Path) -> dict[str, Any]:
    """What `start_run` noted in run.json; {}: no such file. Raises ValueError for a damaged one."""
    path = folder / RUN_FILE
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError
    except ValueError:
        raise ValueError(f"{path}: damaged, not a JSON object: remove it, the other files do not need it") from None
    return record


class MetricsFile:
    """metrics.jsonl: one record a line. A resumed run drops what an earlier attempt wrote beyond its state."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS_FILE

    def drop_after(self, global_step: int, epoch: int) -> None:
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # a line cut off by a kill
                continue
            ended_later = record.get("kind") == "epoch" and record.get("epoch", 0) >= epoch
            if record.get("global_step", 0) <= global_step and not ended_later:
                kept.append(line)
        write_atomic(self.path, "".join(line + "\n" for line in kept).encode())

    def write(self, record: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
