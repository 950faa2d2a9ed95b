"""Pictures in files, one folder a class, listed by timm's reader."""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from spikingformer.data.class_numbers import names_by_number, number_classes, refuse_unknown, timm_order

# of what is read as a picture, in folders, tars and shards; files may have them in upper case
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
MAX_PICTURE_BYTES = 64 << 20  # in archives: the largest of ImageNet has 15 MB
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

    def __init__(
        self,
        root: Path,
        channels: int,
        class_to_index: dict[str, int] | None = None,
        numbered_by: str = "training part",
    ) -> None:
        """
        A picture's class is the folder that holds it, however deep that lies (timm's rule). Hidden files are left out.

        Args:
            root: a folder with one folder a class.
            class_to_index: the numbering to use; None: `number_classes` of what is there.
            numbered_by: whose numbering that is, for messages.

        Raises:
            ValueError: missing, empty, a folder found by two paths, or classes that the numbering lacks.
        """
        from timm.data.readers.reader_image_folder import find_images_and_targets

        self.root = root
        self.channels = channels
        samples, found = find_images_and_targets(str(root), types=PICTURE_SUFFIXES, sort=False)
        samples = [(path, label) for path, label in samples if not is_hidden(path)]
        _refuse_loops(root, {os.path.dirname(path) for path, _ in samples})
        if not samples:
            raise ValueError(
                f"{root}: no pictures found ({', '.join(PICTURE_SUFFIXES)}). Expected {root}/CLASS/PICTURE.jpg"
            )
        numbering = class_to_index or number_classes(found)
        refuse_unknown(found, numbering, str(root), numbered_by)
        self.class_to_index = numbering
        names = {number: name for name, number in found.items()}
        samples.sort(key=lambda sample: timm_order(sample[0]))
        self.paths = [path for path, _ in samples]
        self.labels = np.array([numbering[names[number]] for _, number in samples], dtype=np.int64)

    @property
    def class_names(self) -> tuple[str, ...]:
        return names_by_number(self.class_to_index)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image | UnreadablePicture, int]:
        path, label = self.paths[index], int(self.labels[index])
        try:
            with open(path, "rb") as stream:
                return decode_picture(stream, self.channels, path), label
        except OSError as error:
            return UnreadablePicture(path, str(error)), label

    def left_out(self) -> Counter[str]:
        """Files that are not read as pictures, by suffix."""
        names = (name for _, _, files in os.walk(self.root, followlinks=True) for name in files)
        return suffixes_left_out(names)


def _refuse_loops(root: Path, folders: set[str]) -> None:
    """Raises ValueError where symbolic links lead to the same folder twice: its pictures would be counted twice."""
    seen: dict[str, str] = {}
    for folder in sorted(folders, key=len):
        first = seen.setdefault(os.path.realpath(folder), folder)
        if first != folder:
            raise ValueError(f"{root}: {first} and {folder} are the same folder: remove the symbolic link between them")


def is_hidden(name: str) -> bool:
    """Whether a file's name starts with a dot, as those that macOS leaves beside the real ones."""
    return name.rpartition("/")[2].startswith(".")


def suffixes_left_out(names: Iterable[str]) -> Counter[str]:
    """How many names have each suffix that is not one of a picture."""
    kinds = ("hidden" if is_hidden(n) else os.path.splitext(n)[1].lower() or "no suffix" for n in names)
    return Counter(kind for kind in kinds if kind not in PICTURE_SUFFIXES)


def part_root(root: Path, part: str, archive: bool) -> Path:
    """`root`/train or `root`/val (or test, validation); with `archive` the .tar of that name.

    Raises:
        ValueError: nothing of that name; says what lies there instead.
    """
    names = _TRAIN_NAMES if part == "train" else _TEST_NAMES
    suffix = ".tar" if archive else ""
    if not root.is_dir():
        raise ValueError(
            f"no folder {root} (data.root). Set data.root=FOLDER (evaluate, energy: --root FOLDER) to where "
            f"{names[0]}{suffix} lies."
        )
    for name in names:
        candidate = root / f"{name}{suffix}"
        if candidate.is_file() if archive else candidate.is_dir():
            return candidate
    there = ", ".join(sorted(entry.name for entry in root.iterdir())[:8]) or "nothing"
    raise ValueError(
        f"{root}: no {' or '.join(name + suffix for name in names)} in it (it holds: {there}). "
        f"Expected {root}/{names[0]}{suffix}" + ("" if archive else "/CLASS/PICTURE.jpg")
    )
