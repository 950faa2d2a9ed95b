"""Spiking self-attention: no softmax, so the order of its two products is free.

N: tokens (H * W), d: width of a head. q, k, v are spikes, so both orders give the same small integers exactly.
"""

from collections.abc import Sequence

from torch import Tensor

ORDERS = ("qk", "kv")


def to_heads(x: Tensor, heads: int) -> Tensor:
    """(T, B, C, H, W) to (T, B, heads, N, d)."""
    return x.flatten(3).unflatten(2, (heads, -1)).transpose(-1, -2)


def from_heads(y: Tensor, size: Sequence[int]) -> Tensor:
    """(T, B, heads, N, d) to (T, B, C, H, W); `size` is (H, W)."""
    return y.transpose(2, 3).flatten(3).transpose(2, 3).unflatten(3, size)


def spike_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, order: str) -> Tensor:
    """(q k^T) v * scale for order "qk", q (k^T v) * scale for "kv"; all (T, B, heads, N, d).

    "qk" costs 2 N^2 d operations a head, "kv" 2 N d^2.
    """
    assert order in ORDERS, order
    y = (q @ k.transpose(-1, -2)) @ v if order == "qk" else q @ (k.transpose(-1, -2) @ v)
    return y * scale
