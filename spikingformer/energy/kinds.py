"""What kind of values an operation's result holds, derived from its inputs.

The values of an all-zero tensor do not show its kind, so the kind follows from the producer: the result of a
convolution or BatchNorm is always analog, that of a comparison is binary. `None` stands for an unknown operation; then
the values decide.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .facts import Kind


@dataclass
class Origin:
    """Where a tensor came from."""

    kind: Kind | None = None  # the largest kind that its producer can give
    weight: bool = False  # a parameter or buffer, or made of these alone
    picture: bool = False  # the model's input, or a copy or view of it
    product: Any = None  # record of the product that made it, seen through views (and scaling, for activations)


UNKNOWN = Origin()

_COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not", "logical_xor",
                "heaviside", "isnan", "isinf", "bitwise_and", "bitwise_or", "bitwise_not"}  # fmt: skip
_COPIES = {"clone", "_to_copy", "contiguous", "copy", "repeat", "cat", "stack", "index_select", "index", "gather",
           "roll", "flip", "reshape", "_unsafe_view", "_reshape_copy", "constant_pad_nd", "upsample_nearest2d",
           "lift_fresh", "repeat_interleave", "tile", "alias_copy", "expand_copy", "slice_scatter",
           "select_scatter"}  # fmt: skip
_KEEP = {"max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool1d", "amax", "max", "amin", "min", "maximum",
         "minimum", "relu", "abs", "where", "masked_fill", "clamp", "clamp_min", "native_dropout",
         "adaptive_max_pool2d", "mul"}  # fmt: skip
_COUNTS = {"add", "sub", "rsub", "sum", "cumsum", "neg"}
_UNDECIDED = {"round", "floor", "ceil", "trunc", "sign", "argmax", "empty", "empty_like", "empty_strided", "full",
              "full_like", "arange", "bernoulli", "rand", "randn", "rand_like", "randn_like", "new_empty"}  # fmt: skip
_CONSTANTS = {"zeros": Kind.ZERO, "zeros_like": Kind.ZERO, "new_zeros": Kind.ZERO, "ones": Kind.BINARY,
              "ones_like": Kind.BINARY, "new_ones": Kind.BINARY, "zero": Kind.ZERO}  # fmt: skip


def is_view(func: Any) -> bool:
    """True for an operation whose result shares its input's memory."""
    returns = func._schema.returns
    return bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write


def tensors_in(args: Any) -> list[Tensor]:
    """The tensors among an operation's arguments, lists included."""
    found: list[Tensor] = []
    for a in args:
        if isinstance(a, Tensor):
            found.append(a)
        elif isinstance(a, (list, tuple)):
            found.extend(tensors_in(a))
    return found


def _scalar_kind(args: Any) -> Kind:
    kind = Kind.ZERO
    for a in args:
        if isinstance(a, bool) or a is None or isinstance(a, (str, torch.dtype, torch.device)):
            continue
        if isinstance(a, (int, float)):
            whole = float(a).is_integer() if a == a and abs(a) != float("inf") else False
            kind = max(kind, (Kind.BINARY if a in (0, 1) else Kind.INTEGER) if whole else Kind.ANALOG)
    return kind


def _join(kinds: list[Kind | None]) -> Kind | None:
    if Kind.ANALOG in kinds:
        return Kind.ANALOG
    known = [k for k in kinds if k is not None]
    return None if len(known) < len(kinds) or not known else max(known)


def infer(name: str, func: Any, args: Any, origins: list[Origin]) -> Origin:
    """The origin of the result of aten operation `name`; `origins` are those of `tensors_in(args)`."""
    moving = [o for o in origins if not o.weight]
    if origins and not moving:
        return Origin(weight=True)
    if is_view(func) and origins:
        return origins[0]
    if name in _CONSTANTS:
        return Origin(_CONSTANTS[name])
    if name in _COMPARISONS:
        return Origin(Kind.BINARY)
    if name in _UNDECIDED or not origins:
        return UNKNOWN
    if name in _COPIES:
        product = moving[0].product if len(moving) == 1 else None
        return Origin(_join([o.kind for o in moving]), False, all(o.picture for o in moving), product)
    if name in ("where", "masked_fill"):
        origins = origins[1:] if name == "where" else origins[:1]
    kinds = [Kind.ANALOG if o.weight else o.kind for o in origins]
    if name in ("mul", "div") and len(origins) == 1:
        scalar = _scalar_kind(args[1:2])
        kind = Kind.ANALOG if name == "div" else _join([*kinds, scalar])
        return replace(moving[0], kind=kind, picture=False)
    if name in _KEEP:
        return Origin(_join(kinds))
    if name in _COUNTS:
        joined = _join([*kinds, _scalar_kind(args[1:2])] if name in ("add", "sub", "rsub") else kinds)
        return Origin(None if joined is None else max(joined, Kind.INTEGER))
    if name.startswith(("mm", "bmm", "matmul")):
        joined = _join(kinds)
        return Origin(None if joined is None else max(joined, Kind.INTEGER))
    if func.namespace == "aten":
        return Origin(Kind.ANALOG)  # arithmetic on reals: BatchNorm, mean, sigmoid, ...
    return UNKNOWN
