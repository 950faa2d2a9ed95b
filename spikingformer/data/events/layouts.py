"""The official folder layouts: which samples a data set's folder holds and in which part each is."""

from __future__ import annotations

import math
import re
from pathlib import Path

from .arrays import EventFileError, read_bytes
from .gesture_trials import read_trials
from .samples import EventSample, cut_windows


class LayoutError(ValueError):
    """A folder does not hold the data set in its official layout; the text names what is missing."""


def _folder(root: Path, inner: str, sign: str) -> Path:
    """`root` or root/inner, whichever holds `sign`."""
    for folder in (root, root / inner):
        if (folder / sign).exists():
            return folder
    raise LayoutError(f"{root} holds neither {sign} nor {inner}/{sign}: it is not the unpacked data set.")


def gesture_samples(root: Path, class_names: tuple[str, ...]) -> list[EventSample]:
    """DVS128 Gesture: one sample a row of the label files, train and test as trials_to_{train,test}.txt say."""
    folder = _folder(root, "DvsGesture", "trials_to_train.txt")
    samples = []
    for part in ("train", "test"):
        for name in _listed_trials(folder / f"trials_to_{part}.txt"):
            path = folder / name
            labels = folder / f"{path.stem}_labels.csv"
            missing = [file.name for file in (path, labels) if not file.is_file()]
            if missing:
                raise LayoutError(f"{folder} lacks {', '.join(missing)}, which trials_to_{part}.txt lists.")
            for trial in read_trials(labels, len(class_names)):
                group = path.stem.split("_")[0]
                samples.append(EventSample(path, trial.label, part, trial.start_us, trial.end_us, group))
    return samples


def _listed_trials(path: Path) -> list[str]:
    names = [line.strip() for line in read_bytes(path).decode("ascii", "replace").splitlines() if line.strip()]
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+\.aedat", name):
            raise EventFileError(path, f"lists {name[:80]!r}; expected names like user01_led.aedat.")
    if len(set(names)) != len(names) or not names:
        raise EventFileError(path, f"lists {len(names)} recordings, {len(set(names))} different ones.")
    return names


GESTURE_WINDOW_US = 200_000


def gesture_windows(root: Path, class_names: tuple[str, ...]) -> list[EventSample]:
    """DVS128 Gesture cut into windows of 0.2 s: training ones every 25 ms, test ones every 100 ms."""
    samples = gesture_samples(root, class_names)
    train = cut_windows([s for s in samples if s.part == "train"], GESTURE_WINDOW_US, 25_000)
    return train + cut_windows([s for s in samples if s.part == "test"], GESTURE_WINDOW_US, 100_000)


def _cifar10dvs_files(root: Path, class_names: tuple[str, ...]) -> list[tuple[int, list[Path]]]:
    folder = _folder(root, "CIFAR10DVS", class_names[0])
    found = []
    for label, name in enumerate(class_names):
        files = sorted((folder / name).glob("[!.]*.aedat"), key=lambda path: path.name)
        if len(files) < 2:
            raise LayoutError(f"{folder / name} holds {len(files)} recordings; unpack {name}.zip there first.")
        found.append((label, files))
    return found


def cifar10dvs_published(root: Path, class_names: tuple[str, ...]) -> list[EventSample]:
    """CIFAR10-DVS, the published split: of each class the first ceil(0.9 n) by sorted name train, the rest test."""
    samples = []
    for label, files in _cifar10dvs_files(root, class_names):
        train = math.ceil(len(files) * 9 / 10)
        samples += [EventSample(path, label, "train" if i < train else "test") for i, path in enumerate(files)]
    return samples


def cifar10dvs_first_hundred(root: Path, class_names: tuple[str, ...]) -> list[EventSample]:
    """CIFAR10-DVS, the second split in use: recordings 0..99 of each class test, the others train."""
    samples = []
    for label, files in _cifar10dvs_files(root, class_names):
        for path in files:
            number = re.search(r"_(\d+)$", path.stem)
            if not number:
                raise LayoutError(f"{path} has no number at its end: expected cifar10_CLASS_NUMBER.aedat.")
            samples.append(EventSample(path, label, "test" if int(number.group(1)) < 100 else "train"))
    return samples


def nmnist_samples(root: Path, class_names: tuple[str, ...]) -> list[EventSample]:
    """N-MNIST: Train/DIGIT/*.bin and Test/DIGIT/*.bin."""
    folder = _folder(root, "NMNIST", "Train")
    samples = []
    for part in ("train", "test"):
        for label, name in enumerate(class_names):
            files = sorted((folder / part.capitalize() / name).glob("[!.]*.bin"), key=lambda path: path.name)
            if not files:
                raise LayoutError(
                    f"{folder / part.capitalize() / name} holds no .bin file: unpack the zips there first."
                )
            samples += [EventSample(path, label, part) for path in files]
    return samples


def nmnist_listed(root: Path, class_names: tuple[str, ...]) -> list[EventSample]:
    """N-MNIST as SLAYER ships a sample of it: NUMBER.bs2 files, and lists train100.txt and test100.txt."""
    folder = _folder(root, "nmnist_slayer", "train100.txt")
    samples = []
    for part in ("train", "test"):
        path = folder / f"{part}100.txt"
        for line in read_bytes(path).decode("ascii", "replace").splitlines():
            if line.strip() and not line.startswith("#"):
                match = re.fullmatch(r"\s*(\d{1,9})\s+(\d{1,3})\s*", line)
                if not match or int(match.group(2)) >= len(class_names):
                    raise EventFileError(path, f"holds the line {line[:80]!r}; expected a number and a class.")
                sample = folder / f"{match.group(1)}.bs2"
                if not sample.is_file():
                    raise LayoutError(f"{folder} lacks {sample.name}, which {path.name} lists.")
                samples.append(EventSample(sample, int(match.group(2)), part))
    return samples
