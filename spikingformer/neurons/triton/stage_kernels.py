# ruff: noqa: RUF005  (Triton joins tuples with + alone)
"""BatchNorm, residual and LIF over all time steps in one kernel per direction, and the pool that follows ("sps").

Axes: STEPS time steps, S sites (batch, row, column), C channels last. y, residual, currents and gradients are
[STEPS, S, C]; `*_stride` is the distance of two time steps, 0 where y stands for a repeated picture (REPEATED: then
its gradient is summed over time). z = (y - mean) * rstd * weight + bias, times the sample's scale where there is
one; `sites_of_sample` is rows * columns.
"""

import triton
import triton.language as tl

from .lif_kernels import load_steps
from .neuron import carried_gradient, charge, charge_gradient, charges, fires, input_gradient, reset, rest


@triton.jit
def load_affine(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, channels, real):
    """(mean, rstd, rstd * weight, bias) of a block of channels, [1, BLOCK_C] each."""
    mean = tl.load(mean_ptr + channels, mask=real, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + channels, mask=real, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + channels, mask=real, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channels, mask=real, other=0.0).to(tl.float32)
    return mean[None, :], rstd[None, :], (rstd * weight)[None, :], bias[None, :]


@triton.jit
def normalise(tiles, affine, STEPS: tl.constexpr):
    """z at every step of a tuple of tiles."""
    out = ()
    for t in tl.static_range(STEPS):
        out = out + ((tiles[t] - affine[0]) * affine[2] + affine[3],)
    return out


@triton.jit
def add_steps(a, b, STEPS: tl.constexpr):
    """Sum of two tuples of tiles, step by step."""
    out = ()
    for t in tl.static_range(STEPS):
        out = out + (a[t] + b[t],)
    return out


@triton.jit
def load_scale(scale_ptr, sites, S, sites_of_sample):
    """The samples' scales at sites [BLOCK_S], as [BLOCK_S, 1]."""
    return tl.load(scale_ptr + sites // sites_of_sample, mask=sites < S, other=0.0)[:, None]


@triton.jit
def scale_steps(a, scale, STEPS: tl.constexpr):
    """A tuple of tiles, each multiplied."""
    out = ()
    for t in tl.static_range(STEPS):
        out = out + (a[t] * scale,)
    return out


@triton.jit
def current_gradients(currents, grads, STEPS: tl.constexpr, NEURON: tl.constexpr):
    """dL/d current at every step, last step first, from the currents and dL/d spike."""
    hs = charges(rest(currents[0].shape, NEURON), currents, STEPS, NEURON)
    grad_v = tl.zeros(currents[0].shape, tl.float32)
    out = ()
    for t in tl.static_range(STEPS - 1, -1, -1):
        grad_h = charge_gradient(hs[t], grads[t], grad_v, NEURON)
        out = out + (input_gradient(grad_h, NEURON),)
        grad_v = carried_gradient(grad_h, NEURON)
    return out


@triton.jit
def gather_pool_gradients(
    grad_ptr, index_ptr, sites, channels, real, stride, step: tl.constexpr,
    S, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """dL/d input of MaxPool(3, 2, 1) at one step: what the up to four windows over each site send to it.

    grad, index: [step, batch * HO * WO, C]; index is the winning tap of the window, 3 * row + column.
    """
    HO: tl.constexpr = (H + 1) // 2
    WO: tl.constexpr = (W + 1) // 2
    row = (sites // W) % H
    column = sites % W
    picture = sites // (H * W)
    total = tl.zeros([sites.shape[0], channels.shape[0]], tl.float32)
    for i in tl.static_range(2):
        for j in tl.static_range(2):
            out_row = (row + i) // 2
            out_column = (column + j) // 2
            # An even row lies in one window only: the second one found is the same.
            own = (sites < S) & (out_row < HO) & (out_column < WO)
            if i == 1:
                own = own & (row % 2 == 1)
            if j == 1:
                own = own & (column % 2 == 1)
            tap = 3 * (row + 1 - 2 * out_row) + column + 1 - 2 * out_column
            window = (picture * HO + out_row) * WO + out_column
            at = tl.cast(stride, tl.int64) * step + window.to(tl.int64)[:, None] * C + channels[None, :]
            inside = own[:, None] & real[None, :]
            won = tl.load(index_ptr + at, mask=inside, other=255).to(tl.int32) == tap[:, None]
            # Not masked by `won`: neighbouring channels stay one wide load.
            grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
            total += tl.where(won, grad, 0.0)
    return total


@triton.jit
def stage_forward(
    y_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    residual_ptr,  # added before firing, or None
    spike_residual_ptr,  # added to the spikes, or None
    scale_ptr,  # [samples], or None
    s_ptr,
    current_ptr,  # z + residual, or None where it is not wanted
    S, y_stride, sites_of_sample,
    STEPS: tl.constexpr, C: tl.constexpr, NEURON: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    sites = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channels < C
    mask = (sites < S)[:, None] & real[None, :]
    offsets = sites.to(tl.int64)[:, None] * C + channels[None, :]
    stride = tl.cast(S, tl.int64) * C
    currents = load_steps(y_ptr, offsets, y_stride, mask, STEPS)
    affine = load_affine(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, channels, real)
    currents = normalise(currents, affine, STEPS)
    if scale_ptr is not None:
        currents = scale_steps(currents, load_scale(scale_ptr, sites, S, sites_of_sample), STEPS)
    if residual_ptr is not None:
        currents = add_steps(currents, load_steps(residual_ptr, offsets, stride, mask, STEPS), STEPS)
    v = rest([BLOCK_S, BLOCK_C], NEURON)
    for t in tl.static_range(STEPS):
        if current_ptr is not None:
            tl.store(current_ptr + stride * t + offsets, currents[t].to(current_ptr.dtype.element_ty), mask=mask)
        h = charge(v, currents[t], NEURON)
        fired = fires(h, NEURON)
        v = reset(h, fired, NEURON)
        s = fired.to(tl.float32)
        if spike_residual_ptr is not None:
            s += tl.load(spike_residual_ptr + stride * t + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(s_ptr + stride * t + offsets, s.to(s_ptr.dtype.element_ty), mask=mask)


@triton.jit
def stage_backward(
    y_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    residual_ptr,  # or None
    scale_ptr,  # [samples], or None
    grad_s_ptr,  # gradient of the spikes, or with INDEX of the pooled spikes
    index_ptr,  # winning taps of the pool after the spikes, or None: no pool
    grad_current_ptr,  # gradient of the current that was given out, or None
    sums_ptr,  # [2, C]: sums of gz and gz * xhat over all rows, read to write grad_y; None: not needed for it
    partial_ptr,  # [programs, 2, C]: this program's share of those sums, written; or None
    gz_ptr,  # dL/d current, written; or None
    grad_y_ptr,  # written; or None
    S, CHUNK, y_stride, pooled_stride, sites_of_sample,
    inverse_rows,  # 1 / (rows of y)
    REPEATED: tl.constexpr, STEPS: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    NEURON: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channels < C
    affine = load_affine(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, channels, real)
    stride = tl.cast(S, tl.int64) * C
    first = tl.program_id(0) * CHUNK
    sum_gz = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    sum_gz_xhat = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    mean_gz = tl.zeros([1, BLOCK_C], tl.float32)
    mean_gz_xhat = tl.zeros([1, BLOCK_C], tl.float32)
    if sums_ptr is not None:
        mean_gz = (tl.load(sums_ptr + channels, mask=real, other=0.0) * inverse_rows)[None, :]
        mean_gz_xhat = (tl.load(sums_ptr + C + channels, mask=real, other=0.0) * inverse_rows)[None, :]
    for start in range(first, tl.minimum(first + CHUNK, S), BLOCK_S):
        sites = start + tl.arange(0, BLOCK_S)
        mask = (sites < S)[:, None] & real[None, :]
        offsets = sites.to(tl.int64)[:, None] * C + channels[None, :]
        ys = load_steps(y_ptr, offsets, y_stride, mask, STEPS)
        if index_ptr is None:
            grads = load_steps(grad_s_ptr, offsets, stride, mask, STEPS)
        else:
            grads = ()
            for t in tl.static_range(STEPS):
                grads = grads + (
                    gather_pool_gradients(grad_s_ptr, index_ptr, sites, channels, real, pooled_stride, t, S, C, H, W),
                )
        currents = normalise(ys, affine, STEPS)
        if scale_ptr is not None:
            scale = load_scale(scale_ptr, sites, S, sites_of_sample)
            currents = scale_steps(currents, scale, STEPS)
        if residual_ptr is not None:
            currents = add_steps(currents, load_steps(residual_ptr, offsets, stride, mask, STEPS), STEPS)
        gzs = current_gradients(currents, grads, STEPS, NEURON)
        over_time = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
        for t in tl.static_range(STEPS):
            gz = gzs[STEPS - 1 - t]
            if grad_current_ptr is not None:
                gz += tl.load(grad_current_ptr + stride * t + offsets, mask=mask, other=0.0).to(tl.float32)
            gz = tl.where(mask, gz, 0.0)
            if gz_ptr is not None:
                tl.store(gz_ptr + stride * t + offsets, gz.to(gz_ptr.dtype.element_ty), mask=mask)
            if scale_ptr is not None:
                gz *= scale
            xhat = (ys[t] - affine[0]) * affine[1]
            if partial_ptr is not None:
                sum_gz += gz
                sum_gz_xhat += gz * xhat
            if grad_y_ptr is not None:
                if REPEATED:
                    over_time += gz
                else:
                    grad_y = (gz - mean_gz - xhat * mean_gz_xhat) * affine[2]
                    tl.store(grad_y_ptr + stride * t + offsets, grad_y.to(grad_y_ptr.dtype.element_ty), mask=mask)
        if REPEATED and grad_y_ptr is not None:
            xhat = (ys[0] - affine[0]) * affine[1]
            grad_y = (over_time - mean_gz - xhat * mean_gz_xhat) * affine[2]
            tl.store(grad_y_ptr + offsets, grad_y.to(grad_y_ptr.dtype.element_ty), mask=mask)
    if partial_ptr is not None:
        out = partial_ptr + tl.program_id(0) * 2 * C + channels
        tl.store(out, tl.sum(sum_gz, 0), mask=real)
        tl.store(out + C, tl.sum(sum_gz_xhat, 0), mask=real)


@triton.jit
def normalisation_backward(
    y_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    gz_ptr,  # [R, C], or with INDEX the gradient behind MaxPool(3, 2, 1) of z
    index_ptr,  # winning taps of that pool, or None
    scale_ptr,  # [samples], or None
    sums_ptr,  # [2, C], or None: running statistics were used
    grad_y_ptr,
    R, inverse_rows, S, sites_of_sample,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_y of every row from dL/dz, time and batch being one axis here."""
    rows = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channels < C
    mask = (rows < R)[:, None] & real[None, :]
    offsets = rows.to(tl.int64)[:, None] * C + channels[None, :]
    affine = load_affine(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, channels, real)
    if index_ptr is None:
        gz = tl.load(gz_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        gz = gather_pool_gradients(gz_ptr, index_ptr, rows, channels, real, 0, 0, R, C, H, W)
    if scale_ptr is not None:
        gz *= load_scale(scale_ptr, rows % S, S, sites_of_sample)
    if sums_ptr is not None:
        y = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        xhat = (y - affine[0]) * affine[1]
        gz -= (tl.load(sums_ptr + channels, mask=real, other=0.0) * inverse_rows)[None, :]
        gz -= xhat * (tl.load(sums_ptr + C + channels, mask=real, other=0.0) * inverse_rows)[None, :]
    tl.store(grad_y_ptr + offsets, (gz * affine[2]).to(grad_y_ptr.dtype.element_ty), mask=mask)
