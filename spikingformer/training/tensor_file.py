"""Safetensors files with a checksum: named tensors and text, no code, damage detected."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from spikingformer.files import write_atomic

_CHECKSUM = "sha256"
DESCRIPTION_KEY = "spikingformer"  # of model files and run states; exported files have "spikingformer.*" instead


def digest(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 over names, types, shapes, values and metadata, in sorted order."""
    total = hashlib.sha256()
    for key in sorted(metadata):
        total.update(json.dumps([key, metadata[key]]).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return total.hexdigest()


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes atomically. Tensors may lie on any device."""
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    write_atomic(path, _in_fixed_order(save(plain, {**metadata, _CHECKSUM: digest(plain, metadata)})))


def _in_fixed_order(content: bytes) -> bytes:
    """A safetensors file with its text sorted by key: the library writes it in another order each time."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(content)[8 + length :]))


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata.

    Raises:
        ValueError: no such file, not safetensors, truncated, or damaged (checksum); names the file.
    """
    if path.is_dir():
        raise ValueError(f"{path}: a folder; give the file in it, such as {path / 'best.safetensors'}")
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path}: not a complete safetensors file ({error}); it may be truncated. Use another copy, or "
            "last.safetensors of the same run. `spikingformer convert` makes one of a published .pth."
        ) from None
    expected = metadata.pop(_CHECKSUM, None)
    ours = DESCRIPTION_KEY in metadata  # a file of ours has a checksum: without one, its name was damaged
    if (expected is not None or ours) and digest(tensors, metadata) != expected:
        raise ValueError(f"{path}: damaged, its checksum does not match. Use another copy of the file.")
    return tensors, metadata
