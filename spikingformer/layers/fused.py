"""The fused forms of the layers: spike products and the pointwise stage as one pass, where they can serve.

They compute what the plain composition of the layer's modules computes, so they step aside wherever someone looks at
those modules or has changed them.
"""

from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from spikingformer.native.eager import is_in_memory
from spikingformer.neurons import LIF, LIFConfig
from spikingformer.neurons.backend import choose_backend

_FEW_CHANNELS = 16  # below, a product has too few inputs for skipping silent ones to pay


def is_unwatched(module: nn.Module) -> bool:
    """Whether nobody watches the calls of `module` and its forward is its class's."""
    return "forward" not in module.__dict__ and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _is_plain(module: nn.Module, kind: type) -> bool:
    return type(module) is kind and is_unwatched(module)


def watches_calls() -> bool:
    """Whether every module call or every tensor operation is looked at (global hooks, counters)."""
    if torch.compiler.is_compiling():
        return False
    return hooks._has_any_global_hook() or torch._C._len_torch_dispatch_stack() > 0


def stage_ops(x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d, neuron: nn.Module | None = None) -> ModuleType | None:
    """The fused operations that serve this layer for input x, or None where its modules must be called one by one."""
    plain = _is_plain(conv, nn.Conv2d) and _is_plain(bn, nn.BatchNorm2d) and (neuron is None or _is_plain(neuron, LIF))
    if not plain or bn.momentum is None or watches_calls():
        return None
    if bn.running_mean is None or bn.weight is None or bn.bias is None:
        return None
    same_size = conv.kernel_size[0] // 2, conv.kernel_size[1] // 2
    settings = conv.padding_mode, conv.padding, conv.stride, conv.dilation, conv.groups
    if settings != ("zeros", same_size, (1, 1), (1, 1), 1):
        return None  # changed by hand
    backend = choose_backend(x, neuron.config.surrogate if isinstance(neuron, LIF) else None)
    if backend == "triton":
        from spikingformer.neurons.triton import ops as triton_ops

        return triton_ops
    if backend == "native" and _native_serves(x, conv.weight, bn.weight):
        from spikingformer.native import ops as native_ops

        return native_ops
    return None


def attention_ops(x: Tensor, neuron: nn.Module) -> ModuleType | None:
    """The fused attention that serves x, or None where the neuron must be called as a module."""
    if not isinstance(neuron, LIF) or not _is_plain(neuron, LIF) or watches_calls() or not _native_serves(x):
        return None
    if choose_backend(x, neuron.config.surrogate) != "native":
        return None
    from spikingformer.native import ops as native_ops

    return native_ops


def _native_serves(*tensors: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and tensors[0].dtype in (torch.float32, torch.float64)
        and all(map(is_in_memory, tensors))
        and len({t.dtype for t in tensors}) == 1
    )


def product(x: Tensor, conv: nn.Conv2d, ops: ModuleType) -> Tensor:
    """The convolution of spikes x (T, B, in, H, W), channels last in memory: (T, B, out, H, W)."""
    if conv.kernel_size[0] == 1 and x.is_cuda:  # tokens are rows already: a matrix product, no convolution
        y = F.linear(x.permute(0, 1, 3, 4, 2), conv.weight.flatten(1), conv.bias)
        return y.permute(0, 1, 4, 2, 3)
    images = x.flatten(0, 1)
    convolve: Callable[..., Tensor] | None = getattr(ops, "spike_conv", None)
    if convolve is not None and conv.in_channels >= _FEW_CHANNELS:
        return convolve(images, conv.weight, conv.bias).unflatten(0, x.shape[:2])
    few: Callable[..., Tensor] | None = getattr(ops, "stem_conv", None)
    if few is not None and conv.kernel_size == (3, 3):
        return few(images, conv.weight, conv.bias).unflatten(0, x.shape[:2])
    images = images.contiguous(memory_format=torch.channels_last)
    y = F.conv2d(images, conv.weight, conv.bias, padding=conv.padding)  # type: ignore[arg-type]
    return y.unflatten(0, x.shape[:2])


def _statistics(y: Tensor, bn: nn.BatchNorm2d, ops: ModuleType, repeats: int) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal deviation that normalise y (T, B, C, H, W); in training the running ones move."""
    assert bn.running_mean is not None
    assert bn.running_var is not None
    if not bn.training:
        return bn.running_mean.clone(), (bn.running_var + bn.eps).rsqrt()  # kept for the backward: training moves it
    mean, rstd = ops.bn_statistics(y, bn.running_mean, bn.running_var, bn.momentum, bn.eps, repeats)
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
    return mean, rstd


def normalise(y: Tensor, bn: nn.BatchNorm2d, ops: ModuleType, repeats: int = 1) -> Tensor | None:
    """BatchNorm of a product's output y (T, B, C, H, W), or None where `ops` has no form of its own for it."""
    batch_norm: Callable[..., Tensor] | None = getattr(ops, "batch_norm", None)
    if batch_norm is None or not y.numel():
        return None
    return batch_norm(y, *_statistics(y, bn, ops, repeats), bn.weight, bn.bias, bn.training)


def fire(
    y: Tensor, bn: nn.BatchNorm2d, config: LIFConfig, ops: ModuleType, pool: str | None = None, repeats: int = 1
) -> Tensor:
    """BatchNorm, pool and neuron over a product's output y (T, B, C, H, W) in one pass: spikes."""
    mean, rstd = _statistics(y, bn, ops, repeats)
    spikes: Tensor = ops.bn_pool_lif(
        y, mean, rstd, bn.weight, bn.bias, config, pool=pool, batch_statistics=bn.training, repeats=repeats
    )[0]
    return spikes
