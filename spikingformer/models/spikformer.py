"""Spikformer (arXiv 2209.15425): a neuron after each BatchNorm; the residual stream adds spikes, so it holds integers.

T: time steps, B: batch, C: channels, H, W: rows and columns. Inside, tensors are (T, B, C, H, W).
"""

from torch import Tensor, nn

from spikingformer.layers import ConvBNLIF, DropPath, attention_lif
from spikingformer.neurons import LIF, State

from .base import ModelConfig, SpikingTransformer, block_drop_path, stem_stages
from .registry import published_variants, register_family


class Stem(nn.Module):
    """Four 3x3 stages and a relative position embedding s + rpe(s): frames (t, B, in, H, W) to (T, B, C, h, w)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d = config.embed_dim
        self.stages = stem_stages(config)
        self.rpe = ConvBNLIF(d, d, 3, lif=config.lif())

    def forward(self, frames: Tensor, state: State | None = None, repeats: int = 1) -> Tensor:
        s = self.stages[0](frames, state, repeats)
        for stage in self.stages[1:]:
            s = stage(s, state)
        return s + self.rpe(s, state)


class Attention(nn.Module):
    """Spiking self-attention on the integer stream x (T, B, C, H, W); returns spikes."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c, d = config, config.embed_dim
        self.heads, self.scale, self.order = c.num_heads, c.attention_scale, c.attention_order
        self.q = ConvBNLIF(d, d, bias=c.qkv_bias, lif=c.lif())
        self.k = ConvBNLIF(d, d, bias=c.qkv_bias, lif=c.lif())
        self.v = ConvBNLIF(d, d, bias=c.qkv_bias, lif=c.lif())
        self.attn_lif = LIF(c.lif(v_threshold=0.5))
        self.proj = ConvBNLIF(d, d, bias=True, lif=c.lif())

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        q, k, v = (f(x, state) for f in (self.q, self.k, self.v))
        return self.proj(attention_lif(q, k, v, self.heads, self.scale, self.order, self.attn_lif, state), state)


class MLP(nn.Module):
    """Two products with a neuron after each: the integer stream to spikes."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c, d = config, config.embed_dim
        hidden = int(d * c.mlp_ratio)
        self.fc1 = ConvBNLIF(d, hidden, bias=True, lif=c.lif())
        self.fc2 = ConvBNLIF(hidden, d, bias=True, lif=c.lif())

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        return self.fc2(self.fc1(x, state), state)


class Block(nn.Module):
    """x + attention(x), then x + MLP(x), on integers (T, B, C, H, W)."""

    def __init__(self, config: ModelConfig, drop_path: float):
        super().__init__()
        self.attn = Attention(config)
        self.mlp = MLP(config)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        x = x + self.drop_path(self.attn(x, state))
        return x + self.drop_path(self.mlp(x, state))


class Spikformer(SpikingTransformer):
    """Spikformer of any size; see `SpikingTransformer` for how it is called and `ModelConfig` for its numbers."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.stem = Stem(config)
        self.blocks = nn.ModuleList(Block(config, rate) for rate in block_drop_path(config))
        self._finish()

    def family(self) -> str:
        """Always "spikformer"."""
        return "spikformer"


VARIANTS = published_variants("spikformer", cifar={"qkv_bias": True}, events={"attention_scale": 0.25})

__all__ = ["MLP", "VARIANTS", "Attention", "Block", "Spikformer", "Stem"]
default_cfgs = register_family(__name__, Spikformer, VARIANTS)
