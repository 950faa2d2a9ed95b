"""Muon with like-shaped matrices orthogonalised together: a few large products instead of hundreds of small ones."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.optim.muon import zeropower_via_newtonschulz
from torch import Tensor
from torch.optim.adamw import adamw

# a, b, c of x -> ax + bx^3 + cx^5 in each Newton-Schulz iteration: F. L. Cesista, J. You and K. Jordan 2025,
# "Squeezing 1-2% efficiency gains out of Muon by optimizing the Newton-Schulz coefficients"; timm calls them "quintic"
COEFFICIENTS = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]
_SMALLEST_SIDE, _LARGEST_RATIO = 4, 128  # of a matrix that is orthogonalised
_BETAS = (0.9, 0.95)
_EPSILON = 1e-7


def takes(p: Tensor) -> bool:
    """Whether Muon updates this parameter (out, in, ...) as a matrix (out, everything else), rather than AdamW.

    Not vectors, position embeddings (1, ...), depthwise convolutions (out, 1, ...), nor thin matrices.
    """
    if p.ndim < 2 or 1 in p.shape[:2]:
        return False
    short, long = sorted((p.shape[0], math.prod(p.shape[1:])))
    return short >= _SMALLEST_SIDE and long <= _LARGEST_RATIO * short


def update_scale(rows: int, columns: int) -> float:
    """Factor that gives an orthogonal matrix the mean square of AdamW's updates (Liu et al. 2025, section 2.2)."""
    return 0.2 * math.sqrt(max(rows, columns))


def _is_tall(p: Tensor) -> bool:
    """Whether the matrix (out, everything else) has more rows than columns; told without making it."""
    return p.shape[0] ** 2 > p.numel()


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are replaced by their nearest orthogonal ones; AdamW for everything else.

    K. Jordan 2024, "Muon: An optimizer for hidden layers in neural networks"; decay and the scale of updates as in
    Liu et al. 2025, arXiv 2502.16982, section 2.2, so that learning rates are of AdamW's kind. A convolution's weight
    (out, in, h, w) counts as a matrix (out, in * h * w). The same updates as timm's "muon", which goes through its
    matrices one by one; differences are the rounding of the iterations, which run in bfloat16 whatever the precision.
    As there, AdamW updates vectors, (1, ...), (out, 1, ...), fewer than 4 rows or columns, and what is more than 128
    times as long as wide.

    Args:
        params: parameters or groups of them.
        lr: learning rate, a float or (capturable) a tensor on the parameters' device.
        weight_decay: decoupled, times the learning rate.
        momentum: of the matrices.
        capturable: keep all state on the device, so that `step` can be captured in a CUDA graph.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.01,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "capturable": capturable}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            matrices: list[Tensor] = []
            others: list[Tensor] = []
            for p in group["params"]:
                if p.grad is not None:
                    (matrices if takes(p) else others).append(p)
            if matrices:
                self._update_matrices(matrices, group)
            if others:
                self._update_others(others, group)
        return loss

    def _update_matrices(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        for p in matrices:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        averages = [self.state[p]["momentum_buffer"] for p in matrices]
        torch._foreach_lerp_(averages, [p.grad for p in matrices if p.grad is not None], 1 - group["momentum"])
        like_shaped: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for p, average in zip(matrices, averages, strict=True):
            matrix = average.flatten(1)
            wide = matrix.mT if _is_tall(p) else matrix
            like_shaped.setdefault((wide.shape[0], wide.shape[1]), []).append((p, wide))
        updated, updates = [], []
        for shape, members in like_shaped.items():
            stack = torch.stack([wide for _, wide in members])
            nearest = zeropower_via_newtonschulz(stack, len(COEFFICIENTS), COEFFICIENTS, _EPSILON).to(stack.dtype)
            for (p, _), update in zip(members, nearest * (group["lr"] * update_scale(*shape)), strict=True):
                updated.append(p)
                updates.append((update.mT if _is_tall(p) else update).reshape(p.shape))
        torch._foreach_mul_(updated, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_sub_(updated, updates)

    def _update_others(self, others: list[Tensor], group: dict[str, Any]) -> None:
        for p in others:
            if not self.state[p]:
                self.state[p] |= {
                    "step": torch.zeros((), device=p.device if group["capturable"] else None),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        states = [self.state[p] for p in others]
        adamw(
            others,
            [p.grad for p in others if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            capturable=group["capturable"],
            amsgrad=False,
            beta1=_BETAS[0],
            beta2=_BETAS[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=_EPSILON,
            maximize=False,
        )
