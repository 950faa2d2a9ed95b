"""Pictures inside tars as a numbered list: WebDataset shards (KEY.jpg and KEY.cls), or one tar with a folder a class.

The shards are indexed once (place and size of every picture), then read at random places: any order, any process and
any step of an epoch, exactly, which a stream of shards cannot give. The index is kept beside the shards.
"""

import contextlib
import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from spikingformer.data.class_numbers import names_by_number, number_classes, refuse_unknown, timm_order
from spikingformer.data.folder import (
    MAX_PICTURE_BYTES,
    PICTURE_SUFFIXES,
    UnreadablePicture,
    decode_picture,
    is_hidden,
    suffixes_left_out,
)
from spikingformer.files import replacing

_LABEL = ".cls"


def shard_paths(root: Path, pattern: str, must_exist: bool = True) -> list[Path]:
    """The shards of a brace pattern such as train-{00000..00127}.tar.

    Raises:
        ValueError: a shard is missing (names the first) though it `must_exist`, or the pattern leads out of `root`.
    """
    from braceexpand import braceexpand

    names = list(braceexpand(pattern))
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in names):
        raise ValueError(f"data: shard pattern {pattern!r} points outside data.root")
    paths = [root / name for name in names]
    missing = [path for path in paths if not path.is_file()]
    if missing and must_exist:
        raise ValueError(
            f"{missing[0]}: no such shard ({len(missing)} of {len(paths)} are missing). Check data.root, "
            "data.train_shards and data.test_shards, or fetch the shards again"
        )
    return paths


def _members(path: Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The regular files of a tar, in its order.

    Raises:
        tarfile.TarError, OSError: damaged, or cut off; between two files that shows only in the missing end marker.
    """
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            if member.isreg():
                yield archive, member
        if path.stat().st_size <= archive.offset:
            raise tarfile.ReadError("the marker at the end of the archive is missing")


def _index_shard(path: Path) -> tuple[list[str], list[tuple[int, int, int]]]:
    """Keys, and (offset, bytes, label) of each picture of one shard."""
    pictures: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        for archive, member in _members(path):
            stem, dot, suffix = member.name.rpartition("/")[2].partition(".")
            key = member.name.removesuffix(dot + suffix)
            if f".{suffix.lower()}" in PICTURE_SUFFIXES and stem:
                if key in pictures:
                    raise ValueError(f"{key!r} has two pictures")
                pictures[key] = (member.offset_data, min(member.size, MAX_PICTURE_BYTES))
            elif f".{suffix}" == _LABEL and member.size <= 32:
                stream = archive.extractfile(member)
                assert stream is not None
                labels[key] = int(stream.read())
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path}: not a complete WebDataset shard ({error}); fetch it again") from None
    without = sorted(set(pictures) ^ set(labels))
    if without or not pictures:
        what = f"{without[0]!r} has no picture or no {_LABEL}" if without else "no pictures in it"
        raise ValueError(f"{path}: not a complete WebDataset shard: {what}; fetch it again")
    return list(pictures), [(*pictures[key], labels[key]) for key in pictures]


def _index(paths: list[Path], root: Path) -> np.ndarray:
    """int64 (pictures, 4): shard, offset, bytes, label; from the kept index if no shard has changed since."""
    described = [[str(p.relative_to(root)), p.stat().st_size, p.stat().st_mtime_ns] for p in paths]
    digest = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]
    kept = root / f".index-{digest}.npy"
    if kept.is_file():
        try:
            table = np.load(kept, allow_pickle=False)
            if table.ndim == 2 and table.shape[1] == 4 and table.dtype == np.int64:
                return table
        except (ValueError, OSError):
            pass  # damaged: made again below
    rows = [(number, *row) for number, path in enumerate(paths) for row in _index_shard(path)[1]]
    table = np.array(rows, dtype=np.int64)
    with contextlib.suppress(OSError), replacing(kept) as partial:  # a read-only folder: indexed again next time
        np.save(partial, table)
    return table


class ShardPictures:
    """Pictures of WebDataset shards, `shards[i]` -> (picture or UnreadablePicture, label)."""

    def __init__(self, root: Path, pattern: str, channels: int) -> None:
        self.channels = channels
        self.paths = shard_paths(root, pattern)
        self.table = _index(self.paths, root)
        self.labels = self.table[:, 3]
        if self.labels.min() < 0:
            raise ValueError(f"{root}: a picture has the class number {self.labels.min()}; class numbers start at 0")

    def left_out(self) -> Counter[str]:
        """Members that are neither picture nor label, by suffix."""
        names = (member.name.rpartition("/")[2] for path in self.paths for _, member in _members(path))
        rest = (name.partition(".")[2] for name in names)
        suffixes = Counter(f".{suffix}" if suffix else "no suffix" for suffix in rest)
        return Counter({s: n for s, n in suffixes.items() if s != _LABEL and s.lower() not in PICTURE_SUFFIXES})

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        shard, offset, size, label = (int(value) for value in self.table[index])
        name = f"{self.paths[shard]}[{offset}]"
        content = _read_at(self.paths[shard], offset, size)
        if isinstance(content, UnreadablePicture):
            return content, label
        return decode_picture(io.BytesIO(content), self.channels, name), label


def _read_at(path: Path, offset: int, size: int) -> bytes | UnreadablePicture:
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            content = file.read(size)
    except OSError as error:
        return UnreadablePicture(f"{path}[{offset}]", str(error))
    if len(content) < size:
        return UnreadablePicture(f"{path}[{offset}]", f"the archive is cut off: {len(content)} of {size} bytes")
    return content


class TarPictures:
    """Pictures of one tar with a folder a class, like PictureFiles; no cache files are read or left behind."""

    def __init__(
        self,
        path: Path,
        channels: int,
        class_to_index: dict[str, int] | None = None,
        numbered_by: str = "training part",
    ) -> None:
        """
        Args:
            class_to_index: the numbering to use; None: `number_classes` of what is there.
            numbered_by: whose numbering that is, for messages.

        Raises:
            ValueError: not a tar, no pictures in class folders, or classes that the numbering lacks.
        """
        self.path = path
        self.channels = channels
        self.names: list[str] = []
        places: list[tuple[int, int]] = []
        classes: list[str] = []
        try:
            for member in sorted((member for _, member in _members(path)), key=lambda entry: timm_order(entry.name)):
                parts = Path(member.name).parts
                picture = Path(member.name).suffix.lower() in PICTURE_SUFFIXES and not is_hidden(member.name)
                if len(parts) > 1 and picture:
                    self.names.append(member.name)
                    places.append((member.offset_data, min(member.size, MAX_PICTURE_BYTES)))
                    classes.append(parts[-2])
        except (tarfile.TarError, EOFError, OSError) as error:
            raise ValueError(f"{path}: not a complete tar ({error}); fetch it again") from None
        if not places:
            raise ValueError(f"{path}: no pictures found. Expected CLASS/PICTURE.jpg in it")
        numbering = class_to_index or number_classes(classes)
        refuse_unknown(classes, numbering, str(path), numbered_by)
        self.class_to_index = numbering
        self.labels = np.array([numbering[name] for name in classes], dtype=np.int64)
        self.places = np.array(places, dtype=np.int64)

    @property
    def class_names(self) -> tuple[str, ...]:
        return names_by_number(self.class_to_index)

    def left_out(self) -> Counter[str]:
        """Members that are not read as pictures, by suffix."""
        names = [member.name for _, member in _members(self.path)]
        found = suffixes_left_out(names)
        if outside := len(names) - found.total() - len(self):
            found["picture outside a class folder"] = outside
        return found

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        offset, size = (int(value) for value in self.places[index])
        content = _read_at(self.path, offset, size)
        label = int(self.labels[index])
        if isinstance(content, UnreadablePicture):
            return content, label
        return decode_picture(io.BytesIO(content), self.channels, f"{self.path}:{self.names[index]}"), label


def class_names(root: Path) -> tuple[str, ...] | None:
    """The lines of root/classes.txt; None: it is not there."""
    file = root / "classes.txt"
    if not file.is_file():
        return None
    return tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
