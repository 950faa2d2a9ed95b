"""Stochastic depth for tensors whose first axis is time."""

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
        if self.rate == 0 or not self.training:
            return x
        keep = 1 - self.rate
        mask = x.new_empty((1, x.shape[1]) + (1,) * (x.ndim - 2)).bernoulli_(keep).div_(keep)
        return x * mask

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"
