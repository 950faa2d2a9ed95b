"""Spikingformer (arXiv 2304.11954): a residual stream of currents; what meets a weight is a spike.

T: time steps, B: batch, C: channels, H, W: rows and columns. Inside, tensors are (T, B, C, H, W).
"""

import itertools
from typing import Any

from torch import Tensor, nn

from spikingformer.layers import ConvBN, ConvBNLIF, DropPath, attention_lif
from spikingformer.neurons import LIF, State

from .base import ModelConfig, SpikingTransformer, block_drop_path
from .registry import register_family


class Stem(nn.Module):
    """Five 3x3 convolutions, a neuron between each two: frames (t, B, in, H, W) to currents (T, B, C, h, w)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c, d = config, config.embed_dim
        widths = (c.in_chans, d // 8, d // 4, d // 2, d)
        self.stages = nn.ModuleList(
            ConvBNLIF(a, b, 3, pool=c.pool if i in c.pooled_stages else None, lif=c.lif())
            for i, (a, b) in enumerate(itertools.pairwise(widths))
        )
        self.last = ConvBN(d, d, 3)

    def forward(self, frames: Tensor, state: State | None = None, repeats: int = 1) -> Tensor:
        s = self.stages[0](frames, state, repeats)
        for stage in self.stages[1:]:
            s = stage(s, state)
        return self.last(s)


class Attention(nn.Module):
    """Spiking self-attention on currents x (T, B, C, H, W); returns currents."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c, d = config, config.embed_dim
        self.heads, self.scale, self.order = c.num_heads, c.attention_scale, c.attention_order
        self.lif = LIF(c.lif())
        self.q = ConvBNLIF(d, d, bias=c.qkv_bias, lif=c.lif())
        self.k = ConvBNLIF(d, d, bias=c.qkv_bias, lif=c.lif())
        self.v = ConvBNLIF(d, d, bias=c.qkv_bias, lif=c.lif())
        self.attn_lif = LIF(c.lif(v_threshold=0.5))
        self.proj = ConvBN(d, d, bias=True)

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        s = self.lif(x, state)
        q, k, v = (f(s, state) for f in (self.q, self.k, self.v))
        return self.proj(attention_lif(q, k, v, self.heads, self.scale, self.order, self.attn_lif, state))


class MLP(nn.Module):
    """Two products with neurons before each: currents to currents."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c, d = config, config.embed_dim
        hidden = int(d * c.mlp_ratio)
        self.lif = LIF(c.lif())
        self.fc1 = ConvBNLIF(d, hidden, bias=True, lif=c.lif())
        self.fc2 = ConvBN(hidden, d, bias=True)

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        return self.fc2(self.fc1(self.lif(x, state), state))


class Block(nn.Module):
    """x + attention(x), then x + MLP(x), on currents (T, B, C, H, W)."""

    def __init__(self, config: ModelConfig, drop_path: float):
        super().__init__()
        self.attn = Attention(config)
        self.mlp = MLP(config)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        x = x + self.drop_path(self.attn(x, state))
        return x + self.drop_path(self.mlp(x, state))


class Spikingformer(SpikingTransformer):
    """Spikingformer of any size; see `SpikingTransformer` for how it is called and `ModelConfig` for its numbers."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.stem = Stem(config)
        self.blocks = nn.ModuleList(Block(config, rate) for rate in block_drop_path(config))
        self._finish()

    def family(self) -> str:
        """Always "spikingformer"."""
        return "spikingformer"


_CIFAR: dict[str, Any] = {"img_size": (32, 32), "pooled_stages": (2, 3), "attention_order": "qk", "num_classes": 10}
_DVS: dict[str, Any] = {
    "img_size": (128, 128),
    "in_chans": 2,
    "attention_order": "qk",
    "num_classes": 10,
    "time_steps": 16,
}

SIZES: dict[str, dict[str, Any]] = {
    "4_256": {**_CIFAR, "embed_dim": 256, "depth": 4, "num_heads": 8},
    "2_384": {**_CIFAR, "embed_dim": 384, "depth": 2, "num_heads": 12},
    "4_384": {**_CIFAR, "embed_dim": 384, "depth": 4, "num_heads": 12},
    "8_384": {"embed_dim": 384, "depth": 8},
    "8_512": {"embed_dim": 512, "depth": 8},
    "8_768": {"embed_dim": 768, "depth": 8},
    "2_256": {**_DVS, "embed_dim": 256, "depth": 2, "num_heads": 16},
}

# tau by downsampling: only the event-camera models leave 2.0
TAU = {("2_256", "cml"): 1.75, ("2_256", "sps"): 1.5}

VARIANTS = {
    f"spikingformer{'_cml' if pool == 'cml' else ''}_{size}": ModelConfig(
        **{**row, "pool": pool, "tau": TAU.get((size, pool), 2.0)}
    )
    for pool in ("sps", "cml")
    for size, row in SIZES.items()
}

__all__ = ["MLP", "VARIANTS", "Attention", "Block", "Spikingformer", "Stem"]
default_cfgs = register_family(__name__, Spikingformer, VARIANTS)
