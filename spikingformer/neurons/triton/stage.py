"""The pointwise stage between two products on a GPU: BatchNorm, residual, pool, LIF over all time steps.

Tensors are (T, B, C, H, W), channels last in memory (T, B, H, W, C); other layouts are copied. Of a product only its
output y is kept for backward, with a mean and a reciprocal deviation per channel.
"""

import torch
import triton
from torch import Tensor

from spikingformer.native.inputs import channels_last, check_stage

from ..config import LIFConfig
from .launch import (
    NEURON_ARGUMENTS,
    NEURON_SCHEMA,
    OPTIONS,
    Tiles,
    check_float,
    empty_channels_last,
    neuron_arguments,
    on_device,
    time_stride,
)
from .neuron import compile_time_neuron
from .pool_kernels import fire_pool_forward, pool_fire_backward, pool_fire_forward
from .stage_kernels import normalisation_backward, stage_backward, stage_forward
from .statistics_kernels import channel_statistics, combine_statistics, combine_sums


@torch.library.custom_op(
    "spikingformer::triton_bn_statistics",
    mutates_args=("running_mean", "running_var"),
    schema="(Tensor y, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, float eps, int repeats) "
    "-> (Tensor, Tensor)",
)
def triton_bn_statistics(y, running_mean, running_var, momentum, eps, repeats):
    """(mean, reciprocal deviation) of each channel, float32."""
    y = channels_last(y)
    tiles = Tiles.of(y.numel() // y.shape[2], y.shape[2], 1, y.element_size())
    mean, rstd = y.new_empty(tiles.channels, dtype=torch.float32), y.new_empty(tiles.channels, dtype=torch.float32)
    partial = y.new_empty(tiles.chunks, 2, tiles.channels, dtype=torch.float32)
    with on_device(y):
        channel_statistics[tiles.chunk_grid](
            y, partial, tiles.rows, tiles.chunk, tiles.channels, tiles.block_rows, tiles.block_channels, 4,
            num_warps=tiles.warps, **OPTIONS,
        )  # fmt: skip
        combine_statistics[(triton.cdiv(tiles.channels, 16),)](
            partial, mean, rstd, running_mean, running_var,
            tiles.rows, tiles.chunk, tiles.chunks, repeats, momentum, eps,
            tiles.channels, 512, 16, num_warps=8, **OPTIONS,
        )  # fmt: skip
    return mean, rstd


@triton_bn_statistics.register_fake
def _(y, running_mean, running_var, momentum, eps, repeats):
    return y.new_empty(y.shape[2], dtype=torch.float32), y.new_empty(y.shape[2], dtype=torch.float32)


def _after_pool(y: Tensor, pool: str) -> tuple[int, int]:
    return tuple(y.shape[3:]) if pool == "none" else ((y.shape[3] + 1) // 2, (y.shape[4] + 1) // 2)


def _live_in_pool(steps: int) -> int:
    """More is in flight of a window's taps than of a site: smaller "cml" tiles were 10 to 18 % faster (H100, T = 4)."""
    return 2 * steps if steps <= 8 else steps


def _outputs(y: Tensor, residual: Tensor | None, want_current: bool, pool: str, repeats: int) -> tuple[Tensor, Tensor]:
    steps = y.shape[0] * repeats
    s = empty_channels_last(y, steps, _after_pool(y, pool), y.dtype)
    if not want_current:
        return s, y.new_empty(0)
    return s, empty_channels_last(y, steps, y.shape[3:], y.dtype if residual is None else residual.dtype)


@torch.library.custom_op(
    "spikingformer::triton_bn_pool_lif",
    mutates_args=(),
    schema="(Tensor y, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, Tensor? residual, Tensor? spike_residual, "
    f"Tensor? scale, bool batch_statistics, bool want_current, str pool, int repeats, {NEURON_SCHEMA}) "
    "-> (Tensor, Tensor)",
)
def triton_bn_pool_lif(
    y, mean, rstd, weight, bias, residual, spike_residual, scale, batch_statistics, want_current, pool, repeats, *neuron
):
    """(spikes, current or an empty tensor)."""
    constants = compile_time_neuron(LIFConfig(*neuron))
    y = channels_last(y)
    steps, (height, width) = y.shape[0] * repeats, y.shape[3:]
    s, current = _outputs(y, residual, want_current, pool, repeats)
    live = steps if pool == "none" else _live_in_pool(steps)
    tiles = Tiles.of(s[0].numel() // y.shape[2], y.shape[2], live, y.element_size())
    inputs = (y, mean, rstd, weight, bias)
    with on_device(y):
        if pool == "none":
            stage_forward[tiles.grid](
                *inputs, channels_last(residual), channels_last(spike_residual), scale,
                s, current if want_current else None, tiles.rows, time_stride(y), height * width,
                steps, tiles.channels, constants, tiles.block_rows, tiles.block_channels,
                num_warps=tiles.warps, **OPTIONS,
            )  # fmt: skip
        elif pool == "cml":
            pool_fire_forward[tiles.grid](
                *inputs, s, tiles.rows, time_stride(y),
                repeats > 1, steps, tiles.channels, height, width, constants, tiles.block_rows, tiles.block_channels,
                num_warps=tiles.warps, **OPTIONS,
            )  # fmt: skip
        else:
            fire_pool_forward[tiles.grid](
                *inputs, s, None, tiles.rows, time_stride(y),
                steps, tiles.channels, height, width, constants, tiles.block_rows, tiles.block_channels,
                num_warps=tiles.warps, **OPTIONS,
            )  # fmt: skip
    return s, current


@triton_bn_pool_lif.register_fake
def _(
    y, mean, rstd, weight, bias, residual, spike_residual, scale, batch_statistics, want_current, pool, repeats, *neuron
):
    return _outputs(y, residual, want_current, pool, repeats)


def _combine(partial: Tensor, tiles: Tiles) -> Tensor:
    sums = partial.new_empty(2, tiles.channels)
    combine_sums[(triton.cdiv(2 * tiles.channels, 16),)](
        partial, sums, partial.shape[0], tiles.channels, 128, 16, num_warps=4, **OPTIONS
    )
    return sums


def _backward_through_cml(y, affine, grad_s, batch_statistics, repeats, constants):
    height, width = y.shape[3:]
    steps, channels = y.shape[0] * repeats, y.shape[2]
    tiles = Tiles.of(grad_s[0].numel() // channels, channels, 2 * _live_in_pool(steps), y.element_size())
    gz = empty_channels_last(y, y.shape[0], grad_s.shape[3:], y.dtype)
    index = empty_channels_last(y, y.shape[0], grad_s.shape[3:], torch.uint8)
    partial = y.new_empty(tiles.chunks, 2, channels, dtype=torch.float32)
    pool_fire_backward[tiles.chunk_grid](
        y, *affine, grad_s, partial, gz, index, tiles.rows, tiles.chunk, time_stride(y),
        repeats > 1, steps, channels, height, width, constants, tiles.block_rows, tiles.block_channels,
        num_warps=tiles.warps, **OPTIONS,
    )  # fmt: skip
    sums = _combine(partial, tiles)
    return _normalisation_backward(y, affine, gz, index, None, sums if batch_statistics else None), sums


def _normalisation_backward(y, affine, gz, index, scale, sums):
    sites = y[0].numel() // y.shape[2]
    live = 1 if index is None else 8  # up to four windows a site are looked at
    tiles = Tiles.of(y.numel() // y.shape[2], y.shape[2], live, y.element_size())
    height, width = (1, 1) if index is None else y.shape[3:]  # compiled in: one kernel for all sizes without a pool
    grad_y = empty_channels_last(y, y.shape[0], y.shape[3:], y.dtype)
    normalisation_backward[tiles.grid](
        y, *affine, gz, index, scale, sums, grad_y, tiles.rows, 1.0 / tiles.rows, sites, sites // y.shape[1],
        tiles.channels, height, width, tiles.block_rows, tiles.block_channels,
        num_warps=tiles.warps, **OPTIONS,
    )  # fmt: skip
    return grad_y


def _backward_without_cml(
    y, affine, residual, scale, grad_s, grad_current, want_gz, batch_statistics, pool, repeats, constants
):
    """(grad_y, sums, gz or None). Two passes where the sums are part of grad_y, else one."""
    height, width = y.shape[3:]
    sites_of_sample = height * width
    steps, channels = y.shape[0] * repeats, y.shape[2]
    index = None
    if pool == "none":
        height, width = 1, 1  # compiled in: one kernel for all sizes
    else:
        index = empty_channels_last(y, steps, grad_s.shape[3:], torch.uint8)
        tiles = Tiles.of(grad_s[0].numel() // channels, channels, _live_in_pool(steps), y.element_size())
        fire_pool_forward[tiles.grid](
            y, *affine, None, index, tiles.rows, time_stride(y),
            steps, channels, height, width, constants, tiles.block_rows, tiles.block_channels,
            num_warps=tiles.warps, **OPTIONS,
        )  # fmt: skip
    # Registers: currents, h and gradients of all steps, a residual's too.
    live = 2 * steps if residual is None else 4 * steps
    tiles = Tiles.of(y[0].numel() // channels, channels, live, y.element_size())
    partial = y.new_empty(tiles.chunks, 2, channels, dtype=torch.float32)
    gz = empty_channels_last(y, steps, y.shape[3:], residual.dtype) if want_gz else None
    one_pass = not batch_statistics
    grad_y = empty_channels_last(y, y.shape[0], y.shape[3:], y.dtype)

    def run(sums, partial, gz, grad_y):
        stage_backward[tiles.chunk_grid](
            y, *affine, residual, scale, grad_s, index, grad_current, sums, partial, gz, grad_y,
            tiles.rows, tiles.chunk, time_stride(y), grad_s[0].numel(), sites_of_sample,
            1.0 / (y.numel() // channels), repeats > 1, steps, channels, height, width, constants,
            tiles.block_rows, tiles.block_channels,
            num_warps=tiles.warps, **OPTIONS,
        )  # fmt: skip

    run(None, partial, gz, grad_y if one_pass else None)
    sums = _combine(partial, tiles)
    if not one_pass:
        if gz is None:
            run(sums, None, None, grad_y)
        else:  # dL/dz is in memory for the residual's sake: no need to run the neurons again
            grad_y = _normalisation_backward(y, affine, gz, None, scale, sums)
    return grad_y, sums, gz


@torch.library.custom_op(
    "spikingformer::triton_bn_pool_lif_backward",
    mutates_args=(),
    schema="(Tensor grad_s, Tensor? grad_current, Tensor y, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, "
    "Tensor? residual, Tensor? scale, bool want_residual, bool batch_statistics, str pool, int repeats, "
    f"{NEURON_SCHEMA}) -> (Tensor, Tensor, Tensor)",
)
def triton_bn_pool_lif_backward(
    grad_s, grad_current, y, mean, rstd, weight, bias, residual, scale,
    want_residual, batch_statistics, pool, repeats, *neuron,
):  # fmt: skip
    """(grad of y, [2, C] grads of bias and weight, grad of the residual or an empty tensor)."""
    constants = compile_time_neuron(LIFConfig(*neuron))
    affine = (mean, rstd, weight, bias)
    y, residual, grad_s, grad_current = map(channels_last, (y, residual, grad_s, grad_current))
    gz = None
    with on_device(y):
        if pool == "cml":
            grad_y, sums = _backward_through_cml(y, affine, grad_s, batch_statistics, repeats, constants)
        else:
            grad_y, sums, gz = _backward_without_cml(
                y, affine, residual, scale, grad_s, grad_current, want_residual,
                batch_statistics, pool, repeats, constants,
            )  # fmt: skip
    return grad_y, sums, y.new_empty(0) if gz is None else gz


@triton_bn_pool_lif_backward.register_fake
def _(
    grad_s, grad_current, y, mean, rstd, weight, bias, residual, scale,
    want_residual, batch_statistics, pool, repeats, *neuron,
):  # fmt: skip
    grad_y = empty_channels_last(y, y.shape[0], y.shape[3:], y.dtype)
    sums = y.new_empty(2, y.shape[2], dtype=torch.float32)
    if not want_residual:
        return grad_y, sums, y.new_empty(0)
    return grad_y, sums, empty_channels_last(y, y.shape[0] * repeats, y.shape[3:], residual.dtype)


def _setup_context(ctx, inputs, output):
    y, mean, rstd, weight, bias, residual, _, scale, batch_statistics, _, pool, repeats, *neuron = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(y, mean, rstd, weight, bias, residual, scale)
    ctx.spikes_like = output[0].shape
    ctx.settings = (batch_statistics, pool, repeats, *neuron)


def _backward(ctx, grad_s, grad_current):
    y, mean, rstd, weight, bias, residual, scale = ctx.saved_tensors
    spike_residual_grad = grad_s
    if grad_s is None:
        grad_s = y.new_zeros(ctx.spikes_like)
    if grad_current is not None and grad_current.numel() == 0:
        grad_current = None
    want_residual = residual is not None and ctx.needs_input_grad[5]
    grad_y, sums, gz = triton_bn_pool_lif_backward(
        grad_s, grad_current, y, mean, rstd, weight, bias, residual, scale, want_residual, *ctx.settings
    )
    grad_bias, grad_weight = sums.unbind(0)
    return (
        grad_y,
        None,
        None,
        grad_weight.to(weight.dtype),
        grad_bias.to(bias.dtype),
        gz if want_residual else None,
        spike_residual_grad if ctx.needs_input_grad[6] else None,
        *[None] * (5 + NEURON_ARGUMENTS),
    )


triton_bn_pool_lif.register_autograd(_backward, setup_context=_setup_context)


def bn_statistics(
    y: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    repeats: int = 1,
) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(biased variance + eps) of each channel of y (T, B, C, H, W), float32.

    The running statistics, float32, move by `momentum` towards the batch's, the variance being unbiased over
    T * B * H * W * `repeats`: a repeated picture comes once. No gradient flows here; `bn_pool_lif` knows it.
    Raises ValueError where a channel has a single value, for which no variance exists.
    """
    check_float("y", y)
    if y.numel() // y.shape[2] * repeats == 1:
        raise ValueError(f"expected more than one value per channel in training, got y of shape {tuple(y.shape)}")
    return triton_bn_statistics(y.detach(), running_mean, running_var, momentum, eps, repeats)


def bn_pool_lif(
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    config: LIFConfig,
    *,
    pool: str | None = None,
    residual: Tensor | None = None,
    spike_residual: Tensor | None = None,
    scale: Tensor | None = None,
    batch_statistics: bool = False,
    want_current: bool = False,
    repeats: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """Spikes of LIF(pool(scale * ((y - mean) * rstd * weight + bias) + residual)) + spike_residual.

    y: (T, B, C, H, W), a product's output in float32, bfloat16 or float16.
    mean, rstd: (C,) float32, from `bn_statistics`, or running_mean and 1 / sqrt(running_var + eps).
    pool: None; "cml": MaxPool(3, 2, 1) of the current, then fire; "sps": fire, then pool the spikes.
    residual: like y; added to the current. spike_residual: like the spikes; added to them. Both without a pool only.
    scale: (B,) float32, for each sample, as of drop path; without a pool only. No gradient flows to it.
    batch_statistics: mean and rstd came from y itself, so that y's gradient runs through them too.
    want_current: give the current (before the neuron) as well; in the residual's dtype, or y's without one.
    repeats: a still picture's y comes with T = 1 and fires for T = `repeats` steps; without residuals or current.

    Returns (spikes (T, B, C, H', W') in y's dtype, current (T, B, C, H, W) or None). Gradients: y, weight, bias and
    both residuals. Raises ValueError for a dtype or combination that has no kernel.
    """
    check_float("y", y)
    check_stage(y, pool, repeats, residual, spike_residual, want_current or scale is not None)
    if scale is not None and (scale.shape != y.shape[1:2] or scale.dtype != torch.float32):
        raise ValueError(f"scale must be float32 of shape ({y.shape[1]},), got {scale.dtype} of {tuple(scale.shape)}")
    s, current = triton_bn_pool_lif(
        y, mean, rstd, weight, bias, residual, spike_residual, None if scale is None else scale.detach().contiguous(),
        batch_statistics, want_current, pool or "none", repeats, *neuron_arguments(config),
    )  # fmt: skip
    return s, current if want_current else None
