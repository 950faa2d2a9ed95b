"""Inference of a whole model in one piece, where nobody looks at its modules and nothing was changed in them.

The piece itself stands above the models (`spikingformer.engine`) and is handed in by `provide`.
"""

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spikingformer.layers.fused import is_unwatched, watches_calls
from spikingformer.native.library import current_isa
from spikingformer.native.product_op import fingerprint, is_dense
from spikingformer.neurons import choose_backend

Runner = Callable[[Tensor], Tensor]  # input to logits after each step, (T, B, num_classes)
_PLAIN_SOURCES = ("torch.nn.modules.", "spikingformer.")


@dataclass
class _Ready:
    """One model's piece. Its buffers serve one call at a time."""

    state: tuple
    run: Runner
    lock: threading.Lock = field(default_factory=threading.Lock)


_make: Callable[[nn.Module], Runner] | None = None
_ready: weakref.WeakKeyDictionary[nn.Module, _Ready] = weakref.WeakKeyDictionary()


def provide(make: Callable[[nn.Module], Runner]) -> None:
    """Sets what makes a model's piece. It may raise ValueError for a model that it cannot serve."""
    global _make
    _make = make


def _state(model: nn.Module) -> tuple | None:
    """What must not change for a piece to stay right, or None where the modules have to be called one by one."""
    tensors: list[Tensor] = []
    kinds: list[object] = []
    for module in model.modules():
        kind = type(module)
        if module.training or not kind.__module__.startswith(_PLAIN_SOURCES) or not is_unwatched(module):
            return None
        kinds.append(kind)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None:
                continue
            if tensor.is_inference() or tensor.device.type != "cpu":
                return None
            if tensor.dtype == torch.float32 and is_dense(tensor):
                tensors.append(tensor)
            elif tensor.dtype != torch.int64:  # BatchNorm's count of batches
                return None
    # Versions see every change but those through `.data`: the fingerprint sees most of them.
    versions = tuple((id(t), t._version) for t in tensors)
    return current_isa(), tuple(kinds), versions, fingerprint(tensors)


def run_whole(model: nn.Module, x: Tensor) -> Tensor | None:
    """Logits after each time step (T, B, num_classes), or None where the modules have to be called one by one.

    Served: evaluation without gradients, float32 on the CPU with the compiled kernels, no autocast, no compilation or
    tracing, no hooks, modules of this package and of torch.nn only.
    """
    if (
        _make is None
        or model.training
        or torch.is_grad_enabled()
        or type(x) is not Tensor
        or x.device.type != "cpu"
        or x.dtype != torch.float32
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.is_functorch_wrapped_tensor(x)
        or torch.is_autocast_enabled("cpu")
        or watches_calls()
        or choose_backend(x) != "native"
        or (state := _state(model)) is None
    ):
        return None
    ready = _ready.get(model)
    if ready is None or ready.state != state:
        try:
            ready = _ready[model] = _Ready(state, _make(model))
        except ValueError:
            return None
    if not ready.lock.acquire(blocking=False):
        return None  # another thread is in it
    try:
        return ready.run(x)
    finally:
        ready.lock.release()
