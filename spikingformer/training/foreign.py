"""Checkpoints from elsewhere (.pth, .pth.tar): tensors and plain values are read, nothing in them is run."""

import _codecs
import argparse
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

_scalar = np.float64(0).__reduce__()[0]  # numpy's own function, private and moved between versions
PLAIN: list[Any] = [  # what training scripts store beside weights: their arguments, an accuracy as a numpy scalar
    argparse.Namespace,
    _codecs.encode,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float32", "float64", "int32", "int64", "bool")),
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
]


def read_published(path: Path) -> Any:
    """What torch.load finds under weights_only=True, with PLAIN values beside it.

    Raises:
        ValueError: missing, damaged, or holding objects that would have to be executed (names them).
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals(PLAIN), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol: what can be read is read, the rest refused
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path}: refused: it contains more than weights{_unsafe(path)}; nothing was run") from None
    except (
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        AssertionError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a readable PyTorch checkpoint, perhaps truncated ({reason})") from None


def _unsafe(path: Path) -> str:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # the file is damaged or of an old form: the refusal stands without the names
        return ""
    return f" ({', '.join(sorted(names)[:5])})" if names else ""
