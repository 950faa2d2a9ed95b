"""Spiking vision transformers: train, measure, deploy. Importing the package registers its models with timm."""

from typing import TYPE_CHECKING, Any

from .registration import register_with_timm

if TYPE_CHECKING:
    from . import models

    __version__: str

__all__ = ["__version__", "models"]

register_with_timm()


def __getattr__(name: str) -> Any:
    """`models` and `__version__` on first use: the command's help would wait seconds for torch, unused."""
    if name == "models":
        import importlib

        return importlib.import_module("spikingformer.models")
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("spikingformer")
        except PackageNotFoundError:  # run from a clone that was never installed
            return "0.1.0"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
