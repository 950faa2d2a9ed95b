"""From what a user downloaded to an unpacked, checked data set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .archives import Archive, ArchiveError, check_md5, unpack
from .catalogue import EventDataset, list_samples
from .layouts import LayoutError
from .samples import EventSample
from .simulate import SIMULATED_FILE

Report = Callable[[str], None]


def prepare(
    data_set: EventDataset,
    source: Path,
    target: Path,
    split: str,
    report: Report,
    skip_checksums: bool = False,
) -> list[EventSample]:
    """Unpack into `target` whatever official archives lie in `source`, and list the samples of `split`.

    An archive whose folder is in `target` (or in `source`) already is not touched again. Unpacked folders are used as
    they are. Raises LayoutError with what to get from where, ArchiveError, EventFileError.
    """
    if not source.is_dir():
        raise LayoutError(f"{source} is not a folder. {where_to_get(data_set, source)}")
    for archive in data_set.archives:
        path = find_archive(source, archive)
        if path is None or (target / archive.unpacks_to).exists() or (source / archive.unpacks_to).exists():
            continue
        if not skip_checksums:
            report(f"checking {path.name}")
            check_md5(path, archive)
        report(f"unpacking {path.name} to {target / archive.unpacks_to}")
        target.mkdir(parents=True, exist_ok=True)
        unpack(path, archive, target)
    errors = []
    for root in dict.fromkeys((target, source)):
        try:
            samples = list_samples(data_set, root, split)
        except LayoutError as error:
            errors.append(str(error))
            continue
        report(count_report(data_set, split, samples, root))
        return samples
    raise LayoutError(f"{errors[0]} {where_to_get(data_set, source)}")


def find_archive(folder: Path, archive: Archive) -> Path | None:
    """The archive in `folder` under its official name (any case), or None."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name.lower() == archive.file_name.lower():
            return path
    return None


def where_to_get(data_set: EventDataset, folder: Path) -> str:
    """What to download, from where, with which checksum."""
    lines = [f"\n{data_set.title} ({data_set.licence}; cite {data_set.citation}).", data_set.how_to_get]
    for archive in data_set.archives:
        lines.append(f"  {archive.file_name:<18} MD5 {archive.md5}  {archive.url}".rstrip())
    lines.append(
        f"Then run the command again with --from {folder}. Folders that are already unpacked are used as they are."
    )
    return "\n".join(lines)


def count_report(data_set: EventDataset, split: str, samples: list[EventSample], root: Path) -> str:
    """One line: what was found, against what the complete data set has."""
    train = sum(sample.part == "train" for sample in samples)
    test = len(samples) - train
    found = f"{data_set.title}, split {split}: {train} training and {test} test samples in {root}"
    expected = data_set.counts.get(split)
    if expected is None:
        return found
    if expected == (train, test):
        return f"{found} (complete)"
    return f"{found}; NOT COMPLETE: the full data set has {expected[0]} and {expected[1]}"


def simulated_note(root: Path) -> str | None:
    """Text of the file that marks a folder of simulated recordings, None for real ones."""
    note = root / SIMULATED_FILE
    try:
        return note.read_text("utf-8").strip() or "simulated" if note.is_file() else None
    except OSError as error:
        raise ArchiveError(f"{note}: cannot be read ({error.strerror}).") from None
