"""Inference of a whole model in one piece, where nobody looks at its modules and nothing was changed in them.

The piece itself stands above the models (`spikingformer.engine`) and is handed in by `provide`.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType, MethodType

import torch
from torch import Tensor, nn

from spikingformer.layers.fused import watches_calls
from spikingformer.neurons import choose_backend

from .snapshot import SETTINGS, Snapshot, take_snapshot

# Input to logits after each step (T, B, num_classes), or None for what it cannot serve now
Runner = Callable[[Tensor], Tensor | None]
_FUNCTIONS = frozenset((FunctionType, MethodType))  # an attribute of such a kind replaces a method


@dataclass
class _Ready:
    """One model's piece."""

    snapshot: Snapshot
    run: Runner | None  # None: the modules have to be called one by one


_make: Callable[[nn.Module], Runner] | None = None
_ready: weakref.WeakKeyDictionary[nn.Module, _Ready] = weakref.WeakKeyDictionary()


def provide(make: Callable[[nn.Module], Runner]) -> None:
    """Sets what makes a model's piece. It may raise ValueError for a model that it cannot serve."""
    global _make
    _make = make


def _settings(module: nn.Module) -> dict[str, object]:
    """Attributes that say how a module computes; the mode and BatchNorm's momentum are looked at elsewhere."""
    items = module.__dict__.items()
    apart = ("momentum", "training")
    return {k: v for k, v in items if type(v) in (_FUNCTIONS if k[0] == "_" or k in apart else SETTINGS | _FUNCTIONS)}


@lru_cache(maxsize=8)
def as_built(kind: Callable[[object], nn.Module], config: object) -> dict[str, tuple[type, dict[str, object]]]:
    """Kind and settings of every module but the head of a new model; "" is the model."""
    with torch.device("meta"):
        model = kind(config).eval()
    del model.head, model.num_classes
    return {name: (type(module), _settings(module)) for name, module in model.named_modules()}


def is_as_built(model: nn.Module) -> bool:
    """Whether modules and settings are those that the model's configuration gives; a BatchNorm may be folded away."""
    expected = as_built(type(model), model.config)  # type: ignore[arg-type]
    found = {name: module for name, module in model.named_modules() if name.partition(".")[0] != "head"}
    if found.keys() != expected.keys() or getattr(model.head, "bias", None) is None:
        return False
    for name, module in found.items():
        kind, settings = expected[name]
        own = _settings(module)
        if name == "":  # timm leaves settings of its own
            own = {k: v for k, v in own.items() if k in settings or type(v) in _FUNCTIONS}
        folded = type(module) is nn.Identity and kind is nn.BatchNorm2d
        if not folded and (type(module) is not kind or own != settings):
            return False
    return True


def run_whole(model: nn.Module, x: Tensor) -> Tensor | None:
    """Logits after each time step (T, B, num_classes), or None where the modules have to be called one by one.

    Served: evaluation without gradients, float32 on the CPU with the compiled kernels, no autocast, no compilation or
    tracing, no hooks, the modules and settings that the model's configuration gives, any linear head with a bias.
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
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.is_autocast_enabled("cpu")
        or watches_calls()
        or choose_backend(x) != "native"
    ):
        return None
    ready = _ready.get(model)
    if ready is None or not ready.snapshot.holds():
        if (snapshot := take_snapshot(model)) is None:
            return None
        ready = _ready[model] = _Ready(snapshot, _piece(model))
    model.frames(x)  # type: ignore[operator]  # raises what the model has to say about x
    return None if ready.run is None else ready.run(x)


def _piece(model: nn.Module) -> Runner | None:
    try:
        return _make(model) if _make and is_as_built(model) else None
    except ValueError:
        return None
