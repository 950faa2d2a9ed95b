"""Fan-out of a convolution's inputs: how many products each input position takes part in.

A tap that falls on zero padding is no operation in hardware that acts on events, so "valid" leaves it out.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ConvGeometry:
    """The shape of one convolution over any number of spatial axes."""

    in_channels: int
    out_channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    in_size: tuple[int, ...]  # spatial size of the input
    out_size: tuple[int, ...]  # spatial size of the output
    transposed: bool = False

    @property
    def fan_out_channels(self) -> int:
        """Output channels that one input channel reaches."""
        return self.out_channels // self.groups

    def taps(self, axis: int) -> list[int]:
        """For each input position along an axis, the number of output positions that it reaches."""
        k, s, p, d = self.kernel[axis], self.stride[axis], self.padding[axis], self.dilation[axis]
        n_in, n_out = self.in_size[axis], self.out_size[axis]
        counts = [0] * n_in
        if self.transposed:
            for i in range(n_in):
                counts[i] = sum(0 <= i * s - p + j * d < n_out for j in range(k))
            return counts
        for o in range(n_out):
            for j in range(k):
                i = o * s - p + j * d
                if 0 <= i < n_in:
                    counts[i] += 1
        return counts

    def valid(self) -> int:
        """Products of one execution (one sample, one time step) that do not meet zero padding."""
        return self.in_channels * self.fan_out_channels * math.prod(sum(self.taps(a)) for a in range(len(self.kernel)))

    def dense(self) -> int:
        """Products of one execution as usually counted, padding included (FlopCounterMode / 2)."""
        positions = self.in_size if self.transposed else self.out_size
        return self.in_channels * self.fan_out_channels * math.prod(self.kernel) * math.prod(positions)

    def fan_out(self, device: torch.device) -> Tensor:
        """(*in_size) int64: products that one nonzero input at each position causes."""
        total = torch.full((), self.fan_out_channels, dtype=torch.int64, device=device)
        for axis in range(len(self.kernel)):
            taps = torch.tensor(self.taps(axis), dtype=torch.int64, device=device)
            total = total[..., None] * taps
        return total

    def fan_out_nonzero(self, weight: Tensor) -> Tensor:
        """(in_channels, *in_size) int64: as `fan_out`, but products with a weight of zero left out."""
        mask = (weight != 0).to(torch.float64)
        ones = torch.ones(1, self.out_channels, *self.out_size, dtype=torch.float64, device=weight.device)
        conv = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)
        back = (
            torch.nn.functional.conv_transpose1d,
            torch.nn.functional.conv_transpose2d,
            torch.nn.functional.conv_transpose3d,
        )
        axes = len(self.kernel)
        if self.transposed:
            y = conv[axes - 1](ones, mask, None, self.stride, self.padding, self.dilation, self.groups)
        else:
            extra = tuple(
                n - ((o - 1) * s - 2 * p + d * (k - 1) + 1)
                for n, o, s, p, d, k in zip(
                    self.in_size, self.out_size, self.stride, self.padding, self.dilation, self.kernel, strict=True
                )
            )
            y = back[axes - 1](ones, mask, None, self.stride, self.padding, extra, self.groups, self.dilation)
        return y[0].round().to(torch.int64)
