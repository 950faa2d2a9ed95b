"""The compiled kernels as torch ops, for the layers above."""

from .neuron_op import lif
from .product_op import PackedSpikes, pack_spikes, spike_conv, spike_conv3x3, spike_linear

__all__ = ["PackedSpikes", "lif", "pack_spikes", "spike_conv", "spike_conv3x3", "spike_linear"]
