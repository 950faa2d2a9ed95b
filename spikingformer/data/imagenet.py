"""The official ILSVRC2012 archives into the folder layout: train/WNID/*.JPEG and val/WNID/*.JPEG.

Names from the archives are matched whole against the official pattern, so none can lead out of the folder.
A class folder is written under a temporary name and renamed when complete: if killed and run again, it continues.
"""

import io
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from spikingformer.data.folder import MAX_PICTURE_BYTES

TRAIN_TAR, VAL_TAR, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
CLASSES, TRAIN_PICTURES, VAL_PICTURES = 1000, 1_281_167, 50_000
_MAX_MEMBERS = 2_000_000
_CLASS_TAR = re.compile(r"(n\d{8})\.tar")
_TRAIN_PICTURE = re.compile(r"n\d{8}_\d+\.JPEG")
_VAL_PICTURE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")

Report = Callable[[str], None]


@dataclass(frozen=True)
class Counts:
    classes: int
    train: int
    val: int


def _open(source: Path, name: str) -> tarfile.TarFile:
    path = source / name
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file. {source} must hold {TRAIN_TAR}, {VAL_TAR} and {DEVKIT}, from the ImageNet site "
            "(with an account there)."
        )
    try:
        return tarfile.open(path)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path}: not a readable archive ({error}); download it again") from None


def _name(archive: tarfile.TarFile) -> str:
    return os.fsdecode(archive.name) if archive.name else "archive"


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo, limit: int = MAX_PICTURE_BYTES) -> bytes:
    if not member.isreg():
        raise ValueError(f"{_name(archive)}: {member.name!r} is a link or device; the official archive has none")
    if member.size > limit:
        raise ValueError(f"{_name(archive)}: {member.name!r} has {member.size} bytes, at most {limit} are expected")
    stream = archive.extractfile(member)
    assert stream is not None
    content = stream.read()
    if len(content) != member.size:
        raise ValueError(f"{_name(archive)}: ends inside {member.name!r}; download it again")
    return content


def unpack_train(source: Path, target: Path, report: Report) -> None:
    """The tar of class tars; classes that are there already are left as they are."""
    folder = target / "train"
    folder.mkdir(parents=True, exist_ok=True)
    with _open(source, TRAIN_TAR) as outer:
        try:
            for number, member in enumerate(outer):
                match = _CLASS_TAR.fullmatch(member.name)
                if match is None or number >= _MAX_MEMBERS:
                    raise ValueError(
                        f"{_name(outer)}: contains {member.name!r}: not the official archive; nothing of it was written"
                    )
                if (folder / match[1]).exists():
                    continue
                _unpack_class(_content(outer, member, 1 << 30), match[1], folder)
                report(f"train: {number + 1} of {CLASSES} classes")
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(
                f"{_name(outer)}: damaged ({error}); download it again, what is unpacked so far is kept"
            ) from None


def _unpack_class(content: bytes, wnid: str, folder: Path) -> None:
    partial = folder.parent / f".partial-{wnid}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    with tarfile.open(fileobj=io.BytesIO(content)) as inner:
        for picture in inner:
            if not _TRAIN_PICTURE.fullmatch(picture.name):
                raise ValueError(
                    f"{wnid}.tar: contains {picture.name!r}: not an official class archive; nothing of it was kept"
                )
            (partial / picture.name).write_bytes(_content(inner, picture))
    partial.rename(folder / wnid)


def read_ground_truth(source: Path) -> list[str]:
    """The WNID of each validation picture, in order, from the development kit."""
    from scipy.io import loadmat

    with _open(source, DEVKIT) as kit:
        files: dict[str, bytes] = {}
        for member in kit:
            if member.name.endswith(("data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt")):
                files[member.name.rsplit("/", 1)[-1]] = _content(kit, member)
    try:
        synsets = loadmat(io.BytesIO(files["meta.mat"]), squeeze_me=True)["synsets"]
        names = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        found = [names[int(line)] for line in files["ILSVRC2012_validation_ground_truth.txt"].split()]
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{source / DEVKIT}: not the official development kit ({error}); download it again") from None
    bad = next((name for name in found if not re.fullmatch(r"n\d{8}", name)), None)
    if bad is not None:
        raise ValueError(f"{source / DEVKIT}: {bad!r} is not a WNID")
    return found


def unpack_val(source: Path, target: Path, report: Report) -> None:
    """The flat tar of validation pictures, sorted into class folders by the development kit."""
    folder = target / "val"
    if folder.exists():
        return
    truth = read_ground_truth(source)
    partial, found = target / ".partial-val", 0
    partial.mkdir(parents=True, exist_ok=True)
    with _open(source, VAL_TAR) as archive:
        try:
            for number, member in enumerate(archive):
                match = _VAL_PICTURE.fullmatch(member.name)
                if match is None or not 1 <= int(match[1]) <= len(truth):
                    raise ValueError(f"{_name(archive)}: contains {member.name!r}: not the official archive")
                found += 1
                path = partial / truth[int(match[1]) - 1] / member.name
                if path.exists() and path.stat().st_size == member.size:
                    continue
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(_content(archive, member))
                if (number + 1) % 1000 == 0:
                    report(f"val: {number + 1} of {len(truth)} pictures")
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(
                f"{_name(archive)}: damaged ({error}); download it again, what is unpacked so far is kept"
            ) from None
    if found != len(truth):
        raise ValueError(f"{source / VAL_TAR}: ends after {found} of {len(truth)} pictures; download it again")
    partial.rename(folder)


def count_pictures(target: Path) -> Counts:
    """Pictures and classes that lie there now."""
    train = [p for p in (target / "train").glob("n*") if p.is_dir()]
    return Counts(
        len(train),
        sum(1 for p in train for _ in p.glob("*.JPEG")),
        sum(1 for _ in (target / "val").glob("n*/*.JPEG")),
    )


def prepare_imagenet(source: Path, target: Path, report: Report, verify_counts: bool = True) -> Counts:
    """Unpacks both parts into `target`; continues where an earlier attempt stopped.

    Raises:
        ValueError: archives missing, damaged or not the official ones; wrong counts at the end.
    """
    if not source.is_dir():
        raise ValueError(f"no folder {source} (--from)")
    target.mkdir(parents=True, exist_ok=True)
    _check_space(source, target)
    unpack_train(source, target, report)
    unpack_val(source, target, report)
    counts = count_pictures(target)
    expected = Counts(CLASSES, TRAIN_PICTURES, VAL_PICTURES)
    if verify_counts and counts != expected:
        raise ValueError(
            f"{target}: {counts.classes} classes, {counts.train} training and {counts.val} validation pictures, "
            f"expected {expected.classes}, {expected.train} and {expected.val}. Delete incomplete class folders "
            "and run again, or add --subset if this is not the full set."
        )
    return counts


def _check_space(source: Path, target: Path) -> None:
    needed = sum((source / name).stat().st_size for name in (TRAIN_TAR, VAL_TAR) if (source / name).is_file())
    there = sum(p.stat().st_size for p in target.rglob("*.JPEG"))
    free = shutil.disk_usage(target).free
    if needed - there > free:
        raise ValueError(f"{target}: {(needed - there) / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
