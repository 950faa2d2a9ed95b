"""Memory for the kernels' large results: blocks of one reserve, each at the lowest address where it fits.

A training step allocates and frees hundreds of large tensors, and small ones that outlive it (gradients, statistics)
come in between. In the C heap those pin the large holes, and the heap grows to twice what is alive. Here only large
results live, so the reserve grows about to what is alive at once. Like the heap, it keeps its pages for the next step.
"""

import bisect
import ctypes
import math
import mmap
import os
import sys
import threading
import weakref
from collections import deque
from functools import cache

import torch
from torch import Tensor

SMALLEST = 1 << 20  # bytes; anything smaller is left to torch
_PAGE = 4096
_MAP_NORESERVE = 0x4000  # Linux's; the mmap module names it from Python 3.13 on


class Reserve:
    """Address space of which blocks are handed out as tensors; a block comes back when its tensor's storage dies.

    size: bytes; pages take memory only once they are written to. Raises OSError where the system refuses.
    """

    def __init__(self, size: int):
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._free = [(0, size)]  # (start, bytes), by start, never adjoining
        self._returned: deque[tuple[int, int]] = deque()  # a finaliser may run anywhere, even inside `empty`
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """An uninitialised contiguous tensor, or None where no block is long enough."""
        size = math.prod(shape) * dtype.itemsize
        pages = (size + _PAGE - 1) // _PAGE * _PAGE
        with self._lock:
            while self._returned:
                self._take_back(*self._returned.popleft())
            start = self._take(pages)
        if start is None:
            return None
        block = (ctypes.c_char * size).from_address(self._base + start)
        weakref.finalize(block, self._returned.append, (start, pages)).atexit = False
        return torch.frombuffer(block, dtype=dtype).view(shape)

    def free_blocks(self) -> list[tuple[int, int]]:
        """(start, bytes) of every hole."""
        with self._lock:
            while self._returned:
                self._take_back(*self._returned.popleft())
            return list(self._free)

    def _take(self, size: int) -> int | None:
        for i, (start, length) in enumerate(self._free):
            if length >= size:
                self._free[i : i + 1] = [(start + size, length - size)] if length > size else []
                return start
        return None

    def _take_back(self, start: int, size: int) -> None:
        i = bisect.bisect(self._free, (start,))
        if i < len(self._free) and start + size == self._free[i][0]:
            size += self._free.pop(i)[1]
        if i and sum(self._free[i - 1]) == start:
            i -= 1
            before, length = self._free.pop(i)
            start, size = before, length + size
        self._free.insert(i, (start, size))


@cache
def process_reserve() -> Reserve | None:
    """The reserve of this process, as long as its physical memory; None where there can be none."""
    if sys.platform != "linux":
        return None
    try:
        return Reserve(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (OSError, ValueError):  # a limit on address space: torch's own memory will do
        return None


def empty(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """`torch.empty(shape, dtype=dtype)` on the CPU, from the process's reserve where it is large."""
    if math.prod(shape) * dtype.itemsize >= SMALLEST and (reserve := process_reserve()) is not None:
        tensor = reserve.empty(shape, dtype)
        if tensor is not None:
            return tensor
    return torch.empty(shape, dtype=dtype)
