"""Stochastic depth for tensors whose first axis is time."""

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Drops a sample's residual branch, at all time steps together, with probability `rate` while training.

    x: (T, B, ...). What is kept is scaled by 1 / (1 - rate). Huang et al. 2016, arXiv 1603.09382.
    """

    def __init__(self, rate: float = 0.0):
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop_path_rate must lie in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        factors = self.factors(x)
        return x if factors is None else x * factors.to(x.dtype).view(1, -1, *[1] * (x.ndim - 2))

    def factors(self, x: Tensor) -> Tensor | None:
        """What each sample of x (T, B, ...) is to be multiplied by, (B,), drawn anew; None where nothing is dropped.

        In float32, or float64 for such x.
        """
        if self.rate == 0 or not self.training:
            return None
        keep = 1 - self.rate
        drawn = x.new_empty(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
        return drawn.bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"
