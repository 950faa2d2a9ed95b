"""Muon with like-shaped matrices orthogonalised together: a few large products instead of hundreds of small ones."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.optim.muon import (
    _COEFFICIENTS,
    _is_suitable_for_muon,
    get_lr_scale,
    resolve_ns_coefficients,
    zeropower_via_newtonschulz,
)
from torch import Tensor
from torch.optim.adamw import adamw

_ITERATIONS = 5  # of Newton and Schulz
_BETAS = (0.9, 0.95)
_EPSILON = 1e-7


def _is_tall(p: Tensor) -> bool:
    """Whether the matrix (out, everything else) has more rows than columns; told without making it."""
    return p.shape[0] ** 2 > p.numel()


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are replaced by their nearest orthogonal ones; AdamW for everything else.

    K. Jordan 2024, "Muon: An optimizer for hidden layers in neural networks"; decay and the scale of updates as in
    Liu et al. 2025, arXiv 2502.16982, section 2.2, so that learning rates are of AdamW's kind. A convolution's weight
    (out, in, h, w) counts as a matrix (out, in * h * w). The same updates as timm's "muon", which goes through its
    matrices one by one; differences are the rounding of the iterations, which run in bfloat16 whatever the precision.
    As there, AdamW takes vectors, (out, 1, h, w), fewer than 4 rows or columns, and what is more than 128 times as long
    as wide.

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
                    (matrices if _is_suitable_for_muon(p) else others).append(p)
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
        coefficients = resolve_ns_coefficients("quintic", _COEFFICIENTS)
        updated, updates = [], []
        for shape, members in like_shaped.items():
            stack = torch.stack([wide for _, wide in members])
            nearest = zeropower_via_newtonschulz(stack, _ITERATIONS, coefficients, _EPSILON).to(stack.dtype)
            for (p, _), update in zip(members, nearest * (group["lr"] * get_lr_scale(torch.Size(shape))), strict=True):
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
