"""From the host's memory to the device, without waiting for the work that is queued there."""

from functools import lru_cache

import numpy as np
import torch


def upload(values: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """`values` on `device`.

    A copy from ordinary memory to a GPU waits until everything queued there is done: it would leave the GPU without
    work until the next launch. From pinned memory it is queued like a kernel.
    """
    host = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if device.type == "cuda" and host.device.type == "cpu":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The numbers (n,) on `device`; for a GPU made once. Not to be changed in place."""
    return _kept(values, dtype, device) if device.type == "cuda" else torch.tensor(values, dtype=dtype, device=device)


@lru_cache(maxsize=64)
def _kept(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # later callers may need gradients, even if the first does not
        return torch.tensor(values, dtype=dtype, device=device)
