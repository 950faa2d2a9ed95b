"""Picture archives that are missing, cut off or change under a run: named, never read as smaller sets."""

import io
import tarfile

import pytest
from PIL import Image

from spikingformer.data.folder import UnreadablePicture
from spikingformer.data.settings import DataSettings
from spikingformer.data.shards import ShardPictures, TarPictures
from spikingformer.data.sources import load_part

SHARDS = "train-{00000..00001}.tar"


def picture(level: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (level, 0, 0)).save(stream, "JPEG")
    return stream.getvalue()


def write_tar(path, entries: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in entries.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    for number in range(2):
        entries = {}
        for i in range(2):
            entries |= {f"{number}{i}.jpg": picture(i), f"{number}{i}.cls": b"%d" % i}
        write_tar(tmp_path / f"train-{number:05}.tar", entries)
    return tmp_path


@pytest.fixture
def class_folders(tmp_path):
    path = tmp_path / "train.tar"
    write_tar(path, {f"{name}/{i}.jpg": picture(i) for name in ("ant", "bee") for i in range(2)})
    return path


def end_of_content(path) -> int:
    """Bytes up to the marker of the archive's end."""
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    return last.offset_data + -(-last.size // 512) * 512


def test_a_missing_shard_is_named(shards):
    (shards / "train-00001.tar").unlink()
    with pytest.raises(ValueError, match=r"train-00001\.tar: no such shard \(1 of 2 are missing\).*fetch the shards"):
        ShardPictures(shards, SHARDS, 3)


def test_a_shard_cut_off_anywhere_is_named(shards):
    """Between two samples as well, where a tar reader sees nothing wrong."""
    path = shards / "train-00001.tar"
    whole, end = path.read_bytes(), end_of_content(path)
    for length in [*range(0, end + 1, 512), 1, 700, end - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"train-00001\.tar: not a complete WebDataset shard.*fetch it again"):
            ShardPictures(shards, SHARDS, 3)
    path.write_bytes(whole)
    assert len(ShardPictures(shards, SHARDS, 3)) == 4


def test_a_class_archive_cut_off_anywhere_is_named(class_folders):
    whole, end = class_folders.read_bytes(), end_of_content(class_folders)
    for length in [*range(0, end + 1, 512), 1, 700, end - 1]:
        class_folders.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"train\.tar: not a complete tar.*fetch it again"):
            TarPictures(class_folders, 3)
    class_folders.write_bytes(whole)
    assert len(TarPictures(class_folders, 3)) == 4


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_shard_that_goes_during_a_run_is_named(shards, damage):
    pictures = ShardPictures(shards, SHARDS, 3)
    path = shards / "train-00001.tar"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:600])
    found, label = pictures[3]
    assert isinstance(found, UnreadablePicture)
    assert "train-00001.tar" in found.file
    assert ("No such file" if damage == "missing" else "cut off") in found.reason
    assert label == 1
    assert not isinstance(pictures[0][0], UnreadablePicture)


@pytest.mark.parametrize(
    ("listed", "of_model", "source"),
    [(False, (), "in the training part"), (True, (), r"in classes\.txt"), (False, ("cat",), "of the model")],
)
def test_a_class_number_without_a_class_is_named(shards, listed, of_model, source):
    write_tar(shards / "val-00000.tar", {"a.jpg": picture(0), "a.cls": b"5"})
    if listed:
        (shards / "classes.txt").write_text("cat\ndog\n")
    data = DataSettings(name="wds", root=str(shards), train_shards=SHARDS, test_shards="val-00000.tar")
    with pytest.raises(
        ValueError, match=rf"the test part has class number 5, expected 0 to \d, as many as there are classes {source}"
    ):
        load_part(data, "test", of_model)
