"""Files that are whole or not there, whenever the process or the machine stops."""

import contextlib
import os
from pathlib import Path


def write_atomic(path: Path, content: bytes) -> None:
    """Writes beside `path`, flushes to disk, renames over it.

    Raises:
        OSError: as the system reports it; the old file is untouched and the partial one removed.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        error.filename = error.filename or str(path)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames in `folder` survive a power cut (where the system can sync folders)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def keep_previous(path: Path, previous: Path) -> None:
    """Lets `previous` name today's `path` as well; `path` is there at every moment."""
    if not path.exists():
        return
    temporary = previous.with_name(f".{previous.name}.partial")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        write_atomic(previous, path.read_bytes())
        return
    os.replace(temporary, previous)
