# ruff: noqa: RUF005  (Triton joins tuples with + alone)
"""Spike attention and the neuron behind it, one kernel per direction.

Per picture and head, at every time step: y = q (k^T v) * scale, then LIF over time. q, k, v are 0 or 1, so k^T v and
q (k^T v) are integers: at most 2048 tokens keep k^T v exact in float16, and float32 sums keep y exact.

q, k, v: [STEPS, B, N, HEADS * D] with any stride of time, batch and token, channels next to each other. Outputs and
gradients of outputs are contiguous. Padded to powers of two: ROWS (all tokens, or a block of them) and WIDTH (>= 16,
the smallest that the matrix units take). OPERAND: the type in which gradients enter the matrix units.
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
def attention_counts(
    k_ptr, v_ptr, kv_ptr, k_time, k_batch, k_row, v_time, v_batch, v_row, B, N, HEADS,
    D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """k^T v of every step, picture and head, for kernels whose programs hold a part of the tokens only.

    kv: [STEPS, B * HEADS, WIDTH, WIDTH] float16. Grid: (B * HEADS, STEPS).
    """
    batch = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    t = tl.program_id(1)
    k_at = _at_step(k_ptr, t, k_time, batch * k_batch + head * D)
    v_at = _at_step(v_ptr, t, v_time, batch * v_batch + head * D)
    kv = _keys_values(k_at, v_at, k_row, v_row, N, D, ROWS, WIDTH)
    tl.store(_counts_at(kv_ptr, t, B, HEADS, WIDTH), kv.to(tl.float16))


@triton.jit
def _counts_at(kv_ptr, t, B, HEADS, WIDTH: tl.constexpr):
    """Places of one step's k^T v in the memory of `attention_counts`."""
    place = tl.cast(t, tl.int64) * B * HEADS + tl.program_id(0)
    return kv_ptr + place * WIDTH * WIDTH + tl.arange(0, WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _counts(kv_ptr, k_at, v_at, k_row, v_row, t, B, N, HEADS, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """One step's k^T v, float16: from memory where it was written there, else from k and v."""
    if kv_ptr is None:
        return _keys_values(k_at, v_at, k_row, v_row, N, D, ROWS, WIDTH).to(tl.float16)
    else:
        return tl.load(_counts_at(kv_ptr, t, B, HEADS, WIDTH))


@triton.jit
def _at_step(ptr, t, time_stride, offset):
    return ptr + tl.cast(time_stride, tl.int64) * t + offset


@triton.jit
def attention_forward(
    q_ptr, k_ptr, v_ptr, s_ptr,
    kv_ptr,  # of `attention_counts`; or None: one block holds all tokens, and counts them itself
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
        k_at = _at_step(k_ptr, t, k_time, batch * k_batch + head * D)
        v_at = _at_step(v_ptr, t, v_time, batch * v_batch + head * D)
        q_at = _at_step(q_ptr, t, q_time, batch * q_batch + head * D)
        kv = _counts(kv_ptr, k_at, v_at, k_row, v_row, t, B, N, HEADS, D, ROWS, WIDTH)
        h = _membrane(membrane, q_at, kv, q_row, first, N, scale, D, NEURON, ROWS, WIDTH)
        fired = fires(h, NEURON)
        membrane = reset(h, fired, NEURON)
        _store_rows(s_ptr + (t * B + batch) * N * channels + head * D, fired.to(tl.float32), first, channels,
                    N, D, ROWS, WIDTH)  # fmt: skip


@triton.jit
def _membrane(
    membrane, q_at, kv, q_row, first, N, scale,
    D: tl.constexpr, NEURON: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """h of one step and block of tokens."""
    q = _rows(q_at, first, q_row, N, D, ROWS, WIDTH)
    return charge(membrane, tl.dot(q.to(tl.float16), kv) * scale, NEURON)


@triton.jit
def _step_back(
    h, grad_membrane, kv, q_at, k_at, v_at, grad_s_at, grad_q_at, grad_k_at, grad_v_at, grad_y_at,
    q_row, k_row, v_row, grad_row, channels, first, N, scale,
    ALONE: tl.constexpr, D: tl.constexpr, NEURON: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Writes one step's gradients and returns dL/dv_{t-1}."""
    grad_s = _rows(grad_s_at, first, channels, N, D, ROWS, WIDTH).to(tl.float32)
    grad_h = charge_gradient(h, grad_s, grad_membrane, NEURON)
    grad_y = (input_gradient(grad_h, NEURON) * scale).to(OPERAND)
    grad_q = tl.dot(grad_y, tl.trans(kv).to(OPERAND), input_precision=PRECISION)
    _store_rows(grad_q_at, grad_q, first, grad_row, N, D, ROWS, WIDTH)
    if ALONE:
        q = _rows(q_at, 0, q_row, N, D, ROWS, WIDTH).to(OPERAND)
        k = _rows(k_at, 0, k_row, N, D, ROWS, WIDTH).to(OPERAND)
        v = _rows(v_at, 0, v_row, N, D, ROWS, WIDTH).to(OPERAND)
        grad_kv = tl.dot(tl.trans(q), grad_y, input_precision=PRECISION).to(OPERAND)
        grad_k = tl.dot(v, tl.trans(grad_kv), input_precision=PRECISION)
        grad_v = tl.dot(k, grad_kv, input_precision=PRECISION)
        _store_rows(grad_k_at, grad_k, 0, grad_row, N, D, ROWS, WIDTH)
        _store_rows(grad_v_at, grad_v, 0, grad_row, N, D, ROWS, WIDTH)
    else:
        _store_rows(grad_y_at, grad_y, first, channels, N, D, ROWS, WIDTH)
    return carried_gradient(grad_h, NEURON)


@triton.jit
def attention_backward(
    q_ptr, k_ptr, v_ptr, grad_s_ptr,
    grad_q_ptr, grad_k_ptr, grad_v_ptr,  # token stride grad_row; unless ALONE, only grad_q is written
    grad_y_ptr,  # dL/dy * scale, contiguous, written unless ALONE
    kv_ptr,  # of `attention_counts`; or None where ALONE
    h_ptr,  # float32 room for h, contiguous, where its STEPS tiles do not fit the registers; or None
    q_time, q_batch, q_row, k_time, k_batch, k_row, v_time, v_batch, v_row,
    B, N, HEADS, scale, grad_row,
    ALONE: tl.constexpr,  # one block holds all tokens
    STEPS: tl.constexpr, D: tl.constexpr, NEURON: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
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
    q_from = batch * q_batch + head * D
    k_from = batch * k_batch + head * D
    v_from = batch * v_batch + head * D
    step = tl.cast(B, tl.int64) * N * channels
    from_ = batch * N * channels + head * D
    grad_step = tl.cast(B, tl.int64) * N * grad_row
    grad_from = batch * N * grad_row + head * D
    membrane = rest([ROWS, WIDTH], NEURON)
    grad_membrane = tl.zeros([ROWS, WIDTH], tl.float32)
    if h_ptr is None:
        hs = ()
        for t in tl.static_range(STEPS):
            kv = _counts(kv_ptr, _at_step(k_ptr, t, k_time, k_from), _at_step(v_ptr, t, v_time, v_from),
                         k_row, v_row, t, B, N, HEADS, D, ROWS, WIDTH)  # fmt: skip
            h = _membrane(
                membrane, _at_step(q_ptr, t, q_time, q_from), kv, q_row, first, N, scale, D, NEURON, ROWS, WIDTH
            )
            hs = hs + (h,)
            membrane = reset(h, fires(h, NEURON), NEURON)
        for t in tl.static_range(STEPS - 1, -1, -1):
            k_at, v_at = _at_step(k_ptr, t, k_time, k_from), _at_step(v_ptr, t, v_time, v_from)
            kv = _counts(kv_ptr, k_at, v_at, k_row, v_row, t, B, N, HEADS, D, ROWS, WIDTH)
            grad_membrane = _step_back(
                hs[t], grad_membrane, kv, _at_step(q_ptr, t, q_time, q_from), k_at, v_at,
                _at_step(grad_s_ptr, t, step, from_),
                _at_step(grad_q_ptr, t, grad_step, grad_from), _at_step(grad_k_ptr, t, grad_step, grad_from),
                _at_step(grad_v_ptr, t, grad_step, grad_from), _at_step(grad_y_ptr, t, step, from_),
                q_row, k_row, v_row, grad_row, channels, first, N, scale,
                ALONE, D, NEURON, PRECISION, OPERAND, ROWS, WIDTH,
            )  # fmt: skip
    else:
        for t in range(STEPS):
            kv = _counts(kv_ptr, _at_step(k_ptr, t, k_time, k_from), _at_step(v_ptr, t, v_time, v_from),
                         k_row, v_row, t, B, N, HEADS, D, ROWS, WIDTH)  # fmt: skip
            h = _membrane(
                membrane, _at_step(q_ptr, t, q_time, q_from), kv, q_row, first, N, scale, D, NEURON, ROWS, WIDTH
            )
            _store_rows(_at_step(h_ptr, t, step, from_), h, first, channels, N, D, ROWS, WIDTH)
            membrane = reset(h, fires(h, NEURON), NEURON)
        tl.debug_barrier()  # another thread may read what this one wrote
        for i in range(STEPS):
            t = STEPS - 1 - i
            k_at, v_at = _at_step(k_ptr, t, k_time, k_from), _at_step(v_ptr, t, v_time, v_from)
            kv = _counts(kv_ptr, k_at, v_at, k_row, v_row, t, B, N, HEADS, D, ROWS, WIDTH)
            grad_membrane = _step_back(
                _rows(_at_step(h_ptr, t, step, from_), first, channels, N, D, ROWS, WIDTH), grad_membrane, kv,
                _at_step(q_ptr, t, q_time, q_from), k_at, v_at, _at_step(grad_s_ptr, t, step, from_),
                _at_step(grad_q_ptr, t, grad_step, grad_from), _at_step(grad_k_ptr, t, grad_step, grad_from),
                _at_step(grad_v_ptr, t, grad_step, grad_from), _at_step(grad_y_ptr, t, step, from_),
                q_row, k_row, v_row, grad_row, channels, first, N, scale,
                ALONE, D, NEURON, PRECISION, OPERAND, ROWS, WIDTH,
            )  # fmt: skip


@triton.jit
def attention_backward_keys(
    q_ptr, k_ptr, v_ptr, grad_y_ptr, grad_k_ptr, grad_v_ptr,
    q_time, q_batch, q_row, k_time, k_batch, k_row, v_time, v_batch, v_row,
    B, N, HEADS, grad_row,
    D: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """k's and v's gradients from dL/dy. Grid: (B * HEADS, STEPS)."""
    batch = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    t = tl.program_id(1).to(tl.int64)
    channels = HEADS * D
    at = (t * B + batch) * N * channels + head * D
    grad_at = (t * B + batch) * N * grad_row + head * D
    q_at = _at_step(q_ptr, t, q_time, batch * q_batch + head * D)
    k_at = _at_step(k_ptr, t, k_time, batch * k_batch + head * D)
    v_at = _at_step(v_ptr, t, v_time, batch * v_batch + head * D)
    total = tl.zeros([WIDTH, WIDTH], tl.float32)
    for first in range(0, N, ROWS):
        q = _rows(q_at, first, q_row, N, D, ROWS, WIDTH).to(OPERAND)
        grad_y = _rows(grad_y_ptr + at, first, channels, N, D, ROWS, WIDTH).to(OPERAND)
        total = tl.dot(tl.trans(q), grad_y, total, input_precision=PRECISION)
    grad_kv = total.to(OPERAND)
    for first in range(0, N, ROWS):
        k = _rows(k_at, first, k_row, N, D, ROWS, WIDTH).to(OPERAND)
        v = _rows(v_at, first, v_row, N, D, ROWS, WIDTH).to(OPERAND)
        grad_k = tl.dot(v, tl.trans(grad_kv), input_precision=PRECISION)
        grad_v = tl.dot(k, grad_kv, input_precision=PRECISION)
        _store_rows(grad_k_ptr + grad_at, grad_k, first, grad_row, N, D, ROWS, WIDTH)
        _store_rows(grad_v_ptr + grad_at, grad_v, first, grad_row, N, D, ROWS, WIDTH)
