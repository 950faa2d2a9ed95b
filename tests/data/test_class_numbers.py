"""One numbering of classes for folders and tars; a model's own where it names its classes."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spikingformer.cli import main
from spikingformer.data.class_numbers import check_class_names, number_classes
from spikingformer.data.settings import DataSettings
from spikingformer.data.sources import Part, load_part, load_parts
from spikingformer.training.checkpoint import ModelInfo, create_model, save_model
from spikingformer.training.inputs import class_names_of

# sorted as text: 1, 10, 2, Zebra, ant; as timm does: 1, 2, 10, ant, Zebra
NAMES = ("1", "2", "10", "ant", "Zebra")


def picture(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def write(root: Path, parts: dict[str, tuple[str, ...]], archive: bool) -> Path:
    """Parts of twelve pictures a class, whose shade says class and number; in folders or tars."""
    for part, names in parts.items():
        folder = root / "folders" / part
        for name in names:
            (folder / name).mkdir(parents=True)
            for i in range(12):
                (folder / name / f"{i}.png").write_bytes(picture(20 * NAMES.index(name) + i))
        if archive:
            with tarfile.open(root / f"{part}.tar", "w") as tar:
                tar.add(folder, arcname=".")
    return root if archive else root / "folders"


def settings(name: str, root: Path) -> DataSettings:
    return DataSettings(name=name, root=str(root), image_size=8)


def shades(part: Part) -> list[int]:
    assert part.samples is not None
    return [int(np.asarray(part.samples[i][0])[0, 0, 0]) for i in range(len(part))]


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_classes_and_samples_are_in_timms_order(tmp_path, kind):
    from timm.data.readers import create_reader

    data = settings(kind, write(tmp_path, {"train": NAMES, "val": NAMES}, kind == "tar"))
    part = load_parts(data, 0).train
    timms = create_reader("", root=str(tmp_path / "folders" / "train"))
    assert part.class_names == tuple(sorted(timms.class_to_idx, key=timms.class_to_idx.get)) == NAMES
    assert part.labels.tolist() == [label for _, label in timms.samples]
    assert shades(part) == [20 * c + i for c in range(5) for i in range(12)]


def test_names_that_timm_takes_for_equal_have_an_order():
    assert number_classes(["1", "01", "A", "a"]) == number_classes(["a", "A", "01", "1"]) == {
        "01": 0, "1": 1, "A": 2, "a": 3,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_models_names_number_a_test_part_alone(tmp_path, kind):
    data = settings(kind, write(tmp_path, {"val": ("ant", "1")}, kind == "tar"))
    part = load_part(data, "test", NAMES[::-1])
    assert part.class_names == NAMES[::-1]
    assert part.labels.tolist() == [4] * 12 + [1] * 12
    with pytest.raises(ValueError, match="no train"):
        load_part(data, "test")
    with pytest.raises(ValueError, match=r"1 class that the model lacks, first 'ant' \(the model has 2\).*--data"):
        load_part(data, "test", ("0", "1"))


def test_other_names_are_named():
    check_class_names(("cat", "dog"), ("cat", "dog"), "x")
    with pytest.raises(ValueError, match=r"x has other classes.*1 of 2 differ \(number 1 is 'eel', 'dog' in"):
        check_class_names(("cat", "eel"), ("cat", "dog"), "x")
    with pytest.raises(ValueError, match=r"x has 1 classes, but the model has 2: choose the data it was"):
        check_class_names(("cat",), ("cat", "dog"), "x")


def save(path: Path, names: tuple[str, ...], data: dict, channels: int = 3, source: str = "trained") -> str:
    torch.manual_seed(0)
    kwargs = {"img_size": 8, "in_chans": channels, "num_classes": len(names), "time_steps": 2, "depth": 1}
    kwargs |= {"embed_dim": 16, "num_heads": 2}
    half = (0.5,) * channels
    info = ModelInfo("spikingformer_cml_4_256", kwargs, names, half, half, recipe={"data": data}, source=source)
    save_model(path, create_model(info.name, kwargs).state_dict(), info)
    return str(path)


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_commands_compare_names(tmp_path, capsys, command):
    """Classes in another order, in a built-in set and in files; and a validation part alone, which will do."""
    digits = tuple("0123456789")
    extra = ["--samples", "8", "--show", "0", "--output", str(tmp_path / "r.html")] if command == "report" else []
    for names, status in ((digits, 0), (digits[::-1], 2)):
        model = save(tmp_path / "digits.safetensors", names, {"name": "digits"}, channels=1)
        assert main([command, model, "--device", "cpu", *extra]) == status
    assert "digits has other classes than the model: 10 of 10 differ (number 0 is '0', '9'" in capsys.readouterr().err
    root = write(tmp_path, {"val": NAMES[:2]}, archive=False)
    for names, status in ((NAMES, 0), (NAMES[1:], 2)):
        model = save(tmp_path / "files.safetensors", names, {"name": "folder", "root": str(root)})
        assert main([command, model, "--device", "cpu", *extra]) == status
    assert "1 class that the model lacks, first '1' (the model has 4)" in capsys.readouterr().err


def test_a_converted_file_without_names_is_numbered_by_the_training_part(tmp_path, capsys):
    root = write(tmp_path, {"train": NAMES, "val": NAMES[2:]}, archive=False)
    numbers, data = tuple("01234"), {"name": "folder", "root": str(root)}
    model = save(tmp_path / "m.safetensors", numbers, data, source="converted from x.pth")
    assert main(["evaluate", model, "--device", "cpu"]) == 0
    assert "Zebra" in capsys.readouterr().out
    model = save(tmp_path / "m.safetensors", numbers[:4], data, source="converted from x.pth")
    for command in (["evaluate", model], ["predict", model, "--samples", "1"], ["energy", model, "--data"]):
        assert main([*command, "--device", "cpu"]) == 2
        assert "folder has 5 classes, but the model has 4: choose the data" in capsys.readouterr().err


def test_names_that_say_nothing_are_left_aside():
    kwargs = {"num_classes": 3}
    for names, source, found in (
        (("0", "1", "2"), "converted from x.pth", ()),
        (("0", "1", "2"), "trained", ("0", "1", "2")),
        (("crane", "crane", "eel"), "converted from x.pth", ()),
        (("crane", "dog", "eel"), "converted from x.pth", ("crane", "dog", "eel")),
        ((), "converted from x.pth", ()),
    ):
        assert class_names_of(ModelInfo("m", kwargs, names, (), (), source=source)) == found
