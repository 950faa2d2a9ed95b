"""The reserve that large results come from."""

import gc
import os
import random
import threading
import weakref

import pytest
import torch

from spikingformer.native import memory
from spikingformer.native.memory import Reserve

pytestmark = pytest.mark.skipif(memory.process_reserve is None, reason="no reserve on this system")
MB = 1 << 20


def free_blocks(reserve: Reserve) -> list[tuple[int, int]]:
    """(start, bytes) of every hole."""
    with reserve._lock:
        reserve._take_back_returned()
        return list(reserve._free)


def test_blocks_come_back_and_join():
    reserve = Reserve(8 * MB)
    kept = [reserve.storage(MB) for _ in range(8)]
    assert reserve.storage(1) is None, "full"
    assert len({s.data_ptr() for s in kept}) == 8
    for i in (1, 5, 3, 2, 4):
        kept[i] = None
    assert free_blocks(reserve) == [(MB, 5 * MB)]
    big = reserve.storage(5 * MB)
    assert big.nbytes() == 5 * MB
    del kept, big
    assert free_blocks(reserve) == [(0, 8 * MB)]


@pytest.fixture
def reserve(monkeypatch) -> Reserve:
    monkeypatch.setattr(memory, "process_reserve", Reserve(8 * MB))
    return memory.process_reserve


def test_a_block_lives_as_long_as_any_view_of_it(reserve):
    x = memory.empty((2, 3, 100_000), torch.float64)
    part = x.permute(2, 0, 1)[5:7].detach()
    part.fill_(7)
    del x
    gc.collect()
    assert free_blocks(reserve)[0][0] > 0
    other = memory.empty((MB,), torch.float32).fill_(1)
    assert bool((part == 7).all())
    del part, other
    assert free_blocks(reserve) == [(0, 8 * MB)]


def test_a_tensor_outlives_its_reserve():
    reserve = Reserve(8 * MB)
    x = torch.empty(0).set_(reserve.storage(4 * MB), 0, (MB,)).fill_(1)
    gone = weakref.ref(reserve)
    del reserve
    gc.collect()
    assert gone() is None
    assert x.sum() == MB


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_a_reserve_of_its_own(reserve):
    x = memory.empty((MB,), torch.uint8).fill_(3)
    with reserve._lock:  # as if another thread were inside at the fork
        child = os.fork()
        if child == 0:
            y = memory.empty((MB,), torch.uint8).fill_(5)
            os._exit(0 if int(x[0]) == 3 and int(y[-1]) == 5 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_blocks_never_overlap_over_many_threads():
    reserve, wrong = Reserve(64 * MB), []

    def work(seed: int) -> None:
        draw, kept = random.Random(seed), []
        for i in range(300):
            if kept and draw.random() < 0.5:
                value, tensor = kept.pop(draw.randrange(len(kept)))
                if not bool((tensor == value).all()):
                    wrong.append((seed, value))
            storage = reserve.storage(4 * draw.randrange(1, 50_000))
            if storage is not None:
                value = seed * 1000 + i
                tensor = torch.empty(0, dtype=torch.int32).set_(storage, 0, (storage.nbytes() // 4,))
                kept.append((value, tensor.fill_(value)))

    threads = [threading.Thread(target=work, args=(s,)) for s in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert free_blocks(reserve) == [(0, 64 * MB)]


def test_small_results_and_a_full_reserve_are_left_to_torch(reserve):
    for shape in ((3,), (16 * MB,), (0, 5)):
        x = memory.empty(shape)
        assert x.shape == shape
        assert x.dtype == torch.float32
        assert x.is_contiguous()
    assert free_blocks(reserve) == [(0, 8 * MB)]
    x = memory.empty((MB,), torch.uint8)
    assert free_blocks(reserve) == [(MB, 7 * MB)]
    assert torch.equal(x.fill_(3).clone(), torch.full((MB,), 3, dtype=torch.uint8))


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 300, 20, 100), (1, 0, 3, 3)], ids=str)
def test_channels_last_is_a_tensor_of_its_own(reserve, shape):
    x = memory.empty(shape, channels_last=True).requires_grad_()
    assert x.movedim(-3, -1).is_contiguous()
    assert not x._is_view()
    with torch.device("meta"):
        assert memory.empty(shape).device.type == "cpu"
