"""Spike attention with its neuron on a GPU, as torch ops.

Token-major: q, k, v are (T, B, N, C), each token's channels next to each other in memory; that is also what a
channels-last (T, B, C, H, W) tensor is, so nothing is copied between a product and attention. C = heads * d, channel
c belongs to head c // d.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from ..config import LIFConfig
from .attention_kernels import attention_backward, attention_backward_keys, attention_counts, attention_forward
from .launch import (
    NEURON_ARGUMENTS,
    NEURON_SCHEMA,
    OPTIONS,
    check_float,
    neuron_arguments,
    on_device,
    power_of_two_at_least,
)
from .neuron import compile_time_neuron

MOST_TOKENS = 2048  # k^T v counts tokens: integers up to 2048 are exact in float16
ROWS_AT_ONCE = 64  # tokens that a program holds


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride()[:3]


def _tile(tokens: int, width: int) -> tuple[int, int, int]:
    """(tokens of a program, padded head width, warps). The matrix units want at least 16 of each."""
    rows = min(ROWS_AT_ONCE, max(16, power_of_two_at_least(tokens)))
    padded = max(16, power_of_two_at_least(width))
    return rows, padded, 4 if padded <= 64 else 8


def _operand(dtype: torch.dtype) -> tl.dtype:
    # Triton's interpreter multiplies bfloat16 operands as the integers that it stores them in.
    if dtype == torch.bfloat16:
        return tl.float32 if isinstance(attention_backward, InterpretedFunction) else tl.bfloat16
    return tl.float16 if dtype == torch.float16 else tl.float32


def _packed_parts(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return qkv.unflatten(-1, (3, -1)).unbind(-2)


def _counts(k, v, heads, rows, padded, warps):
    """k^T v of every step, where a program holds a part of the tokens only; else None."""
    steps, batch, tokens, channels = k.shape
    if rows >= tokens:
        return None
    kv = k.new_empty(steps, batch * heads, padded, padded, dtype=torch.float16)
    attention_counts[(batch * heads, steps)](
        k, v, kv, *_strides(k), *_strides(v), batch, tokens, heads, channels // heads, rows, padded,
        num_warps=warps, num_stages=1, **OPTIONS,
    )  # fmt: skip
    return kv


def _run_forward(q, k, v, heads, scale, neuron):
    steps, batch, tokens, channels = q.shape
    s = q.new_empty(q.shape)
    rows, padded, warps = _tile(tokens, channels // heads)
    with on_device(q):
        attention_forward[(batch * heads, triton.cdiv(tokens, rows))](
            q, k, v, s, _counts(k, v, heads, rows, padded, warps),
            *_strides(q), *_strides(k), *_strides(v), batch, tokens, heads, scale,
            steps, channels // heads, compile_time_neuron(LIFConfig(*neuron)), rows, padded,
            num_warps=warps, num_stages=1, **OPTIONS,
        )  # fmt: skip
    return s


def _run_backward(grad_s, q, k, v, grad_q, grad_k, grad_v, heads, scale, neuron):
    steps, batch, tokens, channels = q.shape
    width = channels // heads
    rows, padded, warps = _tile(tokens, width)
    blocks = triton.cdiv(tokens, rows)
    alone = blocks == 1
    grad_y = grad_q if alone else q.new_empty(q.shape)
    # h stays in registers up to 64 KB, a quarter of a multiprocessor's.
    in_registers = steps <= 8 and 4 * steps * rows * padded <= 65536
    h = None if in_registers else q.new_empty(q.shape, dtype=torch.float32)
    products = ("ieee" if q.dtype == torch.float32 else "tf32", _operand(q.dtype))  # precision: read for float32 alone
    strides = (*_strides(q), *_strides(k), *_strides(v))
    with on_device(q):
        attention_backward[(batch * heads, blocks)](
            q, k, v, grad_s.contiguous(), grad_q, grad_k, grad_v, grad_y,
            _counts(k, v, heads, rows, padded, warps), h, *strides,
            batch, tokens, heads, scale, grad_q.stride(2),
            alone, steps, width, compile_time_neuron(LIFConfig(*neuron)), *products, rows, padded,
            num_warps=warps, num_stages=1, **OPTIONS,
        )  # fmt: skip
        if not alone:
            attention_backward_keys[(batch * heads, steps)](
                q, k, v, grad_y, grad_k, grad_v, *strides, batch, tokens, heads, grad_q.stride(2),
                width, *products, rows, padded, num_warps=warps, num_stages=1, **OPTIONS,
            )  # fmt: skip


@torch.library.custom_op(
    "spikingformer::triton_spike_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, int heads, float scale, {NEURON_SCHEMA}) -> Tensor",
)
def triton_spike_attention(q, k, v, heads, scale, *neuron):
    """Spikes (T, B, N, C)."""
    return _run_forward(_rows_together(q), _rows_together(k), _rows_together(v), heads, scale, neuron)


@triton_spike_attention.register_fake
def _(q, k, v, heads, scale, *neuron):
    return q.new_empty(q.shape)


@torch.library.custom_op(
    "spikingformer::triton_spike_attention_backward",
    mutates_args=(),
    schema="(Tensor grad_s, Tensor q, Tensor k, Tensor v, int heads, float scale, "
    f"{NEURON_SCHEMA}) -> (Tensor, Tensor, Tensor)",
)
def triton_spike_attention_backward(grad_s, q, k, v, heads, scale, *neuron):
    """Gradients of q, k, v."""
    q, k, v = map(_rows_together, (q, k, v))
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    _run_backward(grad_s, q, k, v, *grads, heads, scale, neuron)
    return grads


@triton_spike_attention_backward.register_fake
def _(grad_s, q, k, v, heads, scale, *neuron):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.custom_op(
    "spikingformer::triton_spike_attention_packed",
    mutates_args=(),
    schema=f"(Tensor qkv, int heads, float scale, {NEURON_SCHEMA}) -> Tensor",
)
def triton_spike_attention_packed(qkv, heads, scale, *neuron):
    """Spikes (T, B, N, C) from q, k, v side by side in the channels, (T, B, N, 3 C)."""
    return _run_forward(*_packed_parts(_rows_together(qkv)), heads, scale, neuron)


@triton_spike_attention_packed.register_fake
def _(qkv, heads, scale, *neuron):
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)


@torch.library.custom_op(
    "spikingformer::triton_spike_attention_packed_backward",
    mutates_args=(),
    schema=f"(Tensor grad_s, Tensor qkv, int heads, float scale, {NEURON_SCHEMA}) -> Tensor",
)
def triton_spike_attention_packed_backward(grad_s, qkv, heads, scale, *neuron):
    """Gradient of the packed q, k, v."""
    qkv = _rows_together(qkv)
    grad = qkv.new_empty(qkv.shape)
    _run_backward(grad_s, *_packed_parts(qkv), *_packed_parts(grad), heads, scale, neuron)
    return grad


@triton_spike_attention_packed_backward.register_fake
def _(grad_s, qkv, heads, scale, *neuron):
    return qkv.new_empty(qkv.shape)


def _rows_together(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _setup_context(ctx, inputs, output):
    tensors, settings = inputs[: -2 - NEURON_ARGUMENTS], inputs[-2 - NEURON_ARGUMENTS :]
    ctx.save_for_backward(*tensors)
    ctx.settings = settings


def _backward(ctx, grad_s):
    grads = triton_spike_attention_backward(grad_s, *ctx.saved_tensors, *ctx.settings)
    return *grads, *[None] * (2 + NEURON_ARGUMENTS)


def _backward_packed(ctx, grad_s):
    grad = triton_spike_attention_packed_backward(grad_s, *ctx.saved_tensors, *ctx.settings)
    return grad, *[None] * (2 + NEURON_ARGUMENTS)


triton_spike_attention.register_autograd(_backward, setup_context=_setup_context)
triton_spike_attention_packed.register_autograd(_backward_packed, setup_context=_setup_context)


def _check(x: Tensor, channels: int, heads: int) -> None:
    check_float("q, k, v", x)
    if x.ndim != 4:
        raise ValueError(f"attention takes (T, B, N, C) spikes, got shape {tuple(x.shape)}")
    if channels % heads:
        raise ValueError(f"{channels} channels do not split into {heads} heads")
    if x.shape[2] > MOST_TOKENS:
        raise ValueError(f"at most {MOST_TOKENS} tokens keep the kernel's counts exact, got {x.shape[2]}")


def spike_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float, config: LIFConfig) -> Tensor:
    """LIF(q (k^T v) * scale) over T: spikes (T, B, N, C) from spikes q, k, v (T, B, N, C), each 0 or 1.

    float32, bfloat16 or float16; sums are exact in each. Gradients in the same type, for q, k and v; backward keeps
    q, k, v alone. Raises ValueError for other types or shapes, or more than 2048 tokens.
    """
    _check(q, q.shape[-1], heads)
    if not q.shape == k.shape == v.shape:
        raise ValueError(f"q, k, v must have one shape, got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    return triton_spike_attention(q, k, v, heads, scale, *neuron_arguments(config))


def spike_attention_packed(qkv: Tensor, heads: int, scale: float, config: LIFConfig) -> Tensor:
    """`spike_attention` for q, k, v side by side in the channels, (T, B, N, 3 C): what one product for all three gives.

    Its gradient is one tensor too, so nothing is joined in backward.
    """
    if qkv.shape[-1] % 3:
        raise ValueError(f"packed q, k, v need a multiple of 3 channels, got {qkv.shape[-1]}")
    _check(qkv, qkv.shape[-1] // 3, heads)
    return triton_spike_attention_packed(qkv, heads, scale, *neuron_arguments(config))
