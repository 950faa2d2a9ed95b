"""Model files: weights in safetensors with all that is needed to build the model and feed it.

`load_model(path)` is the way in for every command; plain timm loads the same file with
`timm.create_model(name, ..., checkpoint_path=path)`.
"""

import difflib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from spikingformer.data.events.framing import Framing, framing_of
from spikingformer.training.hub_folder import is_hub_folder, read_hub_folder
from spikingformer.training.tensor_file import DESCRIPTION_KEY, read_tensors, write_tensors
from spikingformer.weights import shipped_file, shipped_weights

if TYPE_CHECKING:
    from spikingformer.models import SpikingTransformer

FORMAT = "spikingformer-model-1"
EXPORT_SUFFIXES = (".onnx", ".pt2", ".nir")  # of exported files; the other exports end with .safetensors
TEST_PART, HELD_OUT, UNKNOWN_PART = "test part", "held-out training samples", "part that was not recorded"


def choosing_part(validation_fraction: float) -> str:
    """The part that a run evaluates after each epoch and chooses its best epoch on, in words."""
    return HELD_OUT if validation_fraction else TEST_PART


class UnusableStatistics(ValueError):
    """Pictures cannot be normalised with such a mean or standard deviation."""


def check_statistics(mean: Sequence[float], std: Sequence[float], channels: int | None) -> None:
    """Raises UnusableStatistics, a ValueError, unless mean and std are finite, one value per channel (None: any number
    of channels), and std is above 0."""
    for name, values in (("mean", mean), ("std", std)):
        if channels is not None and len(values) != channels:
            raise UnusableStatistics(
                f"{name} has {len(values)} value{'s' * (len(values) != 1)}, and the model has {channels} input "
                f"channel{'s' * (channels != 1)}: give one for each"
            )
        if not all(math.isfinite(v) for v in values):
            raise UnusableStatistics(f"{name} must be finite numbers, got {tuple(values)}")
    if not all(v > 0 for v in std):
        raise UnusableStatistics(f"std must be above 0, got {tuple(std)}")


@dataclass(frozen=True)
class ModelInfo:
    """What a model file says about itself.

    name, kwargs: arguments of timm.create_model. mean, std: per channel, for pictures scaled to [0, 1].
    kind: "pictures" (B, C, H, W) or "events" (B, T, C, H, W). metrics: of the saved weights.
    metrics_part: what the metrics were counted on, TEST_PART or HELD_OUT; None: the file does not say, as older ones,
    which `evaluated_on` then reads from the recipe. source: how the weights were made. framing: of event frames, where
    there is no recipe to read it from.

    Raises UnusableStatistics, a ValueError, as `check_statistics` does.
    """

    name: str
    kwargs: dict[str, Any]
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_fraction: float = 1.0
    kind: str = "pictures"
    epoch: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    recipe: dict[str, Any] | None = None
    source: str = "trained"
    versions: dict[str, str] = field(default_factory=dict)
    metrics_part: str | None = None
    framing: Framing | None = None

    def __post_init__(self) -> None:
        channels = self.kwargs.get("in_chans")
        check_statistics(self.mean, self.std, channels if isinstance(channels, int) else None)

    @property
    def evaluated_on(self) -> str:
        """What the metrics were counted on, in words."""
        fraction = (self.recipe or {}).get("data", {}).get("validation_fraction")
        return self.metrics_part or (UNKNOWN_PART if fraction is None else choosing_part(fraction))

    @property
    def event_framing(self) -> Framing:
        """How recordings are cut into frames for an event model."""
        return self.framing or framing_of((self.recipe or {}).get("data", {}))

    @property
    def image_size(self) -> tuple[int, int]:
        """Rows and columns the model was made for, in pixels."""
        size = self.kwargs["img_size"]
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    @property
    def channels(self) -> int:
        return int(self.kwargs["in_chans"])


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    import platform
    from importlib.metadata import version

    import spikingformer

    names = ("torch", "timm", "torchvision", "numpy", "safetensors")
    return {
        "spikingformer": spikingformer.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def create_model(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """timm.create_model with our models registered.

    Raises:
        ValueError: unknown name (names the nearest) or arguments the model refuses.
    """
    import difflib

    import timm

    from spikingformer.models import VARIANTS  # registers the models

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        raise ValueError(
            f"model.name: timm knows no model {name!r}"
            + (f"; did you mean {near[0]!r}?" if near else "")
            + "; `spikingformer models` lists ours"
        )
    try:
        return timm.create_model(name, **kwargs)
    except (TypeError, RuntimeError) as error:  # timm's RuntimeError: an unknown tag
        advice = "; it is not a spiking model of this package, which `spikingformer models` lists"
        raise ValueError(f"model {name}: {error}" + ("" if name.partition(".")[0] in VARIANTS else advice)) from None


def registered_name(model: nn.Module) -> str:
    """The timm name to build this model by again: that of timm.create_model, or of the variant that it equals.

    Raises ValueError for a model of another package, and for one without a name.
    """
    from spikingformer.models import VARIANTS, SpikingTransformer

    if not isinstance(model, SpikingTransformer):
        raise ValueError(f"expected a model of this package, got {type(model).__name__}: use timm.create_model")
    cfg = getattr(model, "pretrained_cfg", None)
    if cfg is not None and cfg.get("architecture") in VARIANTS:
        return str(cfg["architecture"])
    for name, variant in VARIANTS.items():
        if name.startswith(type(model).__name__.lower() + "_") and variant == model.config:
            return name
    raise ValueError(
        f"this {type(model).__name__} has no name, so a file could not say how to build it again: create it with "
        "timm.create_model"
    )


def check_head(model: "SpikingTransformer") -> None:
    """Raises ValueError for a head that is not the one linear layer which a file's number of classes stands for."""
    classes, width = model.num_classes, model.num_features
    expected = {"weight": (classes, width), "bias": (classes,)} if classes else {}
    found = {name: tuple(tensor.shape) for name, tensor in model.head.state_dict().items()}
    if found != expected:
        raise ValueError(
            f"the head was replaced: it holds {found}, but a file of weights can only describe {expected}: use "
            "model.reset_classifier(NUMBER_OF_CLASSES) and train that head"
        )


def describe_model(
    model: "SpikingTransformer", class_names: Sequence[str], mean: Sequence[float], std: Sequence[float]
) -> ModelInfo:
    """The description of a model of this package that was trained elsewhere, for `save_model`.

    class_names: in the order of the labels. mean, std: of the training images' channels, scaled to [0, 1]; 0 and 1 for
    event counts. Raises ValueError as `registered_name` and `check_head` do, and for another number of names than
    classes.
    """
    name = registered_name(model)
    check_head(model)
    kwargs = asdict(model.config) | {"num_classes": model.num_classes, "time_steps": model.time_steps}
    if len(class_names) != model.num_classes:
        raise ValueError(f"the model has {model.num_classes} classes, got {len(class_names)} names")
    mean, std = tuple(map(float, mean)), tuple(map(float, std))
    kind = "events" if model.config.takes_events else "pictures"
    return ModelInfo(name, kwargs, tuple(map(str, class_names)), mean, std, kind=kind, versions=versions())  # type: ignore[arg-type]


def save_model(path: Path, weights: dict[str, torch.Tensor], info: ModelInfo) -> None:
    """Writes a model file atomically."""
    write_tensors(
        path, weights, {"format": "pt", DESCRIPTION_KEY: json.dumps({"format": FORMAT, **asdict(info)}, sort_keys=True)}
    )


def _exported_file(path: Path) -> ValueError:
    return ValueError(f"{path}: an exported file, which `predict` runs; give the checkpoint that it was made from")


def _parse_info(path: Path, metadata: dict[str, str]) -> ModelInfo:
    try:
        values = json.loads(metadata[DESCRIPTION_KEY])
        if values.pop("format") != FORMAT:
            raise KeyError("format")
        for name in ("class_names", "mean", "std"):
            values[name] = tuple(values[name])
        if values.get("framing") is not None:
            values["framing"] = Framing(**values["framing"])
        channels = values["kwargs"].get("in_chans")
        if values.get("kind") == "events" and len(values["mean"]) != channels:  # unused, and wrong in older files
            values["mean"], values["std"] = (0.0,) * channels, (1.0,) * channels
        info = ModelInfo(**values)
        _ = info.image_size, info.channels
    except UnusableStatistics as error:
        raise ValueError(f"{path}: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError):
        if "spikingformer.format_version" in metadata:  # as `spikingformer export` writes
            raise _exported_file(path) from None
        raise ValueError(
            f"{path}: a safetensors file, but not a model file of ours (no {FORMAT} description). "
            "Files written by `spikingformer train` and `spikingformer convert` have one."
        ) from None
    return info


def checkpoint_file(path: str | Path) -> Path:
    """The model file of a run's folder (the best one); a file, or a hub folder, itself.

    Raises ValueError for a folder that is neither.
    """
    path = Path(path).expanduser()
    if not path.is_dir() or is_hub_folder(path):
        return path
    for name in ("best.safetensors", "last.safetensors"):
        if (path / name).is_file():
            return path / name
    raise ValueError(
        f"{path}: no best.safetensors or last.safetensors in this folder: is it a run's --output, or a hub folder?"
    )


def named_file(path: str | Path) -> Path:
    """The checked file of MODEL.TAG weights that come with the package, else `checkpoint_file`. Raises as that does."""
    name = str(path)
    if shipped := shipped_file(name):
        return shipped
    file = checkpoint_file(path)
    if not file.exists():
        known = shipped_weights()
        near = [tag for tag in known if tag.startswith(f"{name}.")] or difflib.get_close_matches(name, known, n=1)
        if near:
            raise ValueError(f"{path}: no such checkpoint file; did you mean {' or '.join(near)}?")
    return file


def read_model_file(path: str | Path) -> tuple[dict[str, torch.Tensor], ModelInfo]:
    """Weights and description, without building the model.

    MODEL.TAG names weights that come with the package; a hub folder is read as a file is, a run's folder as its best.
    """
    path = named_file(path)
    if is_hub_folder(path):
        return read_hub_folder(path)
    if path.suffix in EXPORT_SUFFIXES and path.exists():
        raise _exported_file(path)
    tensors, metadata = read_tensors(path)
    return tensors, _parse_info(path, metadata)


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], path: str | Path) -> None:
    """Strict loading.

    Raises:
        ValueError: names that are missing, left over or of another shape; says how many and which first.
    """
    expected = model.state_dict()
    problems = []
    for title, names in (
        ("missing", sorted(set(expected) - set(weights))),
        ("left over", sorted(set(weights) - set(expected))),
        ("of another shape", sorted(n for n in set(expected) & set(weights) if expected[n].shape != weights[n].shape)),
    ):
        if names:
            first = names[0]
            shapes = ""
            if title == "of another shape":
                shapes = f" (file {tuple(weights[first].shape)}, model {tuple(expected[first].shape)})"
            problems.append(f"  {len(names)} {title}, first {first}{shapes}")
    if problems:
        raise ValueError(
            f"{path}: weights of another model than {type(model).__name__} as built here:\n"
            + "\n".join(problems)
            + "\nCheck model.name, embed_dim, depth, data.channels and the number of classes."
        )
    model.load_state_dict(weights, strict=True)


def load_model(path: str | Path, image_size: int | None = None) -> tuple[nn.Module, ModelInfo]:
    """The model of a file, in eval mode on the CPU, and its description.

    Args:
        path: a run's folder, best.safetensors or last.safetensors of one, a converted file, a hub folder, or MODEL.TAG
            of shipped weights.
        image_size: build it for another picture size, pixels; None: the one it was trained with.

    Raises:
        ValueError: missing, truncated, damaged, not a model file, or weights that do not fit their description.
    """
    weights, info = read_model_file(path)
    kwargs = dict(info.kwargs)
    if image_size is not None:
        kwargs["img_size"] = image_size
    if "drop_path_rate" in kwargs:
        kwargs["drop_path_rate"] = 0.0
    model = create_model(info.name, kwargs)
    load_weights(model, weights, path)
    return model.eval(), info
