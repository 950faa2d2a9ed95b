"""A number on its way from the device to the host."""

import torch
from torch import Tensor


class LateValue:
    """A scalar tensor's value as it was when this was made.

    On a GPU it is copied after the work queued so far, and reading it waits for that work alone. Work queued later
    keeps running, so a loop that reads last step's value never leaves the GPU idle.
    """

    def __init__(self, value: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._host = value
        if value.is_cuda:
            self._host = torch.empty((), dtype=value.dtype, pin_memory=True)
            self._host.copy_(value, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> float:
        """The value; waits until it has arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._host)
