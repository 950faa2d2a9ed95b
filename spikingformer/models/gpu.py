"""A model's features on the fused GPU kernels from end to end, where nobody looks at its modules.

Between two products there is one kernel: BatchNorm, residual, pool and the neuron over all time steps (drop path on
Spikformer's spikes is one more). q, k, v are one product and travel packed into attention. Products that look at one
token are matrix products over (T, B, H, W, C). Numbers and gradients are those of the modules called one by one.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikingformer.layers import ConvBN, ConvBNLIF, DropPath
from spikingformer.layers.fused import is_unwatched, watches_calls
from spikingformer.neurons import LIFConfig, choose_backend

from .recompute import Recomputable
from .whole import is_as_built


def features_on_gpu(model: Any, frames: Tensor, repeats: int) -> Tensor | None:
    """The last block's output (T, B, C, H, W) of frames (t, B, C, H, W), or None where modules are called one by one.

    Served: tensors that the Triton backend serves, with and without gradients, training and evaluation, autocast;
    no compilation or tracing, no hooks, the modules and settings that the model's configuration gives.
    """
    if (
        type(frames) is not Tensor
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.is_functorch_wrapped_tensor(frames)
        or watches_calls()
        or choose_backend(frames, model.config.surrogate) != "triton"
        or not frames.numel()
        or not _serves(model, frames)
    ):
        return None
    return _Walk(model).features(frames, repeats)


def _serves(model: Any, frames: Tensor) -> bool:
    from spikingformer.neurons.triton.attention import MOST_TOKENS  # importing it needs triton

    c = model.config
    tokens = frames.shape[-2] * frames.shape[-1] // c.patch_size**2
    if tokens > MOST_TOKENS:
        return False
    for module in model.modules():
        if not is_unwatched(module):
            return False
        if isinstance(module, nn.BatchNorm2d):
            if module.momentum is None or any(t is None for t in (module.running_mean, module.weight, module.bias)):
                return False
        elif type(module) is nn.Identity and module is not model.head:
            return False  # a folded BatchNorm
    if not is_as_built(model):
        return False
    for block in model.blocks:
        together = [part.bn for part in (block.attn.q, block.attn.k, block.attn.v)]
        if len({(bn.training, getattr(bn, "momentum", None)) for bn in together}) > 1:
            return False  # they run as one
    return True


def _product(weight: Tensor, bias: Tensor | None, s: Tensor) -> Tensor:
    """(T, B, in, H, W) to (T, B, out, H, W), channels last throughout."""
    if weight.shape[-1] == 1:
        return F.linear(s.permute(0, 1, 3, 4, 2), weight.flatten(1), bias).permute(0, 1, 4, 2, 3)
    y = F.conv2d(s.flatten(0, 1).contiguous(memory_format=torch.channels_last), weight, bias, padding=1)
    return y.unflatten(0, s.shape[:2])


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Walk:
    """One pass through `model`, which keeps the parameters."""

    def __init__(self, model: Any):
        from spikingformer.neurons.triton import ops  # importing it needs triton

        self.model, self.ops = model, ops
        self.recompute = model.grad_checkpointing and torch.is_grad_enabled()
        self._latest: Recomputable | None = None  # spikes that the next product or attention reads

    def features(self, frames: Tensor, repeats: int) -> Tensor:
        s = frames
        for stage in self.model.stem.stages:
            s, repeats = self._fire([stage], s, stage.lif.config, stage.pool, repeats)[0], 1
        return self._spikformer(s) if self.model.family() == "spikformer" else self._spikingformer(s)

    def _fire(
        self,
        layers: list[ConvBN | ConvBNLIF],
        s: Tensor,
        config: LIFConfig,
        pool: str | None = None,
        repeats: int = 1,
        residual: Tensor | None = None,
        spike_residual: Tensor | None = None,
        scale: Tensor | None = None,
        want_current: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(spikes, current if wanted) of a product and what follows it; several layers lie side by side in channels."""
        norms: list[Any] = [layer.bn for layer in layers]
        weight = _joined([layer.conv.weight for layer in layers])
        biases = [layer.conv.bias for layer in layers if layer.conv.bias is not None]
        bias = _joined(biases) if biases else None
        running = [_joined([getattr(bn, name) for bn in norms]) for name in ("running_mean", "running_var")]
        gain, offset = (_joined([getattr(bn, name) for bn in norms]) for name in ("weight", "bias"))
        training = norms[0].training
        with self._reading(s):
            # The batch's own mean takes a bias away again: its gradient is 0, and only running_mean sees it.
            y = _product(weight, None if training else bias, s)
        if training:
            mean, rstd = self.ops.bn_statistics(y, running[0], running[1], norms[0].momentum, norms[0].eps, repeats)
            if bias is not None:
                offset = offset + 0.0 * bias
            self._keep_statistics(norms, running, bias)
        else:
            mean, rstd = running[0].clone().float(), (running[1].float() + norms[0].eps).rsqrt()
        fused: Any = self.ops.bn_pool_lif
        spikes, current = fused(
            y, mean, rstd, gain, offset, config, pool=pool, residual=residual, spike_residual=spike_residual,
            scale=scale, batch_statistics=training, want_current=want_current, repeats=repeats,
        )  # fmt: skip
        if self.recompute and spike_residual is None:  # with it, the whole stream would be computed again
            y, mean, rstd, gain, offset = (x.detach() for x in (y, mean, rstd, gain, offset))
            kept = None if residual is None else residual.detach()
            again = partial(
                fused, y, mean, rstd, gain, offset, config, pool=pool, residual=kept, scale=scale, repeats=repeats
            )
            self._latest = Recomputable(spikes, lambda: again()[0])
        return spikes, current

    def _reading(self, s: Tensor) -> AbstractContextManager[object]:
        """Where spikes `s` are read: with `recompute`, autograd keeps how to compute them in their place."""
        latest = self._latest
        return nullcontext() if latest is None or latest.spikes is not s else latest.kept_as_recipe()

    @staticmethod
    @torch.no_grad()
    def _keep_statistics(norms: list[Any], running: list[Tensor], bias: Tensor | None) -> None:
        if bias is not None:
            running[0].add_(bias, alpha=norms[0].momentum)
        torch._foreach_add_([bn.num_batches_tracked for bn in norms], 1)
        if len(norms) > 1:
            buffers = [bn.running_mean for bn in norms] + [bn.running_var for bn in norms]
            torch._foreach_copy_(buffers, [c for r in running for c in r.chunk(len(norms))])

    def _attention(self, a: Any, s: Tensor) -> Tensor:
        qkv, _ = self._fire([a.q, a.k, a.v], s, a.q.lif.config)
        t, b, c, h, w = qkv.shape
        packed = qkv.permute(0, 1, 3, 4, 2).reshape(t, b, h * w, c)
        with self._reading(qkv):
            out: Tensor = self.ops.spike_attention_packed(packed, a.heads, a.scale, a.attn_lif.config)
        return out.unflatten(2, (h, w)).permute(0, 1, 4, 2, 3)

    def _spikformer(self, s: Tensor) -> Tensor:
        def add(layer: ConvBNLIF, s: Tensor, stream: Tensor, drop: DropPath | None = None) -> Tensor:
            factors = None if drop is None else drop.factors(s)
            if factors is None:
                return self._fire([layer], s, layer.lif.config, spike_residual=stream)[0]
            s = self._fire([layer], s, layer.lif.config)[0]
            return torch.addcmul(stream, s, factors.to(s.dtype).view(-1, 1, 1, 1))

        x = add(self.model.stem.rpe, s, s)
        for block in self.model.blocks:
            x = add(block.attn.proj, self._attention(block.attn, x), x, block.drop_path)
            x = add(block.mlp.fc2, self._fire([block.mlp.fc1], x, block.mlp.fc1.lif.config)[0], x, block.drop_path)
        return x

    def _spikingformer(self, s: Tensor) -> Tensor:
        def join(
            layer: ConvBN, s: Tensor, config: LIFConfig, stream: Tensor | None, scale: Tensor | None = None
        ) -> tuple[Tensor, Tensor | None]:
            """(spikes, current): a product joins the residual stream, which fires at once."""
            return self._fire([layer], s, config, residual=stream, want_current=True, scale=scale)

        blocks = list(self.model.blocks)
        s, x = join(self.model.stem.last, s, blocks[0].attn.lif.config, None)
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            s = self._attention(block.attn, s)
            s, x = join(block.attn.proj, s, block.mlp.lif.config, x, block.drop_path.factors(s))
            s = self._fire([block.mlp.fc1], s, block.mlp.fc1.lif.config)[0]
            if following is not None:
                s, x = join(block.mlp.fc2, s, following.attn.lif.config, x, block.drop_path.factors(s))
        last = blocks[-1].mlp.fc2  # nothing fires after it
        with self._reading(s):
            y = _product(last.conv.weight, last.conv.bias, s)
        assert x is not None
        return x + blocks[-1].drop_path(last.bn(y.flatten(0, 1)).unflatten(0, x.shape[:2]))
