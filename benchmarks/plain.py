"""The competitor: the published composition in plain PyTorch, with the weights of one of our models.

As the published code runs it: a picture is repeated T times before the stem, tensors are contiguous (T, B, C, H, W),
BatchNorm is its own pass, q, k, v and proj are Conv1d, the neuron is a loop over time steps whose every step is kept
for backward (SpikingJelly's torch backend). Hard reset, detached; surrogate sigmoid(4).
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikingformer.layers import ConvBN, ConvBNLIF
from spikingformer.models import Spikformer, SpikingTransformer
from spikingformer.neurons import LIFConfig


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return (u >= 0).to(u)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        s = torch.sigmoid(4.0 * ctx.saved_tensors[0])
        return grad * 4.0 * s * (1.0 - s)


def plain_lif(x: Tensor, config: LIFConfig) -> Tensor:
    v = torch.zeros_like(x[0])
    spikes = []
    for t in range(x.shape[0]):
        v = v + (x[t] - v) / config.tau
        s = _Spike.apply(v - config.v_threshold)
        fired = s.detach()
        v = (1.0 - fired) * v + fired * 0.0
        spikes.append(s)
    return torch.stack(spikes)


class PlainModel(nn.Module):
    """Takes a deep copy of `model`'s weights; gives the same logits, loss and gradients."""

    def __init__(self, model: SpikingTransformer):
        super().__init__()
        self.m = copy.deepcopy(model)
        for p in self.m.parameters():  # the published layout
            p.data = p.data.contiguous()

    def _product(self, layer: ConvBN | ConvBNLIF, s: Tensor, conv1d: bool = False) -> Tensor:
        t, b, _, h, w = s.shape
        conv, bn = layer.conv, layer.bn
        if conv1d:
            y = F.conv1d(s.flatten(3).flatten(0, 1), conv.weight.flatten(2), conv.bias)
            y = y.unflatten(2, (h, w))
        else:
            y = F.conv2d(s.flatten(0, 1).contiguous(), conv.weight, conv.bias, padding=conv.padding)
        return bn(y).reshape(t, b, -1, h, w).contiguous()

    @staticmethod
    def _pool(x: Tensor) -> Tensor:
        return F.max_pool2d(x.flatten(0, 1), 3, 2, 1).unflatten(0, x.shape[:2])

    def _stage(self, stage: ConvBNLIF, s: Tensor, conv1d: bool = False) -> Tensor:
        y = self._product(stage, s, conv1d)
        if stage.pool == "cml":
            y = self._pool(y)
        s = plain_lif(y, stage.lif.config)
        return self._pool(s) if stage.pool == "sps" else s

    def _attention(self, a: nn.Module, s: Tensor) -> Tensor:
        t, b, c, h, w = s.shape
        q, k, v = (
            self._stage(f, s, conv1d=True).flatten(3).transpose(-1, -2).reshape(t, b, h * w, a.heads, c // a.heads)
            .permute(0, 1, 3, 2, 4).contiguous()
            for f in (a.q, a.k, a.v)
        )  # fmt: skip
        y = (q @ k.transpose(-2, -1)) @ v if a.order == "qk" else q @ (k.transpose(-2, -1) @ v)
        y = (y * a.scale).transpose(3, 4).reshape(t, b, c, h, w).contiguous()
        return plain_lif(y, a.attn_lif.config)

    def forward(self, x: Tensor) -> Tensor:
        m = self.m
        still = x.ndim == 4
        x = x.unsqueeze(0).repeat(m.time_steps, 1, 1, 1, 1) if still else x.transpose(0, 1).contiguous()
        for stage in m.stem.stages:
            x = self._stage(stage, x)
        if isinstance(m, Spikformer):
            x = x + self._stage(m.stem.rpe, x)
            for block in m.blocks:
                x = x + self._stage(block.attn.proj, self._attention(block.attn, x), conv1d=True)
                x = x + self._stage(block.mlp.fc2, self._stage(block.mlp.fc1, x))
        else:
            x = self._product(m.stem.last, x)
            for block in m.blocks:
                s = plain_lif(x, block.attn.lif.config)
                x = x + self._product(block.attn.proj, self._attention(block.attn, s), conv1d=True)
                s = plain_lif(x, block.mlp.lif.config)
                x = x + self._product(block.mlp.fc2, self._stage(block.mlp.fc1, s))
        return m.head(x.flatten(3).mean(3).mean(0))
