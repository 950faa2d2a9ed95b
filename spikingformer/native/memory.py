"""Memory for the kernels' large results: blocks of one reserve, each at the lowest address where it fits.

A training step allocates and frees hundreds of large tensors, and small ones that outlive it (gradients, statistics)
come in between. In the C heap those pin the large holes, and the heap grows to twice what is alive. Here only large
results live, so the reserve grows about to what is alive at once. Like the heap, it keeps its pages for the next step.
A tensor of the reserve cannot be resized (`resize_`); everything else is as with torch's own.
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
from pathlib import Path

import torch
from torch import Tensor

SMALLEST = 1 << 20  # bytes; anything smaller is left to torch
_PAGE = 4096
_MAP_NORESERVE = 0x4000  # Linux's; the mmap module names it from Python 3.13 on


class Reserve:
    """Address space of which blocks are handed out as storage; a block comes back when its storage dies.

    size: bytes; pages take memory only once they are written to. Raises OSError where the system refuses.
    """

    def __init__(self, size: int):
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        self._free = [(0, size)]  # (start, bytes), by start, never adjoining
        self._returned: deque[tuple[int, int]] = deque()  # a finaliser may run anywhere, even inside `storage`
        self._lock = threading.Lock()

    def storage(self, size: int) -> torch.UntypedStorage | None:
        """Uninitialised storage of `size` bytes, more than none; None where no block is long enough."""
        pages = (size + _PAGE - 1) // _PAGE * _PAGE
        with self._lock:
            self._take_back_returned()
            start = self._take(pages)
        if start is None:
            return None
        block = (ctypes.c_char * size).from_buffer(self._map, start)  # keeps the map alive
        weakref.finalize(block, self._returned.append, (start, pages)).atexit = False
        return torch.frombuffer(block, dtype=torch.uint8).untyped_storage()

    def _take(self, size: int) -> int | None:
        for i, (start, length) in enumerate(self._free):
            if length >= size:
                self._free[i : i + 1] = [(start + size, length - size)] if length > size else []
                return start
        return None

    def _take_back_returned(self) -> None:
        while self._returned:
            self._take_back(*self._returned.popleft())

    def _take_back(self, start: int, size: int) -> None:
        i = bisect.bisect(self._free, (start,))
        if i < len(self._free) and start + size == self._free[i][0]:
            size += self._free.pop(i)[1]
        if i and sum(self._free[i - 1]) == start:
            i -= 1
            before, length = self._free.pop(i)
            start, size = before, length + size
        self._free.insert(i, (start, size))


def _make_reserve() -> Reserve | None:
    """As long as the physical memory; None where so much address space is not to be had for nothing."""
    if sys.platform != "linux":
        return None
    import resource

    try:
        strict = Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2"
        if strict or resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
            return None
        return Reserve(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (OSError, ValueError):
        return None


process_reserve = _make_reserve()


def _start_again() -> None:
    """In a forked child: the parent's lock and list may have been in use; its tensors keep their map."""
    global process_reserve
    process_reserve = _make_reserve()


if process_reserve is not None:  # elsewhere there may be no fork to register for
    os.register_at_fork(after_in_child=_start_again)


def empty(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    """An uninitialised tensor on the CPU, from the process's reserve where it is large.

    channels_last: shape (..., C, H, W) lies in memory as (..., H, W, C). It is no view of another tensor either way.
    """
    order = [*range(len(shape))]
    if channels_last:
        order = [*order[:-3], *(len(shape) + i for i in (-2, -1, -3))]
    stride, step = [0] * len(shape), 1
    for axis in reversed(order):
        stride[axis], step = step, step * max(shape[axis], 1)
    return empty_strided(shape, tuple(stride), dtype)


def empty_strided(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """The same with strides of one's own, which must leave no holes."""
    size = math.prod(shape)
    storage = None
    if size * dtype.itemsize >= SMALLEST and process_reserve is not None:
        storage = process_reserve.storage(size * dtype.itemsize)
    if storage is None:
        storage = torch.empty(size, dtype=dtype, device="cpu").untyped_storage()
    return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape, stride)
