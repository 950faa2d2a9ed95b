"""Spiking self-attention: no softmax, so the order of its two products is free.

N: tokens (H * W), d: width of a head. q, k, v are spikes, so both orders give the same small integers exactly.
"""

from collections.abc import Sequence

from torch import Tensor

from spikingformer.neurons import LIF, State

from .fused import attention_ops

ORDERS = ("qk", "kv")


def to_heads(x: Tensor, heads: int) -> Tensor:
    """(T, B, C, H, W) to (T, B, heads, N, d)."""
    return x.flatten(3).unflatten(2, (heads, -1)).transpose(-1, -2)


def from_heads(y: Tensor, size: Sequence[int]) -> Tensor:
    """(T, B, heads, N, d) to (T, B, C, H, W); `size` is (H, W)."""
    return y.transpose(2, 3).flatten(3).transpose(2, 3).unflatten(3, size)


def attention_lif(
    q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float, order: str, lif: LIF, state: State | None = None
) -> Tensor:
    """Spike attention of each head and the neuron behind it: spikes (T, B, C, H, W), like q, k and v."""
    if state is None and (ops := attention_ops(q, lif)) is not None:
        spikes = ops.attention_lif(q, k, v, heads, scale, lif.config)
        if spikes is not None:
            return spikes
    y = spike_attention(to_heads(q, heads), to_heads(k, heads), to_heads(v, heads), scale, order)
    return lif(from_heads(y, q.shape[3:]), state)


def spike_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, order: str) -> Tensor:
    """(q k^T) v * scale for order "qk", q (k^T v) * scale for "kv"; all (T, B, heads, N, d).

    "qk" costs 2 N^2 d operations a head, "kv" 2 N d^2.
    """
    assert order in ORDERS, order
    y = (q @ k.transpose(-1, -2)) @ v if order == "qk" else q @ (k.transpose(-1, -2) @ v)
    return y * scale
