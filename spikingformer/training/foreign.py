"""Checkpoints from elsewhere (.pth, .pth.tar): tensors and plain values are read, nothing in them is run."""

import argparse
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch


def read_published(path: Path) -> Any:
    """What torch.load finds under weights_only=True; argparse.Namespace (left behind by training scripts) is allowed.

    Raises:
        ValueError: missing, damaged, or holding objects that would have to be executed (names them).
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol: what can be read is read, the rest refused
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path}: refused, it holds more than weights{_unsafe(path)}; nothing was run") from None
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
