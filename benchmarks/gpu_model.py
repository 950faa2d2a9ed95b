"""One of our models run on the fused GPU kernels from end to end, sharing its weights and buffers.

Between two products there is one kernel: BatchNorm, residual, pool and the neuron over all time steps. q, k, v are one
product and travel packed into attention. Products that look at one token are matrix products over (T, B, H, W, C).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikingformer.layers import ConvBN, ConvBNLIF
from spikingformer.models import Spikformer, SpikingTransformer
from spikingformer.neurons import LIFConfig
from spikingformer.neurons.triton.ops import bn_pool_lif, bn_statistics, spike_attention_packed


def _product(weight: Tensor, bias: Tensor | None, s: Tensor) -> Tensor:
    """(T, B, in, H, W) to (T, B, out, H, W), channels last throughout."""
    if weight.shape[-1] == 1:
        return F.linear(s.permute(0, 1, 3, 4, 2), weight.flatten(1), bias).permute(0, 1, 4, 2, 3)
    y = F.conv2d(s.flatten(0, 1).contiguous(memory_format=torch.channels_last), weight, bias, padding=1)
    return y.unflatten(0, s.shape[:2])


class FusedModel(nn.Module):
    """Same logits and gradients as `model`, which keeps the parameters; drop_path must be 0."""

    def __init__(self, model: SpikingTransformer):
        super().__init__()
        if model.config.drop_path_rate:
            raise ValueError(f"FusedModel runs without drop_path, got drop_path_rate={model.config.drop_path_rate}")
        self.m = model

    def _fire(
        self, norms: list[nn.BatchNorm2d], y: Tensor, config: LIFConfig, pool: str | None = None, repeats: int = 1,
        **extras: Tensor | bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """BatchNorm and what follows; several norms lie side by side in y's channels."""

        def together(name: str) -> Tensor:
            parts = [getattr(bn, name) for bn in norms]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        running = [together("running_mean"), together("running_var")]
        training = norms[0].training
        if training:
            mean, rstd = bn_statistics(y, *running, norms[0].momentum, norms[0].eps, repeats)
            with torch.no_grad():
                torch._foreach_add_([bn.num_batches_tracked for bn in norms], 1)
                if len(norms) > 1:
                    buffers = [bn.running_mean for bn in norms] + [bn.running_var for bn in norms]
                    torch._foreach_copy_(buffers, [c for r in running for c in r.chunk(len(norms))])
        else:
            mean, rstd = running[0], (running[1] + norms[0].eps).rsqrt()
        return bn_pool_lif(
            y, mean, rstd, together("weight"), together("bias"), config, pool,
            batch_statistics=training, repeats=repeats, **extras,
        )  # fmt: skip

    def _stage(self, stage: ConvBNLIF, s: Tensor, repeats: int = 1, **extras: Tensor) -> Tensor:
        y = _product(stage.conv.weight, stage.conv.bias, s)
        return self._fire([stage.bn], y, stage.lif.config, stage.pool, repeats, **extras)[0]

    def _into_stream(self, layer: ConvBN, s: Tensor, config: LIFConfig, residual: Tensor | None = None):
        """(spikes, current): a product joins the residual stream, which fires at once."""
        y = _product(layer.conv.weight, layer.conv.bias, s)
        return self._fire([layer.bn], y, config, residual=residual, want_current=True)

    def _attention(self, a: nn.Module, s: Tensor) -> Tensor:
        parts = (a.q, a.k, a.v)
        weight = torch.cat([p.conv.weight for p in parts])
        bias = None if a.q.conv.bias is None else torch.cat([p.conv.bias for p in parts])
        qkv, _ = self._fire([p.bn for p in parts], _product(weight, bias, s), a.q.lif.config)
        t, b, c, h, w = qkv.shape
        packed = qkv.permute(0, 1, 3, 4, 2).reshape(t, b, h * w, c)
        out = spike_attention_packed(packed, a.heads, a.scale, a.attn_lif.config)
        return out.unflatten(2, (h, w)).permute(0, 1, 4, 2, 3)

    def _spikformer(self, s: Tensor) -> Tensor:
        x = self._stage(self.m.stem.rpe, s, spike_residual=s)
        for block in self.m.blocks:
            x = self._stage(block.attn.proj, self._attention(block.attn, x), spike_residual=x)
            x = self._stage(block.mlp.fc2, self._stage(block.mlp.fc1, x), spike_residual=x)
        return x

    def _spikingformer(self, s: Tensor) -> Tensor:
        blocks = list(self.m.blocks)
        s, x = self._into_stream(self.m.stem.last, s, blocks[0].attn.lif.config)
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            s, x = self._into_stream(block.attn.proj, self._attention(block.attn, s), block.mlp.lif.config, x)
            s = self._stage(block.mlp.fc1, s)
            if following is not None:
                s, x = self._into_stream(block.mlp.fc2, s, following.attn.lif.config, x)
                continue
            last = block.mlp.fc2  # nothing fires after it
            y = _product(last.conv.weight, last.conv.bias, s).flatten(0, 1)
            x = x + last.bn(y).unflatten(0, x.shape[:2])
        return x

    def forward(self, x: Tensor) -> Tensor:
        """As the model: pictures (B, C, H, W) or event frames (B, T, C, H, W) to logits."""
        s, repeats = self.m.frames(x)
        for stage in self.m.stem.stages:
            s, repeats = self._stage(stage, s, repeats), 1
        x = self._spikformer(s) if isinstance(self.m, Spikformer) else self._spikingformer(s)
        return self.m.forward_head(x)
