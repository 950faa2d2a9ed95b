"""Folders and tars of pictures, the ImageNet archives, checks of a data folder."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from spikingformer.cli import main
from spikingformer.data import imagenet
from spikingformer.data.checking import check_data
from spikingformer.data.digits import load_digits
from spikingformer.data.folder import PictureFiles, UnreadablePicture, decode_picture, part_root
from spikingformer.data.imagenet import DEVKIT, TRAIN_TAR, VAL_TAR, prepare_imagenet
from spikingformer.data.loading import PictureSamples, SampleEvaluation, SampleTraining, SeededSamples, Subset
from spikingformer.data.per_sample import evaluation_transform, training_transform
from spikingformer.data.sampling import StepPlan
from spikingformer.data.settings import AugmentSettings, DataSettings
from spikingformer.data.shards import ShardPictures, TarPictures
from spikingformer.data.sources import load_parts

CPU = torch.device("cpu")


def picture(shade: int = 100, size: tuple[int, int] = (20, 16), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, shade if mode == "L" else (shade, shade // 2, 255 - shade)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_folder(root, train=("cat", "dog"), test=("cat", "dog"), each=3):
    for part, classes in (("train", train), ("val", test)):
        for number, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(each):
                (root / part / name / f"{i}.jpg").write_bytes(picture(40 * number + i))
    return root


def settings(root, **changes: object) -> DataSettings:
    return DataSettings(name="folder", root=str(root), image_size=8, **changes)


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def tar_of(entries: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in entries.items():
            add(archive, name, content)
    return buffer.getvalue()


def test_folder_and_tar_hold_the_same(tmp_path):
    write_folder(tmp_path / "a")
    for part in ("train", "val"):
        with tarfile.open(tmp_path / f"{part}.tar", "w") as archive:
            archive.add(tmp_path / "a" / part, arcname=".")
    folder = load_parts(settings(tmp_path / "a"), 0)
    archive = load_parts(DataSettings(name="tar", root=str(tmp_path), image_size=8), 0)
    for one, other in ((folder.train, archive.train), (folder.test, archive.test)):
        assert one.class_names == other.class_names == ("cat", "dog")
        assert one.labels.tolist() == other.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert np.array_equal(np.asarray(one.samples[4][0]), np.asarray(other.samples[4][0]))


def test_hidden_files_are_no_pictures(tmp_path):
    root = write_folder(tmp_path / "folder")
    (root / "train" / "cat" / "._0.jpg").write_bytes(b"macOS")
    files = PictureFiles(root / "train", 3)
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        archive.add(root / "train", ".")
    packed = TarPictures(tmp_path / "train.tar", 3)
    for found in (files, packed):
        assert len(found) == 6
        assert found.left_out() == {"hidden": 1}


def test_the_same_folder_found_twice_is_refused(tmp_path):
    root = write_folder(tmp_path / "folder")
    (root / "train" / "cat" / "loop").symlink_to("../..", target_is_directory=True)
    with pytest.raises(ValueError, match="are the same folder: remove the symbolic link"):
        PictureFiles(root / "train", 3)


def test_classes_are_numbered_by_the_training_part(tmp_path):
    write_folder(tmp_path, train=("ant", "cat", "dog"), test=("dog",))
    assert load_parts(settings(tmp_path), 0).test.labels.tolist() == [2, 2, 2]


def test_class_without_training_pictures_is_named(tmp_path):
    write_folder(tmp_path, test=("cat", "eel"))
    with pytest.raises(ValueError, match="1 class that the training part lacks, first 'eel'"):
        load_parts(settings(tmp_path), 0)


@pytest.mark.parametrize("missing", ["root", "train", "pictures"])
def test_missing_folder_is_named_with_what_is_expected(tmp_path, missing):
    root = tmp_path / "set"
    if missing != "root":
        (root / "images").mkdir(parents=True)
    if missing == "pictures":
        (root / "train").mkdir()
    expected = {
        "root": "no folder .*set .*Set data.root=FOLDER",
        "train": r"no train or training in it \(it holds: images\)",
        "pictures": "train: no pictures found",
    }[missing]
    with pytest.raises(ValueError, match=expected):
        load_parts(settings(root), 0)


def test_held_out_part_is_by_class_and_disjoint(tmp_path):
    write_folder(tmp_path, each=10)
    parts = load_parts(settings(tmp_path, validation_fraction=0.2), 1)
    assert parts.validation is not None
    assert parts.validation.labels.tolist() == [0, 0, 1, 1]
    assert len(parts.train) == 16
    with pytest.raises(ValueError, match="leaves one part empty"):
        load_parts(settings(tmp_path, validation_fraction=0.01), 1)


TRANSFORM = evaluation_transform(8, 3, "bicubic", 1.0, (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_picture_stops_and_is_named(tmp_path, workers):
    write_folder(tmp_path)
    bad = tmp_path / "train/cat/1.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    loader = SampleEvaluation(PictureFiles(tmp_path / "train", 3), TRANSFORM, 4, workers, CPU, "stop")
    with pytest.raises(ValueError, match=r"cat/1.jpg: not a readable picture \((.|\n)*data.unreadable=skip") as caught:
        list(loader.batches())
    assert "Traceback" not in str(caught.value)


def test_samples_and_transforms_reach_spawned_workers(tmp_path):
    """They are pickled there: macOS, and Linux from Python 3.14 on."""
    write_folder(tmp_path)
    write_shards(tmp_path)
    (tmp_path / "a.tar").write_bytes(tar_of({f"cat/{i}.jpg": picture(i) for i in range(2)}))
    augment = AugmentSettings(crop_padding=1, crop_scale=(0.5, 1.0), erase_probability=1.0,
                              rand_augment="rand-m9-n1-mstd0.4-inc1")  # fmt: skip
    half = (0.5,) * 3
    sets = [
        PictureFiles(tmp_path / "train", 3),
        TarPictures(tmp_path / "a.tar", 3),
        ShardPictures(tmp_path, "train-{00000..00001}.tar", 3),
        Subset(PictureFiles(tmp_path / "train", 3), np.array([4, 5])),
    ]
    cases = [(TRANSFORM, samples) for samples in sets]
    cases += [(training_transform(settings(tmp_path), augment, half, half), samples) for samples in sets]
    grey = DataSettings(name="digits", image_size=8, channels=1)
    cases += [(training_transform(grey, AugmentSettings(), (0.5,), (0.5,)), PictureSamples(load_digits("test", 8)))]
    for transform, samples in cases:
        seeded = SeededSamples(samples, transform, 3)
        expected, label = seeded[2, 1]
        got, got_label = pickle.loads(pickle.dumps(seeded))[2, 1]
        assert torch.equal(got, expected)
        assert got_label == label


def test_a_model_of_another_shape_gets_pictures_of_its_shape_as_timm_prepares_them():
    from timm.data import create_transform

    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    half = (0.5,) * 3
    for size in ((8, 24), (24, 8), (16, 16)):
        theirs = create_transform((3, *size), interpolation="bicubic", mean=half, std=half, crop_pct=0.9)
        ours = evaluation_transform(size, 3, "bicubic", 0.9, half, half)
        found = ours(Image.fromarray(pixels))
        assert found.shape == (3, *size)
        assert torch.equal(found, theirs(Image.fromarray(pixels)))


def test_corrupt_picture_is_skipped_and_counted(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train/cat/1.jpg").write_bytes(b"no picture")
    files = PictureFiles(tmp_path / "train", 3)
    evaluation = list(SampleEvaluation(files, TRANSFORM, 4, 0, CPU, "skip").batches())
    assert [len(b.labels) for b in evaluation] == [3, 2]
    assert sum(b.unreadable for b in evaluation) == 1
    training = SampleTraining(files, TRANSFORM, StepPlan(6, 6, 0), 0, CPU, "skip")
    assert next(training.steps(0, 0)).parts[0].unreadable == 1


def test_every_kind_of_picture_becomes_rgb(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    for mode, name in (
        ("L", "grey.jpg"),
        ("RGBA", "alpha.png"),
        ("P", "palette.png"),
        ("CMYK", "cmyk.jpg"),
        ("1", "bits.png"),
    ):
        Image.new(mode, (9, 7)).save(folder / name)
    files = PictureFiles(tmp_path, 3)
    assert len(files) == 5
    assert all(files[i][0].mode == "RGB" for i in range(5))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey_are_scaled(tmp_path, format):
    grey = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "p", format)
    for channels in (1, 3):
        with (tmp_path / "p").open("rb") as file:
            found = np.asarray(decode_picture(file, channels, "p"))
        assert np.array_equal(found.reshape(256, -1)[:, 0], np.arange(256))


@pytest.mark.parametrize("values", [[[-3, 4]], [[0, 70000]]])
def test_values_of_no_known_depth_are_refused(tmp_path, values):
    Image.fromarray(np.array(values, np.int32)).save(tmp_path / "p.tiff")
    with (tmp_path / "p.tiff").open("rb") as file:
        found = decode_picture(file, 3, "p.tiff")
    assert isinstance(found, UnreadablePicture)
    assert "expected 8 or 16 bits" in found.reason


def test_huge_picture_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    write_folder(tmp_path)
    found, _ = PictureFiles(tmp_path / "train", 3)[0]
    assert isinstance(found, UnreadablePicture)
    assert "exceeds limit" in found.reason


def test_check_finds_what_is_wrong(tmp_path):
    write_folder(tmp_path, train=("ant", "cat"), test=("cat",))
    (tmp_path / "train/cat/1.jpg").write_bytes(b"no picture")
    findings = check_data(settings(tmp_path))
    assert findings.facts["train"]["samples"] == 6
    assert findings.facts["train"]["unreadable"] == 1
    assert len(findings.problems) == 2
    assert "cat/1.jpg: not a readable picture" in findings.problems[0]
    assert "1 classes only in the train part, first 'ant'" in findings.problems[1]
    assert not check_data(DataSettings(name="digits", channels=1)).problems


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("gesture", r"`spikingformer data gesture --from DIR --verify` checks that event set"),
        ("digits_dvs", "digits_dvs is simulated in memory: there is nothing to check"),
        ("cifar11", "got 'cifar11'"),
    ],
)
def test_check_says_what_it_cannot_check_and_what_it_can(name, advice):
    with pytest.raises(ValueError, match=advice) as caught:
        check_data(DataSettings(name=name))
    assert "expected one of digits, cifar10, cifar100, folder, tar, wds" in str(caught.value)
    assert "cifar10dvs" not in str(caught.value)


@pytest.mark.parametrize("kind", ["folder", "tar", "wds"])
def test_pictures_of_many_formats_are_read_and_other_files_counted(tmp_path, kind):
    """The same ones, wherever they lie."""
    formats = {"JPEG": "JPG", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif", "PPM": "ppm"}
    entries = {"cat/notes.txt": b"x", "cat/moving.gif": b"x", "cat/Makefile": b"x"}
    for number, (name, suffix) in enumerate(formats.items()):
        buffer = io.BytesIO()
        Image.new("RGB", (9, 7)).save(buffer, name)
        entries[f"cat/{number}.{suffix}"] = buffer.getvalue()
        if kind == "wds":
            entries[f"cat/{number}.cls"] = b"0"
    for part in ("train", "val"):
        (tmp_path / f"{part}.tar").write_bytes(tar_of(entries))
        with tarfile.open(tmp_path / f"{part}.tar") as archive:
            archive.extractall(tmp_path / part, filter="data")
    data = DataSettings(name=kind, root=str(tmp_path), train_shards="train.tar", test_shards="val.tar")
    findings = check_data(data)
    assert not findings.problems
    for facts in findings.facts.values():
        assert (facts["samples"], facts["decoded"], facts["left_out"]) == (6, 6, 3)
        assert facts["left_out_kinds"] == ".gif 1, .txt 1, no suffix 1"


def test_pictures_of_a_tar_outside_class_folders_are_counted(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of({"0.jpg": picture(), "cat/0.jpg": picture(), "readme.txt": b"x"}))
    assert TarPictures(tmp_path / "a.tar", 3).left_out() == {".txt": 1, "picture outside a class folder": 1}


def test_a_sample_of_a_shard_with_two_pictures_is_refused(tmp_path):
    content = tar_of({"a.jpg": picture(), "a.png": picture(), "a.cls": b"0"})
    (tmp_path / "train.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"train.tar: not a complete WebDataset shard \('a' has two pictures\)"):
        ShardPictures(tmp_path, "train.tar", 3)


def test_check_takes_what_train_takes_and_finds_shards_that_no_pattern_names(tmp_path, capsys):
    write_shards(tmp_path)
    command = ["data", "check", "wds", "--root", str(tmp_path)]
    assert main([*command, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["facts"]["train"]["samples"] == 2
    (problem,) = found["problems"]
    assert "1 shards that no pattern names, first train-00001.tar: set data.train_shards (now train-{00000" in problem
    assert main([*command, "data.train_shards=train-{00000..00001}.tar", "data.channels=1"]) == 0
    assert "train: samples 4" in capsys.readouterr().out
    for override, message in (
        ("data.train_shard=x", "unknown key 'data.train_shard'; did you mean 'data.train_shards'?"),
        ("data.channels=grey", 'data.channels: got "grey", expected int'),
        ("epochs=2", "data check takes keys of the data section"),
    ):
        assert main([*command, override]) == 2
        assert message in capsys.readouterr().err


def test_imagenet_prints_json(tmp_path, capsys):
    source, target = write_archives(tmp_path / "official"), tmp_path / "imagenet"
    assert main(["data", "imagenet", "--from", str(source), "--root", str(target), "--subset", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"data_set": "imagenet", "folder": str(target), "classes": 2, "train": 6, "val": 4}


def test_cifar_prints_json(tmp_path, capsys, monkeypatch):
    import torchvision

    def download(self, root, download):
        print("Files already downloaded and verified")

    monkeypatch.setattr(torchvision.datasets.CIFAR100, "__init__", download)
    monkeypatch.setattr(
        "spikingformer.data.cifar.load_cifar", lambda name, root, part: range(2 if part == "test" else 9)
    )
    assert main(["data", "cifar100", "--root", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"data_set": "cifar100", "folder": str(tmp_path / "cifar-100-python"), "train": 9, "test": 2}


def test_a_file_that_is_not_the_official_archive_is_not_copied(tmp_path, capsys):
    (tmp_path / "mine.tar.gz").write_bytes(b"hello")
    words = ["data", "cifar10", "--from", str(tmp_path / "mine.tar.gz"), "--root", str(tmp_path / "data")]
    assert main(words) == 2
    assert "mine.tar.gz: its MD5 is not that of the official cifar-10-python.tar.gz" in capsys.readouterr().err
    assert not list((tmp_path / "data").iterdir())


def test_a_failed_download_says_what_to_do(tmp_path, capsys, monkeypatch):
    import urllib.error

    import torchvision

    def download(self, root, download):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "__init__", download)
    assert main(["data", "cifar10", "--root", str(tmp_path)]) == 2
    assert "no network>. Download cifar-10-python.tar.gz yourself and give it with --from." in capsys.readouterr().err


def test_statistics_of_the_wrong_length_are_named(tmp_path):
    write_folder(tmp_path)
    with pytest.raises(ValueError, match=r"data.mean: 3 values for data.channels=1: give 1, or null for folder's own"):
        load_parts(settings(tmp_path, channels=1, mean=(0.5,) * 3), 0)
    with pytest.raises(ValueError, match=r"data.std: 1 values for data.channels=3: give 3"):
        load_parts(settings(tmp_path, std=(0.5,)), 0)
    digits = DataSettings(name="digits", image_size=8, channels=3)
    with pytest.raises(ValueError, match=r"data.channels: got 3, digits has 1: set data.channels=1"):
        load_parts(digits, 0)


def test_part_root_accepts_usual_names(tmp_path):
    (tmp_path / "validation").mkdir()
    assert part_root(tmp_path, "test", archive=False) == tmp_path / "validation"


def write_shards(root, content=None):
    """Two training shards and a test shard, two pictures each."""
    root.mkdir(exist_ok=True)
    for number, name in enumerate(("train-00000", "train-00001", "val-00000")):
        entries = {}
        for i in range(2):
            entries[f"{number}{i}.jpg"] = content or picture(40 * number + i)
            entries[f"{number}{i}.cls"] = b"%d" % i
        (root / f"{name}.tar").write_bytes(tar_of(entries))
    return root


def shard_settings(root) -> DataSettings:
    shards = {"train_shards": "train-{00000..00001}.tar", "test_shards": "val-00000.tar"}
    return DataSettings(name="wds", root=str(root), image_size=8, **shards)


def test_shards_are_read_at_any_place_and_indexed_once(tmp_path, monkeypatch):
    write_shards(tmp_path)
    parts = load_parts(shard_settings(tmp_path), 0)
    assert parts.train.labels.tolist() == [0, 1, 0, 1]
    assert (len(parts.test), parts.test.class_names) == (2, ("0", "1"))
    expected = np.asarray(Image.open(io.BytesIO(picture(41))))
    assert np.array_equal(np.asarray(parts.train.samples[3][0]), expected)
    monkeypatch.setattr("spikingformer.data.shards._index_shard", None)
    assert load_parts(shard_settings(tmp_path), 0).train.labels.tolist() == [0, 1, 0, 1]


def test_missing_and_damaged_shards_are_named(tmp_path):
    write_shards(tmp_path)
    shard = tmp_path / "train-00001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:700])
    with pytest.raises(ValueError, match=r"train-00001.tar: not a complete WebDataset shard"):
        load_parts(shard_settings(tmp_path), 0)
    shard.unlink()
    with pytest.raises(ValueError, match=r"train-00001.tar: no such shard \(1 of 2 are missing\)"):
        load_parts(shard_settings(tmp_path), 0)


def test_corrupt_picture_in_a_shard_is_found(tmp_path):
    write_shards(tmp_path, content=b"no picture")
    assert isinstance(load_parts(shard_settings(tmp_path), 0).train.samples[0][0], UnreadablePicture)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its file open
def test_webdataset_reads_the_same_shards(tmp_path):
    """The library's own order within a shard, so the two agree on what the format means."""
    import webdataset

    write_shards(tmp_path)
    stream = webdataset.WebDataset(str(tmp_path / "train-00001.tar"), shardshuffle=False).to_tuple("jpg", "cls")
    samples = load_parts(shard_settings(tmp_path), 0).train.samples
    for index, (jpg, label) in enumerate(stream):
        found, number = samples[2 + index]
        assert np.array_equal(np.asarray(found), np.asarray(Image.open(io.BytesIO(jpg))))
        assert number == int(label)


WNIDS = ("n00000001", "n00000002")


def write_archives(folder):
    """The three official archives in small: two classes of three pictures, four validation pictures."""
    from scipy.io import savemat

    folder.mkdir(exist_ok=True)
    classes = {f"{w}.tar": tar_of({f"{w}_{i}.JPEG": picture(i) for i in range(3)}) for w in WNIDS}
    (folder / TRAIN_TAR).write_bytes(tar_of(classes))
    (folder / VAL_TAR).write_bytes(tar_of({f"ILSVRC2012_val_{i + 1:08}.JPEG": picture(i) for i in range(4)}))
    synsets = np.array([(2, WNIDS[0]), (1, WNIDS[1])], dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O")])
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets})
    with tarfile.open(folder / DEVKIT, "w:gz") as kit:
        add(kit, "ILSVRC2012_devkit_t12/data/meta.mat", buffer.getvalue())
        add(kit, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", b"2\n1\n1\n2\n")
    return folder


def quiet(text: str) -> None:
    pass


def test_imagenet_archives_become_folders(tmp_path):
    source, target = write_archives(tmp_path / "official"), tmp_path / "imagenet"
    counts = prepare_imagenet(source, target, quiet, verify_counts=False)
    assert (counts.classes, counts.train, counts.val) == (2, 6, 4)
    assert sorted(p.name for p in (target / "val" / WNIDS[0]).iterdir()) == [
        "ILSVRC2012_val_00000001.JPEG",
        "ILSVRC2012_val_00000004.JPEG",
    ]
    assert not check_data(settings(target)).problems
    with pytest.raises(
        ValueError, match="2 classes, 6 training and 4 validation pictures, expected 1000, 1281167 and 50000"
    ):
        prepare_imagenet(source, target, quiet)


def test_imagenet_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    source, target = write_archives(tmp_path / "official"), tmp_path / "imagenet"
    (target / "train" / WNIDS[0]).mkdir(parents=True)  # whole already: left as it is
    (target / f".partial-{WNIDS[1]}").mkdir()  # killed inside this class
    (target / f".partial-{WNIDS[1]}" / "stale.JPEG").write_bytes(b"x")
    (target / ".partial-val" / WNIDS[0]).mkdir(parents=True)
    cut = target / ".partial-val" / WNIDS[0] / "ILSVRC2012_val_00000001.JPEG"
    cut.write_bytes(b"cut off")
    counts = prepare_imagenet(source, target, quiet, verify_counts=False)
    assert (counts.classes, counts.train, counts.val) == (2, 3, 4)
    assert (target / "val" / WNIDS[0] / cut.name).read_bytes() == picture(0)
    assert not list(target.glob(".partial*"))


def link(archive: tarfile.TarFile, name: str) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    archive.addfile(member)


@pytest.mark.parametrize(
    "name", ["../n00000001.tar", "/n00000001.tar", "n00000001.tar/x", "n1.tar", "x/../n00000001.tar", "readme"]
)
def test_train_archive_cannot_write_elsewhere(tmp_path, name):
    source, target = write_archives(tmp_path / "official"), tmp_path / "imagenet"
    (source / TRAIN_TAR).write_bytes(tar_of({name: tar_of({})}))
    with pytest.raises(ValueError, match="not the official archive"):
        prepare_imagenet(source, target, quiet)
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.parent != source]


@pytest.mark.parametrize("name", ["../../n00000001_1.JPEG", "n00000001_1.JPEG/../x", "n00000001_1.png"])
def test_class_archive_cannot_write_elsewhere(tmp_path, name):
    source, target = write_archives(tmp_path / "official"), tmp_path / "imagenet"
    (source / TRAIN_TAR).write_bytes(tar_of({"n00000001.tar": tar_of({name: picture()})}))
    with pytest.raises(ValueError, match="not an official class archive"):
        prepare_imagenet(source, target, quiet)
    assert not (target / "train" / "n00000001").exists()


def test_link_in_an_archive_is_refused(tmp_path):
    source = write_archives(tmp_path / "official")
    with tarfile.open(source / VAL_TAR, "w") as archive:
        link(archive, "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(ValueError, match="is a link or device"):
        prepare_imagenet(source, tmp_path / "imagenet", quiet)


def test_oversized_member_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(imagenet._content, "__defaults__", (100,))
    with pytest.raises(ValueError, match="bytes, at most 100 are expected"):
        prepare_imagenet(write_archives(tmp_path / "official"), tmp_path / "imagenet", quiet)


@pytest.mark.parametrize("name", [TRAIN_TAR, VAL_TAR, DEVKIT])
def test_missing_and_truncated_archives_are_named(tmp_path, name):
    source, target = write_archives(tmp_path / "official"), tmp_path / "imagenet"
    content = (source / name).read_bytes()
    (source / name).write_bytes(content[: len(content) // 3])
    with pytest.raises(ValueError, match=name):
        prepare_imagenet(source, target, quiet, verify_counts=False)
    (source / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: no such file"):
        prepare_imagenet(source, target, quiet, verify_counts=False)
    (source / name).write_bytes(content)
    assert prepare_imagenet(source, target, quiet, verify_counts=False).train == 6


def test_real_photographs_are_all_readable(shared_data):
    findings = check_data(settings(shared_data / "imagenette224"), every=8)
    assert findings.problems == []
    assert (findings.facts["train"]["samples"], findings.facts["test"]["samples"]) == (600, 200)
