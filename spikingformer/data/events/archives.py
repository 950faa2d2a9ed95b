"""Unpacking the official archives: checksum first, no path out of the folder, size limits, all or nothing."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

_CHUNK = 1 << 20


class ArchiveError(ValueError):
    """An archive is not the official one, is damaged, or holds something that must not be unpacked."""


@dataclass(frozen=True)
class Archive:
    """An official file.

    file_name   as it is downloaded
    md5         its checksum
    unpacks_to  the folder it holds; "" for a file that is used as it is
    max_bytes   most that may come out of it
    url         where it is, "" if it is behind a form
    """

    file_name: str
    md5: str
    unpacks_to: str
    max_bytes: int = 0
    url: str = ""


def md5_of(path: Path) -> str:
    """The file's MD5, 32 hex digits."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def check_md5(path: Path, archive: Archive) -> None:
    """Raise ArchiveError unless the file has the official checksum."""
    found = md5_of(path)
    if found != archive.md5:
        raise ArchiveError(
            f"{path}: MD5 is {found}, the official file has {archive.md5} ({path.stat().st_size} bytes here). "
            "The download was cut off or is another file: get it again, or pass --skip-checksums if you trust it."
        )


def unpack(path: Path, archive: Archive, folder: Path, max_members: int = 200_000) -> Path:
    """Unpack `path` so that folder/archive.unpacks_to holds its files; the path of that folder.

    Everything goes to a temporary folder first and is renamed when it is whole. Raises ArchiveError for a damaged
    archive, links, devices, absolute paths, '..', another top folder, or more bytes or members than allowed.
    """
    target = folder / archive.unpacks_to
    if target.exists():
        raise ArchiveError(f"{target} exists already: delete it to unpack {path.name} again.")
    partial = folder / f".unpacking-{archive.unpacks_to}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        written = 0
        for number, (name, stream) in enumerate(_members(path)):
            if number >= max_members:
                raise ArchiveError(f"{path}: holds more than {max_members} files.")
            written += _write_member(partial, name, stream, archive.max_bytes - written, path)
        inside = sorted(entry.name for entry in partial.iterdir())
        if inside != [archive.unpacks_to]:
            raise ArchiveError(f"{path}: holds {inside[:5]}; expected the one folder {archive.unpacks_to!r}.")
        os.replace(partial / archive.unpacks_to, target)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise ArchiveError(f"{path}: is damaged or not an archive that can be read ({error}). Get it again.") from None
    except OSError as error:
        raise ArchiveError(f"{path}: cannot be unpacked to {folder} ({error.strerror or error}).") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _members(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """(name, content) of every regular file; anything but files and folders is an error."""
    if path.name.endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.is_dir() or info.filename.startswith("__MACOSX/"):
                    continue
                kind = stat.S_IFMT(info.external_attr >> 16)
                if kind not in (0, stat.S_IFREG):
                    raise ArchiveError(f"{path}: {info.filename!r} is not a regular file; nothing was unpacked.")
                with archive.open(info) as stream:
                    yield info.filename, stream
        return
    with tarfile.open(path, "r:*") as tar:
        for member in tar:
            if member.isdir():
                continue
            if not member.isreg():
                raise ArchiveError(f"{path}: {member.name!r} is not a regular file; nothing was unpacked.")
            content = tar.extractfile(member)
            assert content is not None  # a regular file always has content
            with content as stream:
                yield member.name, stream


def _write_member(folder: Path, name: str, stream: IO[bytes], allowed: int, archive_path: Path) -> int:
    parts = [part for part in PurePosixPath(name).parts if part != "."]
    unsafe = name.startswith(("/", "\\")) or ".." in parts or any("\\" in p or ":" in p or "\0" in p for p in parts)
    if unsafe or not parts or len(parts) > 8 or any(len(part) > 200 for part in parts):
        raise ArchiveError(f"{archive_path}: holds the unsafe path {name[:200]!r}; nothing was unpacked.")
    target = folder.joinpath(*parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with target.open("wb") as file:
        while chunk := stream.read(_CHUNK):
            written += len(chunk)
            if written > allowed:
                raise ArchiveError(f"{archive_path}: holds more data than the official file; nothing was unpacked.")
            file.write(chunk)
    return written
