"""The compiled kernels as torch ops, for the layers above."""

from .attention_op import attention_lif
from .neuron_op import lif
from .norm_op import batch_norm, bn_statistics
from .product_op import PackedSpikes, pack_spikes, spike_conv, spike_linear
from .stage_op import bn_pool_lif
from .stem_op import stem_conv

__all__ = [
    "PackedSpikes",
    "attention_lif",
    "batch_norm",
    "bn_pool_lif",
    "bn_statistics",
    "lif",
    "pack_spikes",
    "spike_conv",
    "spike_linear",
    "stem_conv",
]
