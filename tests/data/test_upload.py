"""Batches are made on a GPU without waiting for it."""

import contextlib
import warnings

import numpy as np
import pytest
import torch

from spikingformer.data.batched import BatchedAugment
from spikingformer.data.settings import AugmentSettings
from spikingformer.data.upload import constant, upload

CPU = torch.device("cpu")


def test_values_arrive_as_they_are():
    rows = np.arange(6).reshape(2, 3)[:, ::-1]
    assert torch.equal(upload(np.ascontiguousarray(rows), CPU), torch.tensor([[2, 1, 0], [5, 4, 3]]))
    assert torch.equal(upload(torch.ones(2, 3).T, CPU), torch.ones(3, 2))
    assert constant((0.5, 0.25), torch.float64, CPU).tolist() == [0.5, 0.25]


@contextlib.contextmanager
def waiting_is_an_error():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode warns that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_augmentation_never_waits_for_the_gpu():
    cuda = torch.device("cuda", 0)
    settings = AugmentSettings(engine="batched", flip=0.5, crop_padding=4, erase_probability=0.5)
    augment = BatchedAugment(settings, 32, "bicubic", (0.5,) * 3, (0.25,) * 3, 0)
    pictures = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, device=cuda)
    augment(pictures, np.arange(64), 0)
    with waiting_is_an_error():
        on_gpu = augment(pictures, np.arange(64), 1)
    torch.testing.assert_close(on_gpu.cpu(), augment(pictures.cpu(), np.arange(64), 1), rtol=1e-4, atol=1e-3)
