"""CIFAR-10 and CIFAR-100 from the official python files, read without running anything they contain.

The official files are pickles. Each file's MD5 is checked against torchvision's list first, and the unpickler
then resolves only the names that numpy arrays need, so a swapped file is refused twice.
"""

import hashlib
import io
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from spikingformer.data.pictures import PictureSet
from spikingformer.picture_statistics import CIFAR10_MEAN, CIFAR10_STD, CIFAR100_MEAN, CIFAR100_STD


@dataclass(frozen=True)
class CifarFiles:
    """Where a CIFAR set's files lie and what they must be. MD5s are torchvision's."""

    name: str
    folder: str
    train: dict[str, str]
    test: dict[str, str]
    meta: tuple[str, str]
    label_key: str
    names_key: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


def cifar_files(name: str) -> CifarFiles:
    """The table of `cifar10` or `cifar100`."""
    from torchvision.datasets import CIFAR10, CIFAR100

    source, label_key = (CIFAR10, "labels") if name == "cifar10" else (CIFAR100, "fine_labels")
    mean, std = (CIFAR10_MEAN, CIFAR10_STD) if name == "cifar10" else (CIFAR100_MEAN, CIFAR100_STD)
    return CifarFiles(
        name,
        source.base_folder,
        dict(source.train_list),
        dict(source.test_list),
        (source.meta["filename"], source.meta["md5"]),
        label_key,
        source.meta["key"],
        mean,
        std,
    )


class _ArraysOnly(pickle.Unpickler):
    """Resolves what numpy arrays need and nothing else."""

    def find_class(self, module: str, name: str) -> object:
        import numpy._core.multiarray as multiarray

        module = module.replace("numpy.core.", "numpy._core.")
        if (module, name) == ("numpy._core.multiarray", "_reconstruct"):
            return multiarray._reconstruct
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if (module, name) == ("_codecs", "encode"):
            import _codecs

            return _codecs.encode
        raise pickle.UnpicklingError(f"refused to load {module}.{name}")


def read_verified(path: Path, md5: str, name: str) -> dict:
    """The dict in one official file.

    Raises:
        ValueError: the file is missing or its MD5 differs; says how to get the right one.
    """
    remedy = f"Run `spikingformer data {name} --root {path.parent.parent}` to fetch it again."
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file. {remedy}") from None
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise ValueError(f"{path}: damaged or not the official file: MD5 {found}, expected {md5}. {remedy}")
    try:
        return _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: {error}; nothing was run. {remedy}") from None


def load_cifar(name: str, root: Path, part: str) -> PictureSet:
    """50,000 training or 10,000 test pictures, uint8 (N, 3, 32, 32).

    Args:
        name: cifar10 or cifar100.
        root: folder that holds cifar-10-batches-py or cifar-100-python (or that folder itself).
        part: train or test.
    """
    files = cifar_files(name)
    folder = root if root.name == files.folder else root / files.folder
    if not folder.is_dir():
        raise ValueError(
            f"no folder {folder} for {name} (data.root={root}). Run `spikingformer data {name} --root {root}` "
            "to fetch it, or set data.root (evaluate, energy: --root) to where it lies."
        )
    entries = [
        read_verified(folder / file, md5, name)
        for file, md5 in {"train": files.train, "test": files.test}[part].items()
    ]
    names = read_verified(folder / files.meta[0], files.meta[1], name)[files.names_key]
    pictures = np.concatenate([np.asarray(entry["data"], dtype=np.uint8).reshape(-1, 3, 32, 32) for entry in entries])
    labels = np.concatenate([np.asarray(entry[files.label_key], dtype=np.int64) for entry in entries])
    return PictureSet(torch.from_numpy(pictures), torch.from_numpy(labels), tuple(names), files.mean, files.std)
