"""The metadata of every exported file: where it came from, and how its input must be prepared."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import timm
from safetensors import SafetensorError
from safetensors.torch import safe_open

import spikingformer
from spikingformer.data.events.framing import Framing
from spikingformer.models import VARIANTS, ModelConfig, SpikingTransformer
from spikingformer.training.checkpoint import check_statistics, registered_name

FORMAT_VERSION = "1"
_PREFIX = "spikingformer."
FORMAT_KEY = _PREFIX + "format_version"  # every exported file of any format contains these bytes


@dataclass(frozen=True)
class Preprocessing:
    """From a picture to the model's input: resize the short side to size / crop_fraction, crop the centre, scale to
    [0, 1], subtract `mean`, divide by `std` (per channel). Event frames are raw counts (mean 0, std 1) of a
    recording cut as `framing` says."""

    size: tuple[int, int]  # rows, columns, in pixels
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_fraction: float = 1.0
    framing: Framing = field(default_factory=Framing)  # of event frames


@dataclass(frozen=True)
class ExportMetadata:
    """What an exported file says about itself: written as strings (JSON if structured), read by `from_strings`."""

    model: str  # timm name
    config: dict[str, Any]  # ModelConfig, field by field
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    time_steps: int  # T that the model was trained with
    input: str = "pictures"  # "pictures" (B, C, H, W) or "events" (B, T, C, H, W)
    checkpoint_sha256: str = ""  # of the checkpoint file; empty if a model in memory was exported
    streaming: bool = False  # one time step with the state as inputs and outputs
    kind: str = "float32"  # what the weights are: float32, int8
    package_version: str = ""
    format_version: str = FORMAT_VERSION

    def to_strings(self) -> dict[str, str]:
        """As a flat {str: str}, the only form that ONNX, safetensors and zip archives share."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["preprocessing"] = asdict(self.preprocessing)
        return {_PREFIX + k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()}

    @classmethod
    def keys(cls) -> list[str]:
        """The keys that `to_strings` writes."""
        return [_PREFIX + f.name for f in fields(cls)]

    @classmethod
    def from_strings(cls, strings: Mapping[str, str], path: str | Path = "this file") -> Self:
        """The inverse of `to_strings`. Raises ValueError if the file was not written by `spikingformer export`."""
        found = {k.removeprefix(_PREFIX): v for k, v in strings.items() if k.startswith(_PREFIX)}
        missing = sorted({f.name for f in fields(cls)} - set(found))
        if missing:
            raise ValueError(
                f"{path} has no {_PREFIX}{missing[0]} in its metadata, so it was not written by `spikingformer "
                "export`: export the checkpoint again"
            )
        if found["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {found['format_version']}, this package reads {FORMAT_VERSION}: export the "
                f"checkpoint again with spikingformer {spikingformer.__version__}"
            )
        plain = {"model", "input", "checkpoint_sha256", "kind", "package_version", "format_version"}
        try:
            values: dict[str, Any] = {
                f.name: found[f.name] if f.name in plain else json.loads(found[f.name]) for f in fields(cls)
            }
            preprocessing = {k: _tuples(v) for k, v in values["preprocessing"].items()}
            preprocessing["framing"] = Framing(**preprocessing.get("framing", {}))  # files before it have none
            values["preprocessing"] = Preprocessing(**preprocessing)
            values["class_names"] = tuple(values["class_names"])
            values["config"] = {k: _tuples(v) for k, v in values["config"].items()}
            read = cls(**values)
            read._check()
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"{path} has damaged metadata ({error}): export the checkpoint again") from None
        return read

    def _check(self) -> None:
        config, pre = self.model_config(), self.preprocessing
        if self.model not in VARIANTS:
            raise ValueError(f"{self.model!r} is not a model of this package")
        if len(self.class_names) != self.config["num_classes"]:
            raise ValueError(f"{self.config['num_classes']} classes, {len(self.class_names)} class names")
        if len(pre.size) != 2:
            raise ValueError(f"size {pre.size}, expected rows and columns")
        check_statistics(pre.mean, pre.std, config.in_chans)
        if not isinstance(self.time_steps, int) or self.time_steps < 1:
            raise ValueError(f"{self.time_steps!r} time steps")

    def model_config(self) -> ModelConfig:
        """The configuration as the model takes it."""
        return ModelConfig(**self.config)

    def create_model(self) -> SpikingTransformer:
        """The model that was exported, with fresh weights."""
        model = timm.create_model(self.model, **self.config)
        assert isinstance(model, SpikingTransformer)
        return model


def describe(
    model: SpikingTransformer,
    class_names: Sequence[str] | None = None,
    checkpoint_sha256: str = "",
    preprocessing: Preprocessing | None = None,
) -> ExportMetadata:
    """The metadata of a model in memory.

    `class_names`: default "0", "1", ... `preprocessing`: default what timm's pretrained_cfg of the model says.
    Raises ValueError for a model that is not in timm's registry, where the number of names is not that of classes, and
    for a mean or std that pictures cannot be normalised with.
    """
    name = registered_name(model)
    names = tuple(map(str, range(model.num_classes))) if class_names is None else tuple(class_names)
    if len(names) != model.num_classes:
        raise ValueError(
            f"the model has {model.num_classes} classes but {len(names)} class names were given: give one per class"
        )
    found = preprocessing or _own_preprocessing(model)
    check_statistics(found.mean, found.std, model.config.in_chans)
    config = {f.name: _tuples(getattr(model.config, f.name)) for f in fields(model.config)}
    config["num_classes"] = model.num_classes
    return ExportMetadata(
        model=name,
        config=config,
        preprocessing=found,
        class_names=names,
        time_steps=model.time_steps,
        input="events" if model.config.takes_events else "pictures",
        checkpoint_sha256=checkpoint_sha256,
        package_version=spikingformer.__version__,
    )


def read_safetensors_metadata(path: str | Path) -> dict[str, str]:
    """The metadata in the header of a safetensors file; empty if there is none."""
    with safe_open(str(path), framework="pt") as file:
        return dict(file.metadata() or {})


def file_kind(path: str | Path) -> str:
    """What the weights of an exported safetensors file are: "float32", "int8", or "" if it does not say."""
    try:
        return read_safetensors_metadata(path).get(_PREFIX + "kind", "")
    except (SafetensorError, OSError):
        return ""


def _own_preprocessing(model: SpikingTransformer) -> Preprocessing:
    size, chans = model.config.img_size, model.config.in_chans
    cfg = getattr(model, "pretrained_cfg", None) or {}
    mean, std = cfg.get("mean", (0.0,) * chans), cfg.get("std", (1.0,) * chans)
    if len(mean) != chans:
        mean, std = (0.0,) * chans, (1.0,) * chans
    return Preprocessing(
        size, tuple(mean), tuple(std), cfg.get("interpolation", "bicubic"), float(cfg.get("crop_pct", 1.0))
    )


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
