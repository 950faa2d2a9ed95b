"""The reserve that large results come from."""

import gc
import random
import threading

import pytest
import torch

from spikingformer.native import memory
from spikingformer.native.memory import Reserve

pytestmark = pytest.mark.skipif(memory.process_reserve() is None, reason="no reserve on this system")
MB = 1 << 20


def test_blocks_come_back_and_join():
    reserve = Reserve(8 * MB)
    tensors = [reserve.empty((MB,), torch.uint8) for _ in range(8)]
    assert reserve.empty((1,), torch.uint8) is None, "full"
    assert len({t.data_ptr() for t in tensors}) == 8
    for i in (1, 5, 3, 2, 4):
        tensors[i] = None
    assert reserve.free_blocks() == [(MB, 5 * MB)]
    big = reserve.empty((5, MB), torch.uint8)
    assert big.shape == (5, MB)
    del tensors, big
    assert reserve.free_blocks() == [(0, 8 * MB)]


def test_a_block_lives_as_long_as_any_view_of_it():
    reserve = Reserve(4 * MB)
    x = reserve.empty((2, 3, 1000), torch.float64)
    part = x.permute(2, 0, 1)[5:7].detach()
    part.fill_(7)
    del x
    gc.collect()
    assert reserve.free_blocks()[0][0] > 0
    other = reserve.empty((1000,), torch.float32)
    other.fill_(1)
    assert bool((part == 7).all())
    del part, other
    assert reserve.free_blocks() == [(0, 4 * MB)]


def test_blocks_never_overlap_over_many_threads():
    reserve, wrong = Reserve(64 * MB), []

    def work(seed: int) -> None:
        draw, kept = random.Random(seed), []
        for i in range(300):
            if kept and draw.random() < 0.5:
                value, tensor = kept.pop(draw.randrange(len(kept)))
                if not bool((tensor == value).all()):
                    wrong.append((seed, value))
            tensor = reserve.empty((draw.randrange(1, 50_000),), torch.int32)
            if tensor is not None:
                value = seed * 1000 + i
                kept.append((value, tensor.fill_(value)))

    threads = [threading.Thread(target=work, args=(s,)) for s in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert reserve.free_blocks() == [(0, 64 * MB)]


def test_small_results_and_a_full_reserve_are_left_to_torch(monkeypatch):
    reserve = Reserve(2 * MB)
    monkeypatch.setattr(memory, "process_reserve", lambda: reserve)
    for shape in ((3,), (4 * MB,), (0, 5)):
        x = memory.empty(shape)
        assert x.shape == shape
        assert x.dtype == torch.float32
    assert reserve.free_blocks() == [(0, 2 * MB)]
    x = memory.empty((MB,), torch.uint8)
    assert reserve.free_blocks() == [(MB, MB)]
    assert torch.equal(x.fill_(3).clone(), torch.full((MB,), 3, dtype=torch.uint8))
