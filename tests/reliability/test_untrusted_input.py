"""Checkpoints, data sets, recipes and archives from elsewhere: nothing in them is run, nothing leaves its folder."""

import hashlib
import io
import os
import pickle
import stat
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from spikingformer.cli import main
from spikingformer.data.cifar import read_verified
from spikingformer.data.events.archives import Archive, ArchiveError, unpack
from spikingformer.training.foreign import read_published
from spikingformer.training.recipe import load_recipe
from spikingformer.training.state import STATE_FILE, load_state
from spikingformer.training.tensor_file import read_tensors


class Touch:
    """Unpickled by a careless reader, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path) -> Path:
    return tmp_path / "was-run"


def test_the_marker_works(marker):
    pickle.loads(pickle.dumps(Touch(marker)))
    assert marker.exists(), "the attack must be real for the refusals below to mean anything"


@pytest.mark.parametrize("old_form", [False, True], ids=["zip", "legacy"])
def test_malicious_pth_is_refused_and_named(tmp_path, marker, old_form):
    path = tmp_path / "weights.pth.tar"
    content = {"state_dict": {"a": torch.zeros(1)}, "args": Touch(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=not old_form)
    with pytest.raises(ValueError, match=r"refused: it contains more than weights.*nothing was run"):
        read_published(path)
    assert not marker.exists()


@pytest.mark.parametrize("old_numpy", [False, True], ids=["numpy-2", "numpy-1"])
def test_plain_numbers_of_numpy_beside_the_weights_are_read(tmp_path, old_numpy):
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.ones(1), "metric": np.float64(95.5), "epoch": np.int64(3)}, path)
    if old_numpy:  # as files say that were written before numpy's module was renamed
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "old.pth", "w") as new:
            for name in old.namelist():
                new.writestr(name, old.read(name).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
        path = tmp_path / "old.pth"
    assert read_published(path) == {"a": torch.ones(1), "metric": 95.5, "epoch": 3}


@pytest.mark.parametrize("name", ["best.safetensors", STATE_FILE])
def test_a_pickle_under_our_names_is_refused(tmp_path, marker, name):
    path = tmp_path / name
    torch.save({"a": Touch(marker)}, path)
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        read_tensors(path)
    if name == STATE_FILE:
        with pytest.raises(ValueError, match="No intact checkpoint"):
            load_state(tmp_path)
    assert not marker.exists()


def test_evaluate_refuses_a_malicious_checkpoint_in_one_screen(tmp_path, marker, capsys):
    path = tmp_path / "best.safetensors"
    torch.save({"a": Touch(marker)}, path)
    assert main(["evaluate", str(path)]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert len(error.splitlines()) <= 24
    assert not marker.exists()


def test_malicious_cifar_file_is_refused_twice(tmp_path, marker):
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps({"data": Touch(marker)}))
    with pytest.raises(ValueError, match=r"not the official file: MD5"):
        read_verified(path, "0" * 32, "cifar10")
    md5 = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    with pytest.raises(ValueError, match=r"refused to load posix\.mkdir"):
        read_verified(path, md5, "cifar10")  # even if the checksum were forged
    assert not marker.exists()


@pytest.mark.parametrize(
    "text",
    [
        "model: !!python/object/apply:os.mkdir ['{marker}']",
        "!!python/object/new:os.mkdir ['{marker}']",
        "model: &a [x, x]\ndata: [*a, *a]",
        "a: &a 1\n<<: *a",
        "- a list\n- of things",
        "model: {{name: x}}\nmodel: {{name: y}}",
        "\0\0\0",
        "{{" * 2000,
        "x" * 2_000_000,
    ],
    ids=["apply", "new", "alias-bomb", "merge", "list", "repeated-key", "nul", "nesting", "huge"],
)
def test_malicious_recipe(tmp_path, marker, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text.format(marker=marker) if len(text) < 1000 else text)
    with pytest.raises(ValueError, match=r"recipe\.yaml"):
        load_recipe(path)
    assert not marker.exists()


def test_override_values_are_data(marker):
    with pytest.raises(ValueError):
        load_recipe("recipes/digits/spikingformer_cml.yaml", [f"seed=!!python/object/apply:os.mkdir ['{marker}']"])
    assert not marker.exists()


def tar_of(path: Path, *members: tuple[str, bytes | str | int]) -> Path:
    """Content as bytes; a link's target as str; a member type as int."""
    with tarfile.open(path, "w") as archive:
        for name, what in members:
            info = tarfile.TarInfo(name)
            if isinstance(what, bytes):
                info.size = len(what)
                archive.addfile(info, io.BytesIO(what))
            else:
                info.type = tarfile.SYMTYPE if isinstance(what, str) else bytes([what])
                info.linkname = what if isinstance(what, str) else "/etc/passwd"
                archive.addfile(info)
    return path


def everything_below(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


OFFICIAL = Archive("set.tar", "", "set", max_bytes=1000)


@pytest.mark.parametrize(
    "member",
    [
        ("../outside", b"x"),
        ("set/../../outside", b"x"),
        ("/tmp/spikingformer-outside", b"x"),
        ("set\\..\\..\\outside", b"x"),
        ("C:outside", b"x"),
        ("set/link", "/etc/passwd"),
        ("set/link", "../../outside"),
        ("set/hard", ord(tarfile.LNKTYPE)),
        ("set/device", ord(tarfile.CHRTYPE)),
        ("set/pipe", ord(tarfile.FIFOTYPE)),
        ("other/file", b"x"),
        ("set/" + "d/" * 9 + "deep", b"x"),
        ("set/" + "n" * 250, b"x"),
        ("set/bomb", bytes(1001)),
    ],
    ids=[
        "up",
        "up-inside",
        "absolute",
        "backslash",
        "drive",
        "link-out",
        "link-up",
        "hard-link",
        "device",
        "pipe",
        "another-folder",
        "too-deep",
        "long-name",
        "too-much-data",
    ],
)
def test_archive_cannot_leave_its_folder_or_fill_the_disk(tmp_path, member):
    target = tmp_path / "target"
    target.mkdir()
    archive = tar_of(tmp_path / "set.tar", ("set/good", b"y"), member)
    before = everything_below(tmp_path)
    with pytest.raises(ArchiveError):
        unpack(archive, OFFICIAL, target)
    assert everything_below(tmp_path) == before, "all or nothing"
    assert not Path("/tmp/spikingformer-outside").exists()


def test_archive_with_too_many_files(tmp_path):
    archive = tar_of(tmp_path / "set.tar", *((f"set/{i}", b"") for i in range(20)))
    with pytest.raises(ArchiveError, match="holds more than 10 files"):
        unpack(archive, OFFICIAL, tmp_path / "target", max_members=10)


def test_zip_bomb_and_zip_link(tmp_path):
    official = Archive("set.zip", "", "set", max_bytes=10_000)
    bomb = tmp_path / "set.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("set/zeros", bytes(5_000_000))
    assert bomb.stat().st_size < 10_000
    with pytest.raises(ArchiveError, match="holds more data than the official file"):
        unpack(bomb, official, tmp_path / "target")
    with zipfile.ZipFile(bomb, "w") as archive:
        info = zipfile.ZipInfo("set/link")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(ArchiveError, match="is not a regular file"):
        unpack(bomb, official, tmp_path / "target")
    assert everything_below(tmp_path / "target") == set()


def test_a_good_archive_is_unpacked(tmp_path):
    archive = tar_of(tmp_path / "set.tar", ("set/a/b", b"y"))
    assert (unpack(archive, OFFICIAL, tmp_path / "target") / "a" / "b").read_bytes() == b"y"


@pytest.mark.parametrize(
    "name", ["../../n01440764.tar", "/n01440764.tar", "n01440764/../../x.tar", "n01440764.tar\n", "x.tar"]
)
def test_imagenet_archive_with_unofficial_names(tmp_path, name):
    imagenet = pytest.importorskip("spikingformer.data.imagenet")
    tar_of(tmp_path / imagenet.TRAIN_TAR, (name, b"x"))
    before = everything_below(tmp_path)
    (tmp_path / "target").mkdir()
    with pytest.raises(ValueError):
        imagenet.unpack_train(tmp_path, tmp_path / "target", lambda text: None)
    assert {p for p in everything_below(tmp_path) - before if not p.startswith("target")} == set()
    assert not [p for p in (tmp_path / "target").rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE], ids=["link", "hard-link", "device"]
)
def test_imagenet_archive_with_links(tmp_path, kind):
    imagenet = pytest.importorskip("spikingformer.data.imagenet")
    tar_of(tmp_path / imagenet.TRAIN_TAR, ("n01440764.tar", ord(kind)))
    with pytest.raises(ValueError, match="link or device"):
        imagenet.unpack_train(tmp_path, tmp_path / "target", lambda text: None)


def test_no_shell_strings_and_no_unsafe_loaders():
    """The package runs no shell and unpickles nothing but through its own narrow readers."""
    root = Path(__file__).parents[2] / "spikingformer"
    forbidden = (
        "shell=True",
        "os.system(",
        "yaml.load(",
        "pickle.load(",
        "pickle.loads(",
        "weights_only=False",
        "eval(compile",
    )
    found = []
    for path in root.rglob("*.py"):
        text = path.read_text()
        found += [
            f"{path.relative_to(root)}: {word}" for word in forbidden if word in text and "_RecipeLoader" not in text
        ]
    assert found == []
