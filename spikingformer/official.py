"""Published checkpoints: their names as data, and their conversion into ours.

Sources: Spikingformer-CML (arXiv 2304.11954's code), Spikingformer, Spikformer (arXiv 2209.15425's code).
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .models import SpikingTransformer

# Keys that published models never use. They are dropped by name; any other key that does not fit is an error.
DROPPED = (
    r"block\.\d+\.norm[12]\.(weight|bias)",  # LayerNorms that are built and never called
    r"norm\.(weight|bias)",  # Spikformer for DVS: the same
    r"pos_embed",  # Spikformer for DVS: the same
    r"block\.\d+\.attn\.res_lif",  # Spikformer for DVS: a neuron that is built and never called
    r"(.*\.)?total_(ops|params)",  # left behind by an operation counter
)

_STEM = [  # first the stage's index 0, then those that carry a number
    (r"patch_embed\.proj_(conv|bn|lif)\b", r"stem.stages.0.\1"),
    (r"patch_embed\.rpe_(conv|bn|lif)\b", r"stem.rpe.\1"),
]
_SPIKINGFORMER = [
    *_STEM[:1],
    (r"patch_embed\.(?:proj|block)4_(conv|bn)\b", r"stem.last.\1"),
    (r"patch_embed\.(?:proj|block)(\d)_(conv|bn)\b", r"stem.stages.\1.\2"),
    (r"patch_embed\.(?:proj|block)(\d)_lif\b", lambda m: f"stem.stages.{int(m[1]) - 1}.lif"),
    (r"block\.(\d+)\.attn\.proj_lif\b", r"blocks.\1.attn.lif"),
    (r"block\.(\d+)\.mlp\.mlp1_lif\b", r"blocks.\1.mlp.lif"),
    (r"block\.(\d+)\.mlp\.mlp2_lif\b", r"blocks.\1.mlp.fc1.lif"),
    (r"block\.(\d+)\.mlp\.mlp([12])_(conv|bn)\b", r"blocks.\1.mlp.fc\2.\3"),
    # names of an earlier version of the code, seen in the released log of 8-512's energy
    (r"patch_embed\.proj_(conv|bn)(\d)\b", r"stem.stages.\2.\1"),
    (r"patch_embed\.rpe_(conv|bn)\b", r"stem.last.\1"),
    (r"block\.(\d+)\.mlp\.fc([12])_(conv|bn)\b", r"blocks.\1.mlp.fc\2.\3"),
]
_SPIKFORMER = [
    *_STEM,
    (r"patch_embed\.proj_(conv|bn|lif)(\d)\b", r"stem.stages.\2.\1"),
    (r"patch_embed\.block(\d)_(conv|bn|lif)\b", lambda m: f"stem.stages.{int(m[1]) - 1}.{m[2]}"),
    (r"block\.(\d+)\.mlp\.fc([12])_(?:conv|linear)\b", r"blocks.\1.mlp.fc\2.conv"),
    (r"block\.(\d+)\.mlp\.fc([12])_(bn|lif)\b", r"blocks.\1.mlp.fc\2.\3"),
]
_SHARED = [
    (r"block\.(\d+)\.attn\.attn_lif\b", r"blocks.\1.attn.attn_lif"),
    (r"block\.(\d+)\.attn\.(q|k|v|proj)_(?:conv|linear)\b", r"blocks.\1.attn.\2.conv"),
    (r"block\.(\d+)\.attn\.(q|k|v|proj)_(bn|lif)\b", r"blocks.\1.attn.\2.\3"),
    (r"head\b", r"head"),
    (r"(stem|blocks)\.", r"\1."),  # this package's own names stand
]
RULES: dict[str, list[tuple[str, Any]]] = {
    "spikingformer": _SPIKINGFORMER + _SHARED,
    "spikformer": _SPIKFORMER + _SHARED,
}


# Where scripts keep weights inside a file, in the order in which they are looked for.
WRAPPERS = ("state_dict", "model", "state_dict_ema", "model_ema", "module")


def bare_name(name: str) -> str:
    """A weight's name without the prefixes of DataParallel, DDP and torch.compile."""
    return re.sub(r"^((module|_orig_mod)\.)+", "", name)


def unwrapped(content: Any) -> Any:
    """The innermost mapping under WRAPPERS."""
    while isinstance(content, Mapping):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    return content


def weights_of(content: Any, source: object) -> dict[str, Tensor]:
    """The tensors inside a checkpoint's content, by bare names. Raises ValueError if there are none."""
    inner = unwrapped(content)
    found = (
        {bare_name(str(k)): v for k, v in inner.items() if isinstance(v, Tensor)} if isinstance(inner, Mapping) else {}
    )
    if not found:
        raise ValueError(f"{source}: no weights in it (expected a state dict, bare or under {', '.join(WRAPPERS)})")
    return found


def our_name(official: str, family: str) -> str | None:
    """Our name for a published parameter, buffer or module; None for one that is dropped by name.

    `family`: "spikingformer" or "spikformer". Raises ValueError for a name that no rule knows.
    """
    bare = bare_name(official)
    if any(re.fullmatch(rule, bare) for rule in DROPPED):
        return None
    for pattern, replacement in RULES[family]:
        renamed, count = re.subn(f"^{pattern}", replacement, bare)
        if count:
            return renamed
    raise ValueError(f"{official!r} is not a name in published {family} checkpoints")


def described_by(weights: Mapping[str, Tensor], family: str) -> dict[str, Any]:
    """The arguments of a model that follow from the shapes of its weights: width, depth, MLP ratio, channels, classes.

    Heads, picture size and time steps do not follow from them. Raises ValueError for weights of another family.
    """
    shapes = {our_name(name, family): tuple(value.shape) for name, value in weights.items()}
    needed = ("head.weight", "stem.stages.0.conv.weight", "blocks.0.mlp.fc1.conv.weight")
    if missing := [name for name in needed if len(shapes.get(name, ())) < 2]:
        raise ValueError(f"no {missing[0]} in it: not a published checkpoint of these models")
    (classes, width), first, (hidden, _) = (shapes[name][:2] for name in needed)
    mlp_ratio = hidden / width
    if int(width * mlp_ratio) < hidden:  # models cut the product off, so a quotient rounded down loses a channel
        mlp_ratio = math.nextafter(mlp_ratio, math.inf)
    return {
        "embed_dim": width,
        "depth": len({name.split(".")[1] for name in shapes if name and name.startswith("blocks.")}),
        "mlp_ratio": mlp_ratio,
        "in_chans": first[1],
        "num_classes": classes,
    }


def _first(pattern: str, names: set[str]) -> str | None:
    return next((name for name in sorted(names) if re.match(pattern, name)), None)


def _family_told(names: set[str]) -> tuple[str, str, bool] | None:
    """The family that bare published names tell, the name that tells it, and whether no other is possible."""
    if told := _first(r"block\.\d+\.mlp\.mlp1_conv\b", names):
        return "spikingformer", told, True
    told = _first(r"block\.\d+\.mlp\.fc1_(conv|linear)\b", names)
    if told is None:
        return None
    # an earlier Spikingformer had fc1_conv too, but none of these
    only = _first(r"pos_embed$|norm\.|block\.\d+\.(attn\.res_lif|mlp\.fc1_linear)\b", names)
    return "spikformer", only or told, only is not None


def _pool_told(names: set[str], cifar: bool) -> tuple[str, str] | None:
    """The order of downsampling that bare published names tell, and the name that tells it.

    `cifar`: the model is one for CIFAR; for ImageNet and event frames, names of Spikingformer tell nothing.
    """
    for pattern, pool in (
        (r"patch_embed\.block0_conv\b", "sps"),  # Spikingformer, CIFAR
        *([(r"patch_embed\.proj1_conv\b", "cml")] if cifar else []),  # Spikingformer
        (r"patch_embed\.block1_conv\b", "cml"),  # Spikformer
        (r"patch_embed\.proj_conv1\b", "sps"),  # Spikformer
    ):
        if told := _first(pattern, names):
            return pool, told
    return None


def doubts(weights: Mapping[str, Any], model: SpikingTransformer) -> list[str]:
    """Why published weights may not be those of `model`, although every one of them would find a place in it.

    The names of published checkpoints tell the family and, for most, the order of downsampling; shapes tell neither.
    Returns at most one sentence; none where names and model agree, or where the names are this package's own.
    """
    names = {bare_name(name) for name in weights}
    family = _family_told(names)
    if family and family[0] != model.family():
        return [f"{family[1]} is a name of {family[0]} checkpoints, the model is a {model.family()}"]
    pool = _pool_told(names, cifar=len(model.config.pooled_stages) == 2)
    if pool and pool[0] != model.config.pool:
        return [f"{pool[1]} is a name of checkpoints with pool={pool[0]!r}, the model has {model.config.pool!r}"]
    return []


def convert_state_dict(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A published state dict as one that `model.load_state_dict(..., strict=True)` takes.

    Every tensor keeps its values; 1x1 products are reshaped to (out, in, 1, 1). A checkpoint that holds its weights
    under one of WRAPPERS is unwrapped. Raises ValueError that names the keys if one has no place in the model, has
    another shape, is missing, or belongs to the other family alone. Names that only suggest that: see `doubts`.
    """
    if not isinstance(model, SpikingTransformer):
        raise ValueError(f"expected a model of this package, got {type(model).__name__}")
    state_dict = unwrapped(state_dict)
    family = model.family()
    told = _family_told({bare_name(name) for name in state_dict})
    if told and told[2] and told[0] != family:
        raise ValueError(f"this checkpoint is one of a {told[0]} (it has {told[1]}), the model is a {family}")
    target = model.state_dict()
    converted: dict[str, Tensor] = {}
    problems: list[str] = []
    for key, value in state_dict.items():
        try:
            name = our_name(key, family)
        except ValueError:
            problems.append(f"{key}: no such weight in {type(model).__name__}")
            continue
        if name is None:
            continue
        if name in converted:
            problems.append(f"{key}: {name} was already given under another name")
        elif name not in target:
            problems.append(f"{key}: the model has no {name}")
        elif value.numel() != target[name].numel() or value.shape[:2] != target[name].shape[:2]:
            problems.append(f"{key}: shape {tuple(value.shape)}, the model's {name} is {tuple(target[name].shape)}")
        else:
            converted[name] = value.reshape(target[name].shape)
    for name in set(target) - set(converted):
        if name.endswith("num_batches_tracked"):  # averages by momentum do not read it, and some files do not have it
            converted[name] = torch.zeros_like(target[name])
    problems += [f"{name}: missing from the checkpoint" for name in sorted(set(target) - set(converted))]
    if problems:
        shown = "\n  ".join(problems[:8]) + (f"\n  and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(
            f"this checkpoint does not fit the model:\n  {shown}\n"
            "Create the model with the checkpoint's family, embed_dim, depth, num_classes and in_chans."
        )
    return converted
