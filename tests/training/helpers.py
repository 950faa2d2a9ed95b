"""A run small enough for a test: digits at 8x8, width 16, one block, a second or two an epoch on one core."""

import sys
from pathlib import Path

import torch

from spikingformer.training.recipe import Recipe, build_recipe
from spikingformer.training.tensor_file import read_tensors

TINY = {
    "model": {"name": "spikingformer_cml_4_256", "embed_dim": 16, "depth": 1, "num_heads": 2, "time_steps": 2},
    "data": {"name": "digits", "image_size": 8, "channels": 1},
    "augment": {"engine": "batched", "flip": 0.0, "crop_padding": 1},
    "log": {"tensorboard": False},
    "epochs": 2,
    "batch_size": 240,
    "evaluation_batch_size": 360,
    "workers": 0,
    "device": "cpu",
    "threads": 1,  # two spinning threads a test are many times slower on a busy machine
}


def tiny_recipe(**changes: object) -> Recipe:
    """TINY with sections merged and other keys replaced; `model__depth=2` reaches into a section."""
    values = {k: dict(v) if isinstance(v, dict) else v for k, v in TINY.items()}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            values.setdefault(section, {})[name] = value
        else:
            values[key] = value
    return build_recipe(values, "test")


def assert_same_tensors(first: Path, second: Path) -> None:
    a, b = read_tensors(first)[0], read_tensors(second)[0]
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} tensors differ, first {different[0]}"


def allow_capturable_on_cpu(monkeypatch) -> None:
    """torch refuses capturable optimisers on the CPU; stand-ins for graphs need none of a graph's guarantees."""
    for module in list(sys.modules.values()):
        if "optim" in getattr(module, "__name__", "") and hasattr(module, "_get_capturable_supported_devices"):
            monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda *_, **__: ["cpu"])
