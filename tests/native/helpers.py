"""Inputs for the kernels' tests."""

import pytest
import torch
from torch import Tensor

KERNELS = [pytest.param(1, id="1x1"), pytest.param(3, id="3x3")]


def spikes(*shape: int, rate: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    n, c, h, w = shape
    return (torch.rand(n, h, w, c, generator=generator) < rate).float().permute(0, 3, 1, 2)
