"""The model families. Importing this package puts every variant into timm's registry."""

from . import spikformer, spikingformer
from .base import ModelConfig, SpikingTransformer, StreamState
from .spikformer import Spikformer
from .spikingformer import Spikingformer

VARIANTS = {**spikingformer.VARIANTS, **spikformer.VARIANTS}

__all__ = ["VARIANTS", "ModelConfig", "Spikformer", "SpikingTransformer", "Spikingformer", "StreamState"]
