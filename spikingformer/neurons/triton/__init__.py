"""Triton kernels for NVIDIA GPUs: the neuron, the pointwise stage between two products, spike attention.

Import `ops` for the functions; importing it needs triton. With TRITON_INTERPRET=1 in the environment before triton is
imported they run on CPU tensors, slowly: that is how they are tested without a GPU.
"""
