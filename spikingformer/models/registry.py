"""The published sizes of both families, and their way into timm's registry: the only registry there is."""

import sys
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from spikingformer.picture_statistics import CIFAR10_MEAN, CIFAR10_STD, IMAGENET_MEAN, IMAGENET_STD
from spikingformer.weights import Shipped, shipped_weights

from .base import ModelConfig, SpikingTransformer

_DATA_SETS: dict[str, dict[str, Any]] = {
    "cifar": {"img_size": (32, 32), "pooled_stages": (2, 3), "attention_order": "qk", "num_classes": 10},
    "imagenet": {},
    "events": {"img_size": (128, 128), "in_chans": 2, "attention_order": "qk", "num_classes": 10, "time_steps": 16},
}
_SIZES = {  # name: data set, width, depth, heads
    "4_256": ("cifar", 256, 4, 8),
    "2_384": ("cifar", 384, 2, 12),
    "4_384": ("cifar", 384, 4, 12),
    "8_384": ("imagenet", 384, 8, 8),
    "8_512": ("imagenet", 512, 8, 8),
    "8_768": ("imagenet", 768, 8, 8),
    "2_256": ("events", 256, 2, 16),
}
_OVERRIDES = {f.name for f in fields(ModelConfig)}


def _default_cfg(config: ModelConfig) -> dict[str, Any]:
    mean, std = (CIFAR10_MEAN, CIFAR10_STD) if config.img_size == (32, 32) else (IMAGENET_MEAN, IMAGENET_STD)
    if config.takes_events:  # event counts are taken as they are
        mean, std = (0.0, 0.0), (1.0, 1.0)  # type: ignore[assignment]
    return {
        "num_classes": config.num_classes,
        "input_size": (config.in_chans, *config.img_size),
        "fixed_input_size": False,
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": mean,
        "std": std,
        "first_conv": "stem.stages.0.conv",
        "classifier": "head",
        "license": "apache-2.0",
    }


def _shipped_cfg(entry: Shipped, config: ModelConfig) -> dict[str, Any]:
    """timm's description of weights that come with the package."""
    return {
        **_default_cfg(_configured(entry.name, config, dict(entry.kwargs))),
        "file": str(entry.path),
        "mean": entry.mean,
        "std": entry.std,
        "interpolation": entry.interpolation,
        "crop_pct": entry.crop_fraction,
        "label_names": entry.class_names,
        "description": f"top-1 {entry.top1:.2f} % on its {entry.part}, trained by {entry.recipe}",
    }


def _tag(pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None) -> str | None:
    """The tag of a MODEL.TAG name, as timm hands it on."""
    if isinstance(pretrained_cfg, PretrainedCfg):
        return pretrained_cfg.tag
    return pretrained_cfg.get("tag") if isinstance(pretrained_cfg, dict) else pretrained_cfg


def _configured(name: str, base: ModelConfig, overrides: dict[str, Any]) -> ModelConfig:
    """The variant with a caller's keyword arguments. Raises TypeError for one that no model of ours has,
    ValueError for a value that it cannot have.

    timm's own train.py always passes `drop_rate` and may pass `global_pool`: their only values here are accepted.
    """
    if overrides.pop("drop_rate", None):
        raise ValueError(f"{name}: these models have no dropout, got drop_rate other than 0; drop_path_rate is there")
    if (pool := overrides.pop("global_pool", None)) not in (None, "avg"):
        raise ValueError(f"{name}: only average pooling is there (global_pool='avg'), got {pool!r}")
    unknown = sorted(set(overrides) - _OVERRIDES)
    if unknown:
        raise TypeError(f"{name}: unknown argument {unknown[0]!r}; a model takes {', '.join(sorted(_OVERRIDES))}")
    if "img_size" in overrides:
        size = overrides["img_size"]
        overrides["img_size"] = (size, size) if isinstance(size, int) else tuple(size)
    return replace(base, **{k: v for k, v in overrides.items() if v is not None})


def published_variants(
    family: str, cifar: dict[str, Any] | None = None, events: dict[str, Any] | None = None
) -> dict[str, ModelConfig]:
    """Every published size of a family with both downsamplings, by name.

    cifar, events: what this family's models for such data have of their own, as fields of ModelConfig.
    """
    own = {"cifar": cifar or {}, "imagenet": {}, "events": events or {}}
    return {
        f"{family}{'_cml' if pool == 'cml' else ''}_{size}": ModelConfig(
            embed_dim=width, depth=depth, num_heads=heads, pool=pool, **_DATA_SETS[data], **own[data]
        )
        for pool in ("sps", "cml")
        for size, (data, width, depth, heads) in _SIZES.items()
    }


def register_family(
    module: str, family: Callable[[ModelConfig], SpikingTransformer], variants: dict[str, ModelConfig]
) -> dict[str, Any]:
    """Registers every variant as a timm entry point of `module` and returns the module's `default_cfgs`.

    MODEL.TAG stands for weights that come with the package, in the size they were trained in.
    """
    namespace = sys.modules[module]
    shipped = {key: entry for key, entry in shipped_weights().items() if entry.model in variants}
    cfgs: dict[str, dict[str, Any] | PretrainedCfg] = {name: _default_cfg(config) for name, config in variants.items()}
    cfgs |= {key: _shipped_cfg(entry, variants[entry.model]) for key, entry in shipped.items()}
    default_cfgs = generate_default_cfgs(cfgs)
    for entry in shipped.values():  # a plain MODEL stays the published one, not a small one that has weights
        tags = default_cfgs[entry.model].tags
        tags.remove("")
        tags.appendleft("")
    namespace.default_cfgs = default_cfgs  # type: ignore[attr-defined]  # timm looks it up while registering

    def make(name: str, config: ModelConfig) -> Callable[..., nn.Module]:
        def build(**overrides: Any) -> SpikingTransformer:
            overrides.pop("pretrained_cfg", None)
            overrides.pop("pretrained_cfg_overlay", None)
            return family(_configured(name, config, overrides))

        def entry_point(
            pretrained: bool = False, pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None, **kwargs: Any
        ) -> nn.Module:
            entry = shipped.get(f"{name}.{_tag(pretrained_cfg)}")
            if entry is not None:
                kwargs = {**entry.kwargs, **kwargs}
                if pretrained:
                    entry.check()
            elif pretrained and pretrained_cfg is None and not kwargs.get("pretrained_cfg_overlay"):
                tags = ", ".join(n for n in shipped if n.startswith(f"{name}.")) or "none for this model"
                raise RuntimeError(  # timm's own type
                    f"No pretrained weights for {name} without a tag; those that come with the package: {tags}"
                )
            depth = kwargs.get("depth") or config.depth
            return build_model_with_cfg(
                build,  # type: ignore[arg-type]
                name,
                pretrained,
                pretrained_cfg,  # type: ignore[arg-type]
                feature_cfg={"out_indices": tuple(range(depth)), "feature_cls": "getter"},
                **kwargs,
            )

        entry_point.__name__ = entry_point.__qualname__ = name
        entry_point.__module__ = module
        entry_point.__doc__ = f"{name}: width {config.embed_dim}, depth {config.depth}, pool {config.pool}."
        return entry_point

    for name, config in variants.items():
        setattr(namespace, name, register_model(make(name, config)))
    return default_cfgs
