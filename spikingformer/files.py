"""Files that are whole or not there, whenever the process or the machine stops."""

import contextlib
import glob
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

PARTIAL = ".partial-"  # the names of temporary files begin with it
_ABANDONED_AFTER = 3600.0  # seconds without a write


@contextlib.contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[Path]:
    """A temporary path beside `path` to write to; at the block's end it is flushed to disk and renamed over `path`.

    Its name has the suffix of `path` and belongs to this call alone, so that two writers do not meet. What writers of
    the same path that were killed over an hour ago have left is removed.

    durable: False leaves the flushing to the system, for many small files that are cheap to make again.

    Raises:
        OSError: as the system reports it.
        After this or any other error the old file is untouched and the temporary one removed.
    """
    if path.name.startswith(PARTIAL):  # inside another call, which renames it
        yield path
        return
    remove_leftovers(path, _ABANDONED_AFTER)
    temporary = _new_name(path)
    try:
        yield temporary
        if durable:
            move_into_place(temporary, path)
        else:
            os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a whole file as `replacing` does. Raises OSError."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def move_into_place(written: Path, path: Path) -> None:
    """Flushes a written file to disk and renames it over `path`, which is on the same file system."""
    with open(written, "r+b") as file:  # Windows flushes only what may be written
        os.fsync(file.fileno())
    os.replace(written, path)
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
    if not path.exists() or (previous.exists() and path.samefile(previous)):  # the latter after a kill
        return
    temporary = _new_name(previous)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        write_atomic(previous, path.read_bytes())
        return
    os.replace(temporary, previous)


def remove_leftovers(path: Path, seconds: float = 0.0) -> None:
    """Removes temporary files of `path` to which nothing has been written for so long. With 0, the caller must know
    that nobody is writing `path`."""
    for leftover in path.parent.glob(f"{PARTIAL}*-{glob.escape(path.name)}"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime >= seconds:
                leftover.unlink()


def _new_name(path: Path) -> Path:
    return path.with_name(f"{PARTIAL}{secrets.token_hex(4)}-{path.name}")
