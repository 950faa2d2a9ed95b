# ruff: noqa: RUF005  (Triton joins tuples with + alone)
"""Spike attention and the neuron behind it, one kernel per direction.

Per picture and head, at every time step: y = q (k^T v) * scale, then LIF over time. q, k, v are 0 or 1, so k^T v and
q (k^T v) are integers: at most 2048 tokens keep k^T v exact in float16, and float32 sums keep y exact.

q, k, v: [STEPS, B, N, HEADS * D] with any stride of time, batch and token, channels next to each other. Outputs and
gradients of outputs are contiguous. Padded to powers of two: ROWS (all tokens, or a block of them) and WIDTH (>= 16,
the smallest that the matrix units take).
"""

import triton
import triton.language as tl

from .neuron import carried_gradient, charge, charge_gradient, fires, input_gradient, reset, rest


@triton.jit
def _rows(ptr, first, stride, N, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """[ROWS, WIDTH] tile of tokens `first`... of one head."""
    tokens = first + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    mask = (tokens < N)[:, None] & (columns < D)[None, :]
    return tl.load(ptr + tokens[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _store_rows(ptr, tile, first, stride, N, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    tokens = first + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    mask = (tokens < N)[:, None] & (columns < D)[None, :]
    tl.store(ptr + tokens[:, None] * stride + columns[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _keys_values(k_ptr, v_ptr, k_row, v_row, N, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """k^T v over all tokens, [WIDTH, WIDTH] float32 integers."""
    total = tl.zeros([WIDTH, WIDTH], tl.float32)
    for first in range(0, N, ROWS):
        k = _rows(k_ptr, first, k_row, N, D, ROWS, WIDTH).to(tl.float16)
        v = _rows(v_ptr, first, v_row, N, D, ROWS, WIDTH).to(tl.float16)
        total = tl.dot(tl.trans(k), v, total)
    return total


@triton.jit
def attention_forward(
    q_ptr, k_ptr, v_ptr, s_ptr,
    q_time, q_batch, q_row, k_time, k_batch, k_row, v_time, v_batch, v_row,
    B, N, HEADS, scale,
    STEPS: tl.constexpr, D: tl.constexpr, NEURON: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Grid: (B * HEADS, blocks of tokens)."""
    batch = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    first = tl.program_id(1) * ROWS
    channels = HEADS * D
    membrane = rest([ROWS, WIDTH], NEURON)
    for t in range(STEPS):
        kv = _keys_values(
            k_ptr + tl.cast(k_time, tl.int64) * t + batch * k_batch + head * D, v_ptr + tl.cast(v_time, tl.int64) * t + batch * v_batch + head * D,
            k_row, v_row, N, D, ROWS, WIDTH,
        )  # fmt: skip
        q = _rows(q_ptr + tl.cast(q_time, tl.int64) * t + batch * q_batch + head * D, first, q_row, N, D, ROWS, WIDTH)
        y = tl.dot(q.to(tl.float16), kv.to(tl.float16)) * scale
        h = charge(membrane, y, NEURON)
        fired = fires(h, NEURON)
        membrane = reset(h, fired, NEURON)
        out = s_ptr + (t * B + batch) * N * channels + head * D
        _store_rows(out, fired.to(tl.float32), first, channels, N, D, ROWS, WIDTH)


@triton.jit
def attention_backward(
    q_ptr, k_ptr, v_ptr, grad_s_ptr,
    grad_q_ptr, grad_k_ptr, grad_v_ptr,  # contiguous; with SCRATCH only grad_q is written
    scratch_ptr,  # dL/dy * scale, contiguous, where tokens come in several blocks; or None
    q_time, q_batch, q_row, k_time, k_batch, k_row, v_time, v_batch, v_row,
    B, N, HEADS, scale, grad_row,
    STEPS: tl.constexpr, D: tl.constexpr, NEURON: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Grid as in the forward. Runs the neurons again, then back through time.

    One block of tokens: all gradients here. Several: k's and v's need the sum over all blocks, so dL/dy goes to memory
    and `attention_backward_keys` does the rest.
    """
    batch = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    first = tl.program_id(1) * ROWS
    channels = HEADS * D
    element: tl.constexpr = grad_q_ptr.dtype.element_ty
    hs = ()
    membrane = rest([ROWS, WIDTH], NEURON)
    for t in tl.static_range(STEPS):
        kv = _keys_values(
            k_ptr + tl.cast(k_time, tl.int64) * t + batch * k_batch + head * D, v_ptr + tl.cast(v_time, tl.int64) * t + batch * v_batch + head * D,
            k_row, v_row, N, D, ROWS, WIDTH,
        )  # fmt: skip
        q = _rows(q_ptr + tl.cast(q_time, tl.int64) * t + batch * q_batch + head * D, first, q_row, N, D, ROWS, WIDTH)
        h = charge(membrane, tl.dot(q.to(tl.float16), kv.to(tl.float16)) * scale, NEURON)
        hs = hs + (h,)
        membrane = reset(h, fires(h, NEURON), NEURON)
    grad_membrane = tl.zeros([ROWS, WIDTH], tl.float32)
    for t in tl.static_range(STEPS - 1, -1, -1):
        at = (t * B + batch) * N * channels + head * D
        grad_at = (t * B + batch) * N * grad_row + head * D
        grad_s = _rows(grad_s_ptr + at, first, channels, N, D, ROWS, WIDTH).to(tl.float32)
        grad_h = charge_gradient(hs[t], grad_s, grad_membrane, NEURON)
        grad_membrane = carried_gradient(grad_h, NEURON)
        grad_y = (input_gradient(grad_h, NEURON) * scale).to(element)
        k_at = k_ptr + tl.cast(k_time, tl.int64) * t + batch * k_batch + head * D
        v_at = v_ptr + tl.cast(v_time, tl.int64) * t + batch * v_batch + head * D
        kv = _keys_values(k_at, v_at, k_row, v_row, N, D, ROWS, WIDTH)
        grad_q = tl.dot(grad_y, tl.trans(kv).to(element), input_precision=PRECISION)
        _store_rows(grad_q_ptr + grad_at, grad_q, first, grad_row, N, D, ROWS, WIDTH)
        if scratch_ptr is None:
            q = _rows(q_ptr + tl.cast(q_time, tl.int64) * t + batch * q_batch + head * D, 0, q_row, N, D, ROWS, WIDTH).to(element)
            k = _rows(k_at, 0, k_row, N, D, ROWS, WIDTH).to(element)
            v = _rows(v_at, 0, v_row, N, D, ROWS, WIDTH).to(element)
            grad_kv = tl.dot(tl.trans(q), grad_y, input_precision=PRECISION).to(element)
            grad_k = tl.dot(v, tl.trans(grad_kv), input_precision=PRECISION)
            grad_v = tl.dot(k, grad_kv, input_precision=PRECISION)
            _store_rows(grad_k_ptr + grad_at, grad_k, 0, grad_row, N, D, ROWS, WIDTH)
            _store_rows(grad_v_ptr + grad_at, grad_v, 0, grad_row, N, D, ROWS, WIDTH)
        else:
            _store_rows(scratch_ptr + at, grad_y, first, channels, N, D, ROWS, WIDTH)


@triton.jit
def attention_backward_keys(
    q_ptr, k_ptr, v_ptr, scratch_ptr, grad_k_ptr, grad_v_ptr,
    q_time, q_batch, q_row, k_time, k_batch, k_row, v_time, v_batch, v_row,
    B, N, HEADS, grad_row,
    D: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """k's and v's gradients from dL/dy. Grid: (B * HEADS, STEPS)."""
    batch = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    t = tl.program_id(1).to(tl.int64)
    channels = HEADS * D
    element: tl.constexpr = grad_k_ptr.dtype.element_ty
    at = (t * B + batch) * N * channels + head * D
    grad_at = (t * B + batch) * N * grad_row + head * D
    q_at = q_ptr + tl.cast(q_time, tl.int64) * t + batch * q_batch + head * D
    k_at = k_ptr + tl.cast(k_time, tl.int64) * t + batch * k_batch + head * D
    v_at = v_ptr + tl.cast(v_time, tl.int64) * t + batch * v_batch + head * D
    total = tl.zeros([WIDTH, WIDTH], tl.float32)
    for first in range(0, N, ROWS):
        q = _rows(q_at, first, q_row, N, D, ROWS, WIDTH).to(element)
        grad_y = _rows(scratch_ptr + at, first, channels, N, D, ROWS, WIDTH)
        total = tl.dot(tl.trans(q), grad_y, total, input_precision=PRECISION)
    grad_kv = total.to(element)
    for first in range(0, N, ROWS):
        k = _rows(k_at, first, k_row, N, D, ROWS, WIDTH).to(element)
        v = _rows(v_at, first, v_row, N, D, ROWS, WIDTH).to(element)
        grad_k = tl.dot(v, tl.trans(grad_kv), input_precision=PRECISION)
        grad_v = tl.dot(k, grad_kv, input_precision=PRECISION)
        _store_rows(grad_k_ptr + grad_at, grad_k, first, grad_row, N, D, ROWS, WIDTH)
        _store_rows(grad_v_ptr + grad_at, grad_v, first, grad_row, N, D, ROWS, WIDTH)
