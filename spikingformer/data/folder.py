"""Pictures in files, one folder a class, listed by timm's reader."""

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

_TRAIN_NAMES, _TEST_NAMES = ("train", "training"), ("val", "validation", "test")


@dataclass(frozen=True)
class UnreadablePicture:
    """Stands for a file that could not be decoded, with the reason."""

    file: str
    reason: str


def decode_picture(stream: BinaryIO, channels: int, name: str) -> Image.Image | UnreadablePicture:
    """An RGB (3 channels) or grey (1 channel) picture, fully decoded."""
    try:
        picture = _to_eight_bits(Image.open(stream))
        return picture.convert("L" if channels == 1 else "RGB")
    except UnidentifiedImageError:  # its own text shows a Python object
        return UnreadablePicture(name, "not a picture of a known format")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, EOFError) as error:
        return UnreadablePicture(name, str(error))  # Pillow raises SyntaxError for some broken PNG files


def _to_eight_bits(picture: Image.Image) -> Image.Image:
    """Grey pictures of 16 bits scaled to 8: Pillow's own conversion would make everything above 255 white."""
    if not picture.mode.startswith(("I", "F")):
        return picture
    values = np.asarray(picture)
    if picture.mode.startswith("I;16") or (picture.mode == "I" and values.min() >= 0 and 255 < values.max() < 2**16):
        return Image.fromarray(np.rint(values / 257).astype(np.uint8))
    if picture.mode == "I" and values.min() >= 0 and values.max() < 256:
        return Image.fromarray(values.astype(np.uint8))
    raise ValueError(
        f"values from {values.min()} to {values.max()} (Pillow's mode {picture.mode}): expected 8 or 16 bits a channel"
    )


class PictureFiles:
    """A labelled list of picture files, `files[i]` -> (picture or UnreadablePicture, label)."""

    def __init__(self, root: Path, channels: int, class_to_index: dict[str, int] | None = None) -> None:
        """
        Args:
            root: a folder with one folder a class.
            class_to_index: the numbering to use (the training part's); None: names in sorted order.

        Raises:
            ValueError: missing, empty, or classes that the numbering lacks.
        """
        from timm.data.readers import create_reader

        self.root = root
        self.channels = channels
        try:
            self._reader = create_reader("", root=str(root))
        except RuntimeError as error:
            raise ValueError(f"{root}: no pictures found ({error}). Expected {root}/CLASS/PICTURE.jpg") from None
        found = {str(name): number for name, number in self._reader.class_to_idx.items()}
        names = {number: name for name, number in found.items()}
        numbering = class_to_index or found
        unknown = sorted(set(found) - set(numbering))
        if unknown:
            raise ValueError(
                f"{root}: {len(unknown)} classes that the training part lacks, first {unknown[0]!r} "
                f"(training has {len(numbering)}); remove them or complete the training part"
            )
        self.class_to_index = numbering
        self.labels = np.array([numbering[names[int(label)]] for _, label in self._reader.samples], dtype=np.int64)

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(sorted(self.class_to_index, key=self.class_to_index.__getitem__))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image | UnreadablePicture, int]:
        name = self._reader.filename(index, absolute=True)
        try:
            stream, _ = self._reader[index]
        except OSError as error:
            return UnreadablePicture(name, str(error)), int(self.labels[index])
        with stream:
            return decode_picture(stream, self.channels, name), int(self.labels[index])


def part_root(root: Path, part: str, archive: bool) -> Path:
    """`root`/train or `root`/val (or test, validation); with `archive` the .tar of that name.

    Raises:
        ValueError: nothing of that name; says what lies there instead.
    """
    names = _TRAIN_NAMES if part == "train" else _TEST_NAMES
    suffix = ".tar" if archive else ""
    if not root.is_dir():
        raise ValueError(f"no folder {root} (data.root). Set data.root=FOLDER to where {names[0]}{suffix} lies.")
    for name in names:
        candidate = root / f"{name}{suffix}"
        if candidate.is_file() if archive else candidate.is_dir():
            return candidate
    there = ", ".join(sorted(entry.name for entry in root.iterdir())[:8]) or "nothing"
    raise ValueError(
        f"{root}: no {' or '.join(name + suffix for name in names)} in it (it holds: {there}). "
        f"Expected {root}/{names[0]}{suffix}" + ("" if archive else "/CLASS/PICTURE.jpg")
    )
