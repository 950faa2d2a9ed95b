"""The pool of both downsamplings: windows of 3x3, stride 2, padding 1, so that every side is halved."""

import torch.nn.functional as F
from torch import Tensor


def max_pool(x: Tensor) -> Tensor:
    """(T, B, C, H, W) to (T, B, C, ceil(H / 2), ceil(W / 2)).

    Of equal maxima the first in reading order has the gradient.
    """
    return F.max_pool2d(x.flatten(0, 1), kernel_size=3, stride=2, padding=1).unflatten(0, x.shape[:2])
