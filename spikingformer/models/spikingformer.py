"""Spikingformer (arXiv 2304.11954): a residual stream of currents; what meets a weight is a spike.

T: time steps, B: batch, C: channels, H, W: rows and columns. Inside, tensors are (T, B, C, H, W).
"""

from dataclasses import replace

from torch import Tensor, nn

from spikingformer.layers import ConvBN, ConvBNLIF, DropPath, attention_lif
from spikingformer.neurons import LIF, State

from .base import ModelConfig, SpikingTransformer, block_drop_path, stem_stages
from .registry import published_variants, register_family


class Stem(nn.Module):
    """Five 3x3 convolutions, a neuron between each two: frames (t, B, in, H, W) to currents (T, B, C, h, w)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d = config.embed_dim
        self.stages = stem_stages(config)
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


_TAU = {"spikingformer_2_256": 1.5, "spikingformer_cml_2_256": 1.75}  # all others keep 2.0
VARIANTS = published_variants("spikingformer")
VARIANTS |= {name: replace(VARIANTS[name], tau=tau) for name, tau in _TAU.items()}

__all__ = ["MLP", "VARIANTS", "Attention", "Block", "Spikingformer", "Stem"]
default_cfgs = register_family(__name__, Spikingformer, VARIANTS)
