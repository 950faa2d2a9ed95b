"""Reading a hub folder: config.json and model.safetensors in the layout of timm's `save_for_hf_hub`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spikingformer.data.events.framing import Framing
from spikingformer.training.tensor_file import read_tensors

if TYPE_CHECKING:
    from spikingformer.training.checkpoint import ModelInfo

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


def is_hub_folder(path: str | Path) -> bool:
    """Whether a folder holds both files."""
    return all((Path(path) / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE))


def read_hub_folder(folder: Path) -> "tuple[dict[str, torch.Tensor], ModelInfo]":
    """Weights and description of the model.

    Raises:
        ValueError: config.json is not JSON or lacks what a model is built from, or the weights are incomplete.
    """
    from spikingformer.training.checkpoint import ModelInfo

    file = folder / CONFIG_FILE
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        pre = config["pretrained_cfg"]
        channels, rows, columns = (int(n) for n in pre["input_size"])
        own = dict(config.get("model_args") or {})
        kwargs = {**own, "num_classes": int(config["num_classes"]), "in_chans": channels, "img_size": [rows, columns]}
        if "time_steps" in config:
            kwargs["time_steps"] = int(config["time_steps"])
        info = ModelInfo(
            name=str(config["architecture"]),
            kwargs=kwargs,
            class_names=tuple(str(n) for n in config.get("label_names") or range(kwargs["num_classes"])),
            mean=tuple(float(v) for v in pre["mean"]),
            std=tuple(float(v) for v in pre["std"]),
            interpolation=str(pre["interpolation"]),
            crop_fraction=float(pre["crop_pct"]),
            kind="events" if channels == 2 else "pictures",
            source=f"hub folder {folder.name}",
            framing=Framing(**config.get("event_framing", {})),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: not the description of a hub folder ({type(error).__name__}: {error}); expected architecture, "
            "num_classes and pretrained_cfg as `spikingformer export --to hub` writes them"
        ) from None
    return read_tensors(folder / WEIGHTS_FILE)[0], info
