"""Products with their BatchNorm, over time and batch at once.

T: time steps, B: batch, C: channels, H, W: rows and columns. Tensors are (T, B, C, H, W), channels last in memory.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from spikingformer.native.inputs import POOLS
from spikingformer.neurons import LIF, LIFConfig, State

from .fused import fire, normalise, product, stage_ops
from .pool import max_pool
from .sync_batchnorm import CPUSyncBatchNorm


def batch_norm(bn: nn.BatchNorm2d | nn.SyncBatchNorm, y: Tensor, repeats: int) -> Tensor:
    """BatchNorm of y (N, C, H, W) that stands for `repeats` equal copies of itself.

    Copies change neither mean nor biased variance; only the unbiased factor n / (n - 1) of running_var sees them.
    """
    moves = isinstance(bn, nn.modules.batchnorm._BatchNorm) and bn.training  # not timm's FrozenBatchNorm2d
    if not moves or repeats == 1 or bn.running_var is None or bn.momentum is None:
        return bn(y)
    before = bn.running_var.clone()
    n: float | Tensor = y.numel() // y.shape[1]
    if isinstance(bn, nn.SyncBatchNorm | CPUSyncBatchNorm):
        out, after = bn(y), bn.running_var
        if dist.is_initialized():  # processes may have unequally many samples
            n = torch.tensor(float(n), dtype=torch.float64, device=y.device)
            dist.all_reduce(n, group=bn.process_group)
    else:
        after = before.clone()  # autograd keeps it: the buffer itself is written below
        out = F.batch_norm(y, bn.running_mean, after, bn.weight, bn.bias, True, bn.momentum, bn.eps)
        if bn.num_batches_tracked is not None:
            bn.num_batches_tracked.add_(1)
    kept = before * (1 - bn.momentum)
    unbiased = (n - 1) / n * (n * repeats) / (n * repeats - 1)
    with torch.no_grad():
        bn.running_var.copy_(kept + (after - kept) * unbiased)
    return out


def folded_convolution(conv: nn.Conv2d, bn: nn.BatchNorm2d | nn.SyncBatchNorm | nn.Identity) -> tuple[Tensor, Tensor]:
    """(weight, bias) in float64 of the one convolution that equals `conv` followed by `bn` in eval mode.

    conv(x) * g + (beta - mean * g), g = gamma / sqrt(var + eps). Zero padding adds nothing before the bias does, so
    this holds at the borders too. An Identity as `bn` leaves the convolution as it is.
    Raises ValueError for a BatchNorm without running statistics.
    """
    weight = conv.weight.detach().double()
    bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.detach().double()
    if isinstance(bn, nn.Identity):
        return weight, bias
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("this BatchNorm keeps no running statistics, so it cannot be folded")
    scale, shift = torch.ones_like(bias), torch.zeros_like(bias)
    if bn.weight is not None:
        scale, shift = bn.weight.detach().double(), bn.bias.detach().double()
    gain = scale / (bn.running_var.double() + bn.eps).sqrt()
    return weight * gain[:, None, None, None], (bias - bn.running_mean.double()) * gain + shift


def _same_size_conv(in_channels: int, out_channels: int, kernel_size: int, bias: bool) -> nn.Conv2d:
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, so that pictures keep their size, got {kernel_size}")
    return nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)


def _check_axes(x: Tensor) -> None:
    if x.ndim != 5:
        raise ValueError(
            f"expected spikes (T, B, C, H, W), got shape {tuple(x.shape)}: time comes first, T = 1 without it"
        )


class ConvBN(nn.Module):
    """Convolution (odd kernel, stride 1, same size) and BatchNorm: spikes (T, B, in, H, W) to currents.

    `repeats`: how many equal time steps a call with T = 1 stands for (a still picture's stem). Raises ValueError for an
    even kernel, and for x without its time axis.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, bias: bool = False):
        super().__init__()
        self.conv = _same_size_conv(in_channels, out_channels, kernel_size, bias)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor, repeats: int = 1) -> Tensor:
        _check_axes(x)
        if (ops := stage_ops(x, self.conv, self.bn)) is not None:
            y = product(x, self.conv, ops)
            if (out := normalise(y, self.bn, ops, repeats)) is not None:
                return out
            y = y.flatten(0, 1)
        else:
            y = self.conv(x.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        return batch_norm(self.bn, y, repeats).unflatten(0, x.shape[:2])


class ConvBNLIF(nn.Module):
    """Convolution, BatchNorm and neuron: spikes (T, B, in, H, W) to spikes, halved in size where there is a pool.

    `pool`: None; "cml": max-pool the currents, then fire (arXiv 2305.05954: the pool's gradient is exact);
    "sps": fire, then max-pool the spikes (Spikformer's own downsampling).
    A still picture comes with T = 1 and `repeats` = T: convolution, BatchNorm and CML's pool run once.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        bias: bool = False,
        pool: str | None = None,
        lif: LIFConfig = LIFConfig(),  # noqa: B008  (frozen)
    ):
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"pool must be one of {POOLS}, got {pool!r}")
        self.conv = _same_size_conv(in_channels, out_channels, kernel_size, bias)
        self.bn = nn.BatchNorm2d(out_channels)
        self.pool = pool
        self.lif = LIF(lif)

    def forward(self, x: Tensor, state: State | None = None, repeats: int = 1) -> Tensor:
        _check_axes(x)
        if state is None and (ops := stage_ops(x, self.conv, self.bn, self.lif)) is not None:
            return fire(product(x, self.conv, ops), self.bn, self.lif.config, ops, self.pool, repeats)
        y = self.conv(x.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        y = batch_norm(self.bn, y, repeats).unflatten(0, x.shape[:2])
        if self.pool == "cml":
            y = max_pool(y)
        if repeats > 1:
            y = y.expand(repeats, *y.shape[1:])
        s = self.lif(y, state)
        return max_pool(s) if self.pool == "sps" else s
