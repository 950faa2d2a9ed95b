"""Spiking layers: products with BatchNorm, the pool-and-fire stage, attention."""

from spikingformer.native.inputs import POOLS

from .attention import ORDERS, attention_lif, from_heads, spike_attention, to_heads
from .conv import ConvBN, ConvBNLIF, batch_norm, folded_convolution
from .drop_path import DropPath
from .pool import max_pool

__all__ = [
    "ORDERS",
    "POOLS",
    "ConvBN",
    "ConvBNLIF",
    "DropPath",
    "attention_lif",
    "batch_norm",
    "folded_convolution",
    "from_heads",
    "max_pool",
    "spike_attention",
    "to_heads",
]
