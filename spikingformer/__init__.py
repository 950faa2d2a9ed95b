"""Spiking vision transformers: train, measure, deploy. Importing the package registers its models with timm."""

from importlib.metadata import PackageNotFoundError, version

from . import models

try:
    __version__ = version("spikingformer")
except PackageNotFoundError:  # run from a clone that was never installed
    __version__ = "0.1.0"

__all__ = ["__version__", "models"]
