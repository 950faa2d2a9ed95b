"""Loads the compiled kernels through ctypes and picks the instruction set.

torch is imported first on purpose: it brings its OpenMP runtime, and the kernels then share it (same soname) instead
of starting a second pool of threads that would compete for the same cores.
"""

import contextlib
import ctypes
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch

from .eager import is_in_memory

ISA_VARIABLE = "SPIKINGFORMER_NATIVE_ISA"
KEEP_VARIABLE = "SPIKINGFORMER_KEEP_MEMORY"  # "0": leave the C library's allocator as it is


@dataclass(frozen=True)
class Status:
    """Whether the compiled kernels serve here. `reason` says why not, or what was chosen."""

    available: bool
    reason: str
    isa: str | None = None  # the instruction set in use
    isas: tuple[str, ...] = ()  # all that this processor and this build offer, best first
    path: str | None = None
    compiler: str | None = None
    openmp: bool = False


def _build_module() -> Any:
    from . import build  # late, so that `python -m spikingformer.native.build` runs it only once

    return build


def _library_path() -> Any:
    return _build_module().PACKAGE_DIR / _build_module().LIBRARY_NAME


def _record() -> dict[str, Any]:
    path = _build_module().PACKAGE_DIR / _build_module().RECORD_NAME
    return json.loads(path.read_text()) if path.exists() else {}


@lru_cache(maxsize=1)
def _open() -> tuple[ctypes.CDLL | None, str]:
    path = _library_path()
    record = _record()
    if not path.exists():
        why = record.get("error", "it has not been built; run `python -m spikingformer.native.build`")
        return None, f"no compiled library: {why}"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"{path} cannot be loaded: {error}"
    if os.environ.get(KEEP_VARIABLE, "1") != "0":
        library.spk_keep_freed_memory()
    return library, ""


@lru_cache(maxsize=1)
def available_isas() -> tuple[str, ...]:
    """Instruction sets that both the build and this processor have, best first; empty without a library."""
    library, _ = _open()
    if library is None:
        return ()
    return tuple(
        isa
        for isa in _build_module().instruction_sets()
        if library.spk_cpu_supports(isa.encode()) and _has_symbol(library, f"spk_{isa}_lif_forward")
    )


def _has_symbol(library: ctypes.CDLL, name: str) -> bool:
    try:
        library[name]
    except AttributeError:
        return False
    return True


_forced: str | None = None


def current_isa() -> str:
    """The instruction set in use: the one of `use_isa`, else of SPIKINGFORMER_NATIVE_ISA, else the best.

    Raises ValueError where the one asked for is not available.
    """
    isas = available_isas()
    wanted = _forced or os.environ.get(ISA_VARIABLE)
    if not wanted:
        return isas[0]
    if wanted not in isas:
        raise ValueError(f"{ISA_VARIABLE}={wanted!r} is not available here: use one of {', '.join(isas)} or unset it")
    return wanted


@contextlib.contextmanager
def use_isa(isa: str) -> Iterator[None]:
    """Runs the kernels called inside with one instruction set (for tests and benchmarks; not per thread)."""
    global _forced
    before, _forced = _forced, isa
    try:
        current_isa()
        yield
    finally:
        _forced = before


def status() -> Status:
    """What `spikingformer doctor` prints about the compiled kernels."""
    library, why = _open()
    if library is None:
        return Status(False, why)
    record = _record()
    isas = available_isas()
    path = str(_library_path())
    details: dict[str, Any] = {
        "path": path,
        "compiler": record.get("compiler"),
        "openmp": bool(record.get("openmp")),
        "isas": isas,
    }
    if not isas:
        return Status(False, f"{path} has no instruction set that this processor supports", None, **details)
    try:
        isa = current_isa()
    except ValueError as error:
        return Status(False, str(error), None, **details)
    return Status(True, f"{isa} of {', '.join(isas)}", isa, **details)


_TYPES: dict[str, Any] = {
    "p": ctypes.c_void_p,
    "l": ctypes.c_long,
    "i": ctypes.c_int,
    "d": ctypes.c_double,
    "f": ctypes.c_float,
}


@cache
def _bind(isa: str, name: str, signature: str) -> Callable[..., None]:
    library, why = _open()
    if library is None:
        raise RuntimeError(why)
    function = library[f"spk_{isa}_{name}"]
    function.argtypes = [_TYPES[c] for c in signature]
    function.restype = None
    return function


def serves_float32(*tensors: torch.Tensor) -> bool:
    """Whether the kernels take these: ordinary float32 tensors on the CPU, not traced or transformed, no autocast."""
    return (
        not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and torch._C._functorch.peek_interpreter_stack() is None
        and all(is_in_memory(t) and t.dtype == torch.float32 for t in tensors)
        and bool(available_isas())
    )


def kernel(name: str, signature: str) -> Callable[..., None]:
    """The C function `name` for the instruction set in use.

    `signature` has one letter an argument: p pointer, l long, i int, d double, f float. Raises RuntimeError where the
    library is not available.
    """
    if not available_isas():
        raise RuntimeError(status().reason)
    return _bind(current_isa(), name, signature)


def threads() -> int:
    """Threads for one call: as many as torch uses."""
    return torch.get_num_threads()
