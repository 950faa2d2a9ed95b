"""Whether a model is still what it was at an earlier call: its modules, their settings, their weights."""

import weakref
from itertools import chain
from operator import itemgetter
from typing import Any

from torch import Tensor, float32, int64, nn

from spikingformer.layers.fused import is_unwatched
from spikingformer.native.library import current_isa
from spikingformer.native.product_op import Fingerprint, is_plain_layout
from spikingformer.neurons import LIFConfig

# Kinds of attributes that say how a module computes
SETTINGS = frozenset((bool, int, float, str, tuple, type(None), LIFConfig))
_PLAIN_SOURCES = ("torch.nn.modules.", "spikingformer.")
_hooks_of = itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Snapshot:
    """All that decides what a model in evaluation mode computes.

    `holds` is asked at every call, and a small model's call takes little longer: it walks nothing and looks only at
    what counts. Modules and tensors are referred to weakly: their attributes and hooks may refer back to the model,
    which would never be freed.
    """

    def __init__(self, modules: list[nn.Module], tensors: list[Tensor]):
        own = [m.__dict__ for m in modules]
        self._isa = current_isa()
        self._modules = [weakref.ref(m) for m in modules]
        self._kinds = [type(m) for m in modules]
        self._settings = [(tuple(d), *_settings(d)) for d in own]
        self._parts = [
            (i, part) for i, d in enumerate(own) for part in ("_parameters", "_buffers", "_modules") if d[part]
        ]
        self._held = self._found_held(own)
        self._tensors = [weakref.ref(t) for t in tensors]
        self._layouts = _layouts(tensors)
        self._versions = [t._version for t in tensors]
        self._fingerprint = Fingerprint(tensors)
        self._contents = self._fingerprint()

    def _found_held(self, own: list[dict[str, Any]]) -> list[int]:
        """Which parameters, buffers and modules the modules hold."""
        return list(map(id, chain.from_iterable(own[i][part].values() for i, part in self._parts)))

    def holds(self) -> bool:
        """Whether nothing has changed in the model that the snapshot was taken of, which is alive."""
        modules = [ref() for ref in self._modules]
        tensors = [t for ref in self._tensors if (t := ref()) is not None]
        if list(map(type, modules)) != self._kinds or len(tensors) < len(self._tensors):
            return False
        own = [m.__dict__ for m in modules]
        return (
            all(tuple(d) == names and get(d) == seen for d, (names, get, seen) in zip(own, self._settings, strict=True))
            and not any(chain.from_iterable(map(_hooks_of, own)))
            and self._found_held(own) == self._held
            and current_isa() == self._isa
            and _layouts(tensors) == self._layouts
            and [t._version for t in tensors] == self._versions
            and self._fingerprint() == self._contents  # versions see every change but those through `.data`
        )


def _layouts(tensors: list[Tensor]) -> list[tuple]:
    return [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors]


def _settings(own: dict[str, Any]) -> tuple[itemgetter, object]:
    """What finds a module's mode and settings among its attributes, and what it finds now."""
    get = itemgetter(*(name for name, value in own.items() if type(value) in SETTINGS))
    return get, get(own)


def take_snapshot(model: nn.Module) -> Snapshot | None:
    """`model` as it is, or None where its modules have to be called one by one.

    That is in training mode, where calls are looked at, with modules of other packages, and with weights that are not
    ordinary float32 tensors in the CPU's memory.
    """
    modules = list(model.modules())
    tensors: list[Tensor] = []
    for module in modules:
        own = module.__dict__
        if own["training"] or not is_unwatched(module) or None in own["_modules"].values():
            return None
        if not type(module).__module__.startswith(_PLAIN_SOURCES):
            return None
        for tensor in (*own["_parameters"].values(), *own["_buffers"].values()):
            if tensor is None:
                continue
            if type(tensor) not in (Tensor, nn.Parameter) or not tensor.is_cpu or tensor.is_inference():
                return None
            if tensor.dtype is float32 and is_plain_layout(tensor):
                tensors.append(tensor)
            elif tensor.dtype is not int64:  # BatchNorm's count of batches
                return None
    return Snapshot(modules, tensors)
