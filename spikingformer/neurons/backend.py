"""The choice between the plain neuron and its fused forms.

"reference" is the definition, "native" the C++ form (CPU), "triton" the GPU form; "auto" takes the fastest that can
serve the tensor at hand. A backend asked for by name never falls back: it serves or raises.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from .surrogate import has_kernel

BACKENDS = ("auto", "reference", "native", "triton")
_log = logging.getLogger("spikingformer")


def _check(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: use one of {', '.join(BACKENDS)}")
    return name


_requested: ContextVar[str | None] = ContextVar("spikingformer_backend", default=None)
_requested_last: str | None = None  # by any thread: torch.compile of PyTorch 2.11 cannot read a ContextVar


def requested_backend() -> str:
    """What was asked for: by `use_backend`, else by the variable SPIKINGFORMER_BACKEND, else "auto"."""
    name = _requested_last if torch.compiler.is_compiling() else _requested.get()
    return name or _check(os.environ.get("SPIKINGFORMER_BACKEND", "auto"))


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the neurons and layers called inside with one backend: "auto", "reference", "native" or "triton".

    Per thread; models compiled by `torch.compile` follow the thread that asked last.
    """
    global _requested_last
    token, before = _requested.set(_check(name)), _requested_last
    _requested_last = name
    try:
        yield
    finally:
        _requested.reset(token)
        _requested_last = before


def _probe_native() -> str | None:
    try:
        from spikingformer.native import ops  # noqa: F401
        from spikingformer.native import status as native_status
    except ImportError as error:
        return str(error)
    status = native_status()
    return None if status.available else status.reason


def _probe_triton() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "no CUDA device"
    return None


_probed: dict[str, str | None] = {}


@torch.compiler.assume_constant_result
def unavailable(name: str) -> str | None:
    """Why the fused form `name` ("native", "triton") cannot be used on this machine, or None where it can."""
    if name not in _probed:
        _probed[name] = _probe_native() if name == "native" else _probe_triton()
    return _probed[name]


def _unfit(name: str, x: Tensor, surrogate: str | None) -> str | None:
    """Why backend `name` cannot serve x, or None where it can."""
    if name != "reference" and surrogate is not None and not has_kernel(surrogate):
        return f"its kernels have no form of the surrogate {surrogate!r}"
    if name != "reference" and not torch.compiler.is_compiling() and torch.jit.is_tracing():
        return "torch.jit.trace would record its results as constants (torch.export and torch.compile see through it)"
    if name == "native":
        if x.device.type != "cpu":
            return f"it runs on CPU tensors, got one on {x.device}"
        return unavailable(name)
    if name == "triton":
        if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"it runs on CUDA tensors, got one on {x.device}"
        if x.dtype == torch.float64:
            return "it keeps its state in float32, got float64"
        return unavailable(name)
    return None


_said: set[tuple[str, str, torch.dtype]] = set()


def choose_backend(x: Tensor, surrogate: str | None = None) -> str:
    """The backend that serves x, and neurons of a surrogate: "reference", "native" or "triton".

    Raises ValueError where a backend was asked for by name and cannot serve x.
    """
    name = requested_backend()
    if name == "auto":
        name = next((n for n in ("triton", "native") if _unfit(n, x, surrogate) is None), "reference")
        if not torch.compiler.is_compiling() and (what := (name, x.device.type, x.dtype)) not in _said:
            _said.add(what)
            _log.info("backend auto: %s for %s tensors of %s", name, what[1], what[2])
        return name
    if (why := _unfit(name, x, surrogate)) is not None:
        raise ValueError(f"backend {name!r} cannot be used: {why}; ask for 'auto' or 'reference'")
    return name
