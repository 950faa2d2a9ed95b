# ruff: noqa: RUF005  (Triton joins tuples with + alone)
"""The stages that halve the picture: BatchNorm, MaxPool(3, stride 2, padding 1) and LIF in one kernel.

"cml" pools the currents, then fires; "sps" fires, then pools the spikes. Axes as in `stage_kernels`, with S sites of
H x W pictures before the pool and SO sites of HO x WO = ceil(H / 2) x ceil(W / 2) after it. Of equal maxima the first
in reading order wins, as in torch.
"""

import triton
import triton.language as tl

from .lif_kernels import load_steps
from .neuron import charge, fires, reset, rest
from .stage_kernels import current_gradients, load_affine

UNROLLED_STEPS = tl.constexpr(8)  # with more, nine unrolled taps a step take minutes to compile


@triton.jit
def _tap(sites, SO, tap, H: tl.constexpr, W: tl.constexpr):
    """(site before the pool, whether it lies in the picture) of one of the nine taps of each window."""
    HO: tl.constexpr = (H + 1) // 2
    WO: tl.constexpr = (W + 1) // 2
    row = 2 * ((sites // WO) % HO) - 1 + tap // 3
    column = 2 * (sites % WO) - 1 + tap % 3
    inside = (sites < SO) & (row >= 0) & (row < H) & (column >= 0) & (column < W)
    return ((sites // (HO * WO)) * H + row) * W + column, inside


@triton.jit
def _pool_tap(
    best, best_y, index, tap, y_ptr, y_stride, affine, sites, channels, real, SO,
    STEPS: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """`_pool_steps` after one more tap."""
    at, inside = _tap(sites, SO, tap, H, W)
    mask = inside[:, None] & real[None, :]
    ys = load_steps(y_ptr, at.to(tl.int64)[:, None] * C + channels[None, :], y_stride, mask, STEPS)
    new_best = ()
    new_best_y = ()
    new_index = ()
    for t in tl.static_range(STEPS):
        z = (ys[t] - affine[0]) * affine[2] + affine[3]
        better = mask & (z > best[t])
        new_best = new_best + (tl.where(better, z, best[t]),)
        new_best_y = new_best_y + (tl.where(better, ys[t], best_y[t]),)
        new_index = new_index + (tl.where(better, tap, index[t]),)
    return new_best, new_best_y, new_index


@triton.jit
def _pool_steps(
    y_ptr, y_stride, affine, sites, channels, real, SO,
    STEPS: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """(largest z of each window, y there, its tap), each a tuple over the time steps."""
    best = ()
    best_y = ()
    index = ()
    for _ in tl.static_range(STEPS):
        best = best + (tl.full([sites.shape[0], channels.shape[0]], float("-inf"), tl.float32),)
        best_y = best_y + (tl.zeros([sites.shape[0], channels.shape[0]], tl.float32),)
        index = index + (tl.zeros([sites.shape[0], channels.shape[0]], tl.int32),)
    if STEPS <= UNROLLED_STEPS:
        for tap in tl.static_range(9):
            best, best_y, index = _pool_tap(
                best, best_y, index, tap, y_ptr, y_stride, affine, sites, channels, real, SO, STEPS, C, H, W
            )
    else:
        for tap in range(9):
            best, best_y, index = _pool_tap(
                best, best_y, index, tap, y_ptr, y_stride, affine, sites, channels, real, SO, STEPS, C, H, W
            )
    currents = ()
    for t in tl.static_range(STEPS):
        currents = currents + (tl.where(best[t] == float("-inf"), 0.0, best[t]),)
    return currents, best_y, index


@triton.jit
def pool_fire_forward(
    y_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, s_ptr, SO, y_stride,
    REPEATED: tl.constexpr, STEPS: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    NEURON: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """cml."""
    sites = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channels < C
    affine = load_affine(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, channels, real)
    mask = (sites < SO)[:, None] & real[None, :]
    offsets = sites.to(tl.int64)[:, None] * C + channels[None, :]
    OWN_STEPS: tl.constexpr = 1 if REPEATED else STEPS
    currents, _, _ = _pool_steps(y_ptr, y_stride, affine, sites, channels, real, SO, OWN_STEPS, C, H, W)
    v = rest([BLOCK_S, BLOCK_C], NEURON)
    for t in tl.static_range(STEPS):
        h = charge(v, currents[t if OWN_STEPS > 1 else 0], NEURON)
        fired = fires(h, NEURON)
        v = reset(h, fired, NEURON)
        s = fired.to(tl.float32).to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + tl.cast(SO, tl.int64) * C * t + offsets, s, mask=mask)


@triton.jit
def pool_fire_backward(
    y_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, grad_s_ptr,
    partial_ptr,  # [programs, 2, C]: shares of the sums of gz and gz * xhat
    gz_ptr,  # dL/d pooled current, [STEPS or 1, SO, C]
    index_ptr,  # winning taps, same shape
    SO, CHUNK, y_stride,
    REPEATED: tl.constexpr, STEPS: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    NEURON: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """cml: back to the pooled currents; `normalisation_backward` takes it from there."""
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channels < C
    affine = load_affine(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, channels, real)
    stride = tl.cast(SO, tl.int64) * C
    first = tl.program_id(0) * CHUNK
    OWN_STEPS: tl.constexpr = 1 if REPEATED else STEPS
    sum_gz = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    sum_gz_xhat = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for start in range(first, tl.minimum(first + CHUNK, SO), BLOCK_S):
        sites = start + tl.arange(0, BLOCK_S)
        mask = (sites < SO)[:, None] & real[None, :]
        offsets = sites.to(tl.int64)[:, None] * C + channels[None, :]
        grads = load_steps(grad_s_ptr, offsets, stride, mask, STEPS)
        currents, best_ys, index = _pool_steps(y_ptr, y_stride, affine, sites, channels, real, SO, OWN_STEPS, C, H, W)
        for t in tl.static_range(OWN_STEPS):
            tl.store(index_ptr + stride * t + offsets, index[t].to(tl.uint8), mask=mask)
        for _ in tl.static_range(STEPS - OWN_STEPS):
            currents = currents + (currents[0],)
        gzs = current_gradients(currents, grads, STEPS, NEURON)
        over_time = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
        for t in tl.static_range(STEPS):
            gz = tl.where(mask, gzs[STEPS - 1 - t], 0.0)
            sum_gz += gz
            if REPEATED:
                over_time += gz
            else:
                sum_gz_xhat += gz * ((best_ys[t] - affine[0]) * affine[1])
                tl.store(gz_ptr + stride * t + offsets, gz.to(gz_ptr.dtype.element_ty), mask=mask)
        if REPEATED:
            sum_gz_xhat += over_time * ((best_ys[0] - affine[0]) * affine[1])
            tl.store(gz_ptr + offsets, over_time.to(gz_ptr.dtype.element_ty), mask=mask)
    out = partial_ptr + tl.program_id(0) * 2 * C + channels
    tl.store(out, tl.sum(sum_gz, 0), mask=real)
    tl.store(out + C, tl.sum(sum_gz_xhat, 0), mask=real)


@triton.jit
def _fire_tap(
    winners, tap, y_ptr, y_stride, affine, sites, channels, real, SO,
    STEPS: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, NEURON: tl.constexpr, NONE: tl.constexpr,
):  # fmt: skip
    """The first tap of each window that fires at each step, NONE so far or this one."""
    at, inside = _tap(sites, SO, tap, H, W)
    mask = inside[:, None] & real[None, :]
    ys = load_steps(y_ptr, at.to(tl.int64)[:, None] * C + channels[None, :], y_stride, mask, STEPS)
    v = rest([sites.shape[0], channels.shape[0]], NEURON)
    updated = ()
    for t in tl.static_range(STEPS):
        h = charge(v, (ys[t] - affine[0]) * affine[2] + affine[3], NEURON)
        fired = fires(h, NEURON)
        v = reset(h, fired, NEURON)
        updated = updated + (tl.where(fired & mask & (winners[t] == NONE), tap, winners[t]),)
    return updated


@triton.jit
def fire_pool_forward(
    y_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    s_ptr,  # pooled spikes, or None
    index_ptr,  # uint8 winning taps for the backward, or None
    SO, y_stride,
    STEPS: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    NEURON: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sps. Each window runs the neurons under it anew: no spike before the pool reaches memory."""
    sites = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channels < C
    affine = load_affine(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, channels, real)
    HO: tl.constexpr = (H + 1) // 2
    WO: tl.constexpr = (W + 1) // 2
    # Where nothing fires all are equal maxima: the first tap inside the picture wins.
    silent = tl.where((sites // WO) % HO == 0, 3, 0) + tl.where(sites % WO == 0, 1, 0)
    NONE: tl.constexpr = 9
    winners = ()
    for _ in tl.static_range(STEPS):
        winners = winners + (tl.full([BLOCK_S, BLOCK_C], NONE, tl.int32),)
    if STEPS <= UNROLLED_STEPS:
        for tap in tl.static_range(9):
            winners = _fire_tap(
                winners, tap, y_ptr, y_stride, affine, sites, channels, real, SO, STEPS, C, H, W, NEURON, NONE
            )
    else:
        for tap in range(9):
            winners = _fire_tap(
                winners, tap, y_ptr, y_stride, affine, sites, channels, real, SO, STEPS, C, H, W, NEURON, NONE
            )
    mask = (sites < SO)[:, None] & real[None, :]
    offsets = sites.to(tl.int64)[:, None] * C + channels[None, :]
    stride = tl.cast(SO, tl.int64) * C
    for t in tl.static_range(STEPS):
        if s_ptr is not None:
            s = (winners[t] < NONE).to(tl.float32)
            tl.store(s_ptr + stride * t + offsets, s.to(s_ptr.dtype.element_ty), mask=mask)
        if index_ptr is not None:
            winner = tl.where(winners[t] == NONE, silent[:, None], winners[t])
            tl.store(index_ptr + stride * t + offsets, winner.to(tl.uint8), mask=mask)
