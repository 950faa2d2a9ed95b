"""Whether a model is still what it was at an earlier call: its modules, their settings, their weights."""

from itertools import chain
from operator import is_, itemgetter
from typing import Any

from torch import Tensor, float32, int64, nn

from spikingformer.layers.fused import is_unwatched
from spikingformer.native.library import current_isa
from spikingformer.native.product_op import Fingerprint, is_plain_layout
from spikingformer.neurons import LIFConfig

SETTINGS = frozenset((bool, int, float, str, tuple, LIFConfig))  # kinds of attributes that say how a module computes
_PLAIN_SOURCES = ("torch.nn.modules.", "spikingformer.")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Snapshot:
    """All that decides what a model in evaluation mode computes.

    `holds` is asked at every call, and a small model's call takes little longer: it walks nothing and looks only at
    what counts. It keeps no reference to the model itself, nor to attributes of its modules that are not settings.
    """

    def __init__(self, model: nn.Module, modules: list[nn.Module], tensors: list[Tensor]):
        self._isa = current_isa()
        self._kind = type(model)
        self._below = [m for m in modules if m is not model]
        self._kinds = [type(m) for m in self._below]
        own = [m.__dict__ for m in modules]
        self._own = [(d, len(d), *_settings(d)) for d in own]
        self._hooks = [d[name] for d in own for name in _HOOKS]
        self._parts = [d[name] for d in own for name in ("_parameters", "_buffers", "_modules") if d[name]]
        self._held = self._found_held()
        self._tensors = tensors
        self._layouts = self._found_layouts()
        self._versions = [t._version for t in tensors]
        self._fingerprint = Fingerprint(tensors)
        self._contents = self._fingerprint()

    def _found_held(self) -> list[object]:
        return list(chain.from_iterable(map(dict.values, self._parts)))

    def _found_layouts(self) -> list[Any]:
        return [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in self._tensors]

    def holds(self, model: nn.Module) -> bool:
        """Whether nothing has changed in `model`, the one that the snapshot was taken of."""
        held = self._found_held()
        try:
            same_settings = all(len(d) == n and get(d) == seen for d, n, get, seen in self._own)
        except KeyError:  # an attribute is gone
            return False
        return (
            same_settings
            and type(model) is self._kind
            and list(map(type, self._below)) == self._kinds
            and not any(self._hooks)
            and len(held) == len(self._held)
            and all(map(is_, held, self._held))
            and current_isa() == self._isa
            and self._found_layouts() == self._layouts
            and [t._version for t in self._tensors] == self._versions
            and self._fingerprint() == self._contents  # versions see every change but those through `.data`
        )


def _settings(own: dict[str, Any]) -> tuple[itemgetter, object]:
    """What finds a module's mode and settings among its attributes, and what it finds now."""
    get = itemgetter(*(name for name, value in own.items() if type(value) in SETTINGS))
    return get, get(own)


def take_snapshot(model: nn.Module) -> Snapshot | None:
    """`model` as it is, or None where its modules have to be called one by one.

    That is in training mode, where calls are looked at, with modules of other packages, and with weights that are not
    float32 in the CPU's memory.
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
            if not tensor.is_cpu or tensor.is_inference():
                return None
            if tensor.dtype is float32 and is_plain_layout(tensor):
                tensors.append(tensor)
            elif tensor.dtype is not int64:  # BatchNorm's count of batches
                return None
    return Snapshot(model, modules, tensors)
