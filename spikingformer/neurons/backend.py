"""The choice between the plain neuron and its fused forms.

"reference" is the definition, "native" the C++ form (CPU), "triton" the GPU form; "auto" takes the fastest that can
serve the tensor at hand. A backend asked for by name never falls back: it serves or raises.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from contextvars import ContextVar
from functools import lru_cache

import torch
from torch import Tensor

BACKENDS = ("auto", "reference", "native", "triton")
_log = logging.getLogger("spikingformer")


def _check(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: use one of {', '.join(BACKENDS)}")
    return name


_requested: ContextVar[str | None] = ContextVar("spikingformer_backend", default=None)


def requested_backend() -> str:
    """What was asked for: by `use_backend`, else by the variable SPIKINGFORMER_BACKEND, else "auto"."""
    return _requested.get() or _check(os.environ.get("SPIKINGFORMER_BACKEND", "auto"))


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the neurons and layers called inside with one backend: "auto", "reference", "native" or "triton"."""
    token = _requested.set(_check(name))
    try:
        yield
    finally:
        _requested.reset(token)


@lru_cache(maxsize=1)
def native_unavailable() -> str | None:
    """Why the C++ form cannot be used here, or None where it can."""
    try:
        from spikingformer.native import ops  # noqa: F401
        from spikingformer.native import status as native_status
    except ImportError as error:
        return str(error)
    status = native_status()
    return None if status.available else status.reason


@lru_cache(maxsize=1)
def triton_unavailable() -> str | None:
    """Why the Triton form cannot be used here, or None where it can."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "no CUDA device"
    return None


def _unfit(name: str, x: Tensor) -> str | None:
    """Why backend `name` cannot serve x, or None where it can."""
    if name == "native":
        if x.device.type != "cpu":
            return f"it runs on CPU tensors, got one on {x.device}"
        return native_unavailable()
    if name == "triton":
        if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"it runs on CUDA tensors, got one on {x.device}"
        if x.dtype == torch.float64:
            return "it keeps its state in float32, got float64"
        return triton_unavailable()
    return None


@lru_cache
def _say(name: str, device: str, dtype: torch.dtype) -> None:
    _log.info("backend auto: %s for %s tensors on %s", name, dtype, device)


def choose_backend(x: Tensor) -> str:
    """The backend that serves x: "reference", "native" or "triton".

    Raises ValueError where a backend was asked for by name and cannot serve x.
    """
    name = requested_backend()
    if name == "auto":
        name = next((n for n in ("triton", "native") if _unfit(n, x) is None), "reference")
        if not torch.compiler.is_compiling():
            _say(name, x.device.type, x.dtype)
        return name
    if (why := _unfit(name, x)) is not None:
        raise ValueError(f"backend {name!r} cannot be used: {why}; ask for 'auto' or 'reference'")
    return name
