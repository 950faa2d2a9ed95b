"""Official layouts: counts, splits, checksums, and archives that must not be unpacked."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from spikingformer.data.events import write_aedat20, write_aedat31, write_nmnist
from spikingformer.data.events.archives import Archive, ArchiveError, unpack
from spikingformer.data.events.catalogue import CATALOGUE, list_samples
from spikingformer.data.events.layouts import LayoutError
from spikingformer.data.events.prepare import prepare
from tests.data.events.event_recordings import random_events

USERS = {"train": range(1, 24), "test": range(24, 30)}
LIGHTS = ("fluorescent", "fluorescent_led", "lab", "led", "natural")


def gesture_tree(folder: Path) -> Path:
    """The whole of DVS128 Gesture in names and label files (98 and 24 recordings of 12 rows); recordings are tiny."""
    inner = folder / "DvsGesture"
    inner.mkdir(parents=True)
    write_aedat31(inner / "one.aedat", random_events(10))
    recording = (inner / "one.aedat").read_bytes()
    (inner / "one.aedat").unlink()
    rows = "".join(f"{c},{1000 * i},{1000 * i + 1500}\n" for i, c in enumerate([*range(1, 12), 8]))
    for part, count in (("train", 98), ("test", 24)):
        names = [f"user{u:02d}_{light}.aedat" for u in USERS[part] for light in LIGHTS][:count]
        for name in names:
            (inner / name).write_bytes(recording)
            (inner / name.replace(".aedat", "_labels.csv")).write_text("class,startTime_usec,endTime_usec\n" + rows)
        (inner / f"trials_to_{part}.txt").write_text("\n".join(names) + "\n\n")
    return folder


def cifar_tree(folder: Path, count: int) -> Path:
    write_aedat20(folder.parent / "one", random_events(3))
    data = (folder.parent / "one").read_bytes()
    for name in CATALOGUE["cifar10dvs"].class_names:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            (folder / name / f"cifar10_{name}_{i}.aedat").write_bytes(data)
    return folder


def test_gesture_counts_users_and_flips(tmp_path: Path) -> None:
    row = CATALOGUE["gesture"]
    samples = list_samples(row, gesture_tree(tmp_path), "published")
    train = [s for s in samples if s.part == "train"]
    assert (len(train), len(samples) - len(train)) == row.counts["published"] == (1176, 288)
    assert {s.group for s in train}.isdisjoint(s.group for s in samples if s.part == "test")
    assert {s.label for s in samples} == set(range(11))
    for a, b in row.flip_swaps:
        assert row.class_names[a].split()[0] == "right"
        assert row.class_names[b].split()[0] == "left"
        if "arm" in row.class_names[a]:
            assert ("counter" in row.class_names[a]) != ("counter" in row.class_names[b])


def test_cifar10dvs_published_split_is_by_sorted_name(tmp_path: Path) -> None:
    tree = cifar_tree(tmp_path / "c", 1000)
    folder = next(path.parent for path in sorted(tree.rglob("*.aedat")))
    (folder / ".partial-0-cifar10_x_5.aedat").write_bytes(b"")  # left by a killed simulation
    samples = list_samples(CATALOGUE["cifar10dvs"], tree, "published")
    test = {int(s.path.stem.rsplit("_", 1)[1]) for s in samples if s.part == "test" and s.label == 3}
    assert test == {*range(91, 100), *range(909, 1000)}
    samples = list_samples(CATALOGUE["cifar10dvs"], tmp_path / "c", "first_hundred")
    test = {int(s.path.stem.rsplit("_", 1)[1]) for s in samples if s.part == "test" and s.label == 9}
    assert test == set(range(100))
    assert len(samples) == 10_000


def zip_tree(folder: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder.parent))
    return target


def test_zips_are_checked_unpacked_once_and_counted(tmp_path: Path) -> None:
    tree = cifar_tree(tmp_path / "made", 10)
    source = tmp_path / "downloads"
    source.mkdir()
    archives = []
    for archive in CATALOGUE["cifar10dvs"].archives:
        path = zip_tree(tree / archive.unpacks_to, source / archive.file_name)
        archives.append(replace(archive, md5=hashlib.md5(path.read_bytes()).hexdigest()))
    row = replace(CATALOGUE["cifar10dvs"], archives=tuple(archives))
    said: list[str] = []
    samples = prepare(row, source, tmp_path / "out", "published", said.append)
    assert len(samples) == 100
    assert sum(line.startswith("unpacking") for line in said) == 10
    assert "NOT COMPLETE: the full data set has 9000 and 1000" in said[-1]
    said.clear()
    assert len(prepare(row, source, tmp_path / "out", "published", said.append)) == 100
    assert not [line for line in said if line.startswith("unpacking")]


def test_tar_is_unpacked_and_a_wrong_checksum_stops(tmp_path: Path) -> None:
    tree, source = gesture_tree(tmp_path / "made"), tmp_path / "downloads"
    source.mkdir()
    with tarfile.open(source / "DvsGesture.tar.gz", "w:gz") as archive:
        archive.add(tree / "DvsGesture", "DvsGesture")
    row = CATALOGUE["gesture"]
    with pytest.raises(ArchiveError, match="the official file has 8a5c71fb"):
        prepare(row, source, source, "published", print)
    said: list[str] = []
    samples = prepare(row, source, source, "published", said.append, skip_checksums=True)
    assert len(samples) == 1176 + 288
    assert said[-1].endswith("(complete)")


@pytest.mark.parametrize("name", ["gesture", "cifar10dvs", "nmnist"])
def test_an_empty_folder_says_what_to_get(tmp_path: Path, name: str) -> None:
    with pytest.raises(LayoutError) as error:
        prepare(CATALOGUE[name], tmp_path, tmp_path, "published", print)
    for archive in CATALOGUE[name].archives:
        assert archive.file_name in str(error.value)
        assert archive.md5 in str(error.value)


def test_missing_recordings_are_named(tmp_path: Path) -> None:
    folder = gesture_tree(tmp_path) / "DvsGesture"
    (folder / "user03_lab.aedat").unlink()
    with pytest.raises(LayoutError, match=r"lacks user03_lab\.aedat"):
        list_samples(CATALOGUE["gesture"], tmp_path, "published")


def test_trial_lists_cannot_leave_the_folder(tmp_path: Path) -> None:
    folder = gesture_tree(tmp_path) / "DvsGesture"
    (folder / "trials_to_test.txt").write_text("../../etc/passwd\n")
    with pytest.raises(ValueError, match="expected names like"):
        list_samples(CATALOGUE["gesture"], tmp_path, "published")


def test_nmnist_layout_and_unknown_split(tmp_path: Path) -> None:
    for part in ("Train", "Test"):
        for digit in "0123456789":
            (tmp_path / part / digit).mkdir(parents=True)
            write_nmnist(tmp_path / part / digit / "00001.bin", random_events(5, height=34, width=34, span_us=99))
    samples = list_samples(CATALOGUE["nmnist"], tmp_path, "published")
    assert [(s.part, s.label) for s in samples] == [(p, d) for p in ("train", "test") for d in range(10)]
    with pytest.raises(ValueError, match="expected one of published, slayer"):
        list_samples(CATALOGUE["nmnist"], tmp_path, "publised")


ROW = Archive("a.zip", "", "top", max_bytes=1000)
BAD_NAMES = ["../evil", "/evil", "top/../../evil", "top\\..\\evil", "C:evil", "top/" + "x" * 201, "other/file"]


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_unsafe_names_are_refused(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, b"x")
    else:
        with tarfile.open(path, "w") as archive:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    out = tmp_path / "deep" / "out"
    with pytest.raises(ArchiveError, match=r"unsafe path|expected the one folder"):
        unpack(path, ROW, out)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [path.name]


def test_links_and_bombs_are_refused(tmp_path: Path) -> None:
    link = tarfile.TarInfo("top/link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(link)
    with pytest.raises(ArchiveError, match="not a regular file"):
        unpack(tmp_path / "a.tar", ROW, tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("top/zeros", bytes(10_000))
    with pytest.raises(ArchiveError, match="more data than the official file"):
        unpack(tmp_path / "a.zip", ROW, tmp_path / "out")
    with pytest.raises(ArchiveError, match="more than 0 files"):
        unpack(tmp_path / "a.zip", ROW, tmp_path / "out", max_members=0)
    assert not (tmp_path / "out" / "top").exists()


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
def test_damaged_archives_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("top/file", random_events(50).tobytes())
    else:
        (tmp_path / "top").mkdir()
        (tmp_path / "top" / "file").write_bytes(random_events(50).tobytes())
        with tarfile.open(path, "w:gz") as archive:
            archive.add(tmp_path / "top", "top")
    data = path.read_bytes()
    for cut in (data[: len(data) // 2], b"", data[:100] + bytes(100) + data[200:]):
        path.write_bytes(cut)
        with pytest.raises(ArchiveError):
            unpack(path, ROW, tmp_path / "out")
        assert not (tmp_path / "out" / "top").exists()
