# ruff: noqa: RUF005  (Triton joins tuples with + alone)
"""Batch statistics and the sums of BatchNorm's backward, in two deterministic stages.

y is [R, C]: R rows (time, batch, height, width), C channels, channels last. Stage one: each program reduces one chunk
of rows. Stage two: one program a block of channels combines the chunks, always in the same order.
"""

import triton
import triton.language as tl


@triton.jit
def channel_statistics(
    y_ptr,
    partial_ptr,  # [chunks, 2, C] float32: mean of the chunk, sum of squared deviations from it
    ROWS,
    CHUNK,  # rows of a chunk
    C: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LOADS: tl.constexpr,  # tiles on their way at once
):
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channels < C
    first = tl.program_id(0) * CHUNK
    end = tl.minimum(first + CHUNK, ROWS)
    # Deviations from a typical value: their sums of squares do not cancel however far from 0 the values lie.
    pivot = tl.load(y_ptr + first.to(tl.int64) * C + channels, mask=real, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    for start in range(first, end, LOADS * BLOCK_ROWS):
        tiles = ()
        for i in tl.static_range(LOADS):
            rows = start + i * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
            inside = (rows < end)[:, None] & real[None, :]
            tile = tl.load(y_ptr + rows.to(tl.int64)[:, None] * C + channels[None, :], mask=inside, other=0.0)
            tiles = tiles + (tl.where(inside, tile.to(tl.float32) - pivot[None, :], 0.0),)
        for i in tl.static_range(LOADS):
            total += tiles[i]
            squares += tiles[i] * tiles[i]
    count = (end - first).to(tl.float32)
    shift = tl.sum(total, 0) / count
    mean = pivot + shift
    squares_about_mean = tl.maximum(tl.sum(squares, 0) - count * shift * shift, 0.0)
    out = partial_ptr + tl.program_id(0) * 2 * C + channels
    tl.store(out, mean, mask=real)
    tl.store(out + C, squares_about_mean, mask=real)


@triton.jit
def combine_statistics(
    partial_ptr,
    mean_ptr,
    rstd_ptr,
    running_mean_ptr,  # updated in place, or None
    running_var_ptr,
    ROWS,
    CHUNK,
    CHUNKS,
    REPEATS,  # each row stands for this many: running_var's unbiased factor is over all of them
    momentum,
    eps,
    C: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channels < C
    total = tl.cast(ROWS, tl.float32)
    shares = tl.zeros([BLOCK_CHUNKS, BLOCK_C], tl.float32)
    for start in range(0, CHUNKS, BLOCK_CHUNKS):
        chunks = start + tl.arange(0, BLOCK_CHUNKS)
        inside = (chunks < CHUNKS)[:, None] & real[None, :]
        count = tl.maximum(tl.minimum(ROWS - chunks * CHUNK, CHUNK), 0).to(tl.float32)
        means = tl.load(partial_ptr + chunks[:, None] * 2 * C + channels[None, :], mask=inside, other=0.0)
        shares += means * (count / total)[:, None]
    mean = tl.sum(shares, 0)
    deviations = tl.zeros([BLOCK_CHUNKS, BLOCK_C], tl.float32)
    for start in range(0, CHUNKS, BLOCK_CHUNKS):
        chunks = start + tl.arange(0, BLOCK_CHUNKS)
        inside = (chunks < CHUNKS)[:, None] & real[None, :]
        count = tl.maximum(tl.minimum(ROWS - chunks * CHUNK, CHUNK), 0).to(tl.float32)
        at = partial_ptr + chunks[:, None] * 2 * C + channels[None, :]
        delta = tl.load(at, mask=inside, other=0.0) - mean[None, :]
        within = tl.load(at + C, mask=inside, other=0.0)
        deviations += tl.where(inside, within + delta * delta * count[:, None], 0.0)
    squares = tl.sum(deviations, 0)
    variance = squares / total
    tl.store(mean_ptr + channels, mean, mask=real)
    tl.store(rstd_ptr + channels, tl.div_rn(tl.full([BLOCK_C], 1.0, tl.float32), tl.sqrt_rn(variance + eps)), mask=real)
    if running_mean_ptr is not None:
        everything = total * REPEATS
        unbiased = variance * (everything / (everything - 1))
        old_mean = tl.load(running_mean_ptr + channels, mask=real, other=0.0)
        old_var = tl.load(running_var_ptr + channels, mask=real, other=0.0)
        tl.store(running_mean_ptr + channels, old_mean + momentum * (mean - old_mean), mask=real)
        tl.store(running_var_ptr + channels, old_var + momentum * (unbiased - old_var), mask=real)


@triton.jit
def combine_sums(
    partial_ptr,  # [CHUNKS, 2, C] float32
    out_ptr,  # [2, C] float32
    CHUNKS,
    C: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = columns < 2 * C
    total = tl.zeros([BLOCK_CHUNKS, BLOCK_C], tl.float32)
    for start in range(0, CHUNKS, BLOCK_CHUNKS):
        chunks = start + tl.arange(0, BLOCK_CHUNKS)
        inside = (chunks < CHUNKS)[:, None] & real[None, :]
        total += tl.load(partial_ptr + chunks[:, None] * 2 * C + columns[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + columns, tl.sum(total, 0), mask=real)
