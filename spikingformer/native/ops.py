"""The compiled kernels as torch ops, for the layers above."""

from .neuron_op import lif

__all__ = ["lif"]
