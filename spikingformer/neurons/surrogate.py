"""Surrogate gradients: what stands for d spike / d h, where the true derivative is zero or infinite.

`u = h - v_threshold` throughout. Every function is a bell of u with its own width parameter alpha.

Your own: `SURROGATES["mine"] = Surrogate(None, 1.0, derivative, "source")`, then `LIFConfig(surrogate="mine")`. The
fused kernels have no form of it, so the plain neuron serves ("auto" takes it by itself, other backends refuse).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Surrogate:
    """One surrogate: `index` is its number in the fused kernels (None: not there), `alpha` its default width."""

    index: int | None
    alpha: float
    derivative: Callable[[Tensor, float], Tensor]  # (u, alpha) to d spike / d h
    source: str


def _sigmoid(u: Tensor, alpha: float) -> Tensor:
    s = torch.sigmoid(alpha * u)
    return alpha * s * (1 - s)


def _atan(u: Tensor, alpha: float) -> Tensor:
    return alpha / 2 / (1 + (math.pi / 2 * alpha * u).square())


def _rectangle(u: Tensor, alpha: float) -> Tensor:
    return alpha * (u.abs() < 0.5 / alpha).to(u.dtype)


def _triangle(u: Tensor, alpha: float) -> Tensor:
    return alpha * (1 - alpha * u.abs()).clamp_min(0)


def _fast_sigmoid(u: Tensor, alpha: float) -> Tensor:
    return (1 + alpha * u.abs()).square().reciprocal()


def _gaussian(u: Tensor, alpha: float) -> Tensor:
    return alpha / math.sqrt(math.pi) * torch.exp(-(alpha * u).square())


SURROGATES: dict[str, Surrogate] = {
    "sigmoid": Surrogate(0, 4.0, _sigmoid, "alpha s (1 - s), s = sigmoid(alpha u); the published models, alpha 4"),
    "atan": Surrogate(1, 2.0, _atan, "alpha / 2 / (1 + (pi alpha u / 2)^2); Fang et al. 2021, arXiv 2007.05785"),
    "rectangle": Surrogate(2, 1.0, _rectangle, "alpha where |u| < 1 / (2 alpha); Wu et al. 2018, arXiv 1706.02609"),
    "triangle": Surrogate(3, 1.0, _triangle, "alpha max(0, 1 - alpha |u|); Bellec et al. 2018, arXiv 1803.09574"),
    "fast_sigmoid": Surrogate(4, 10.0, _fast_sigmoid, "1 / (1 + alpha |u|)^2; Zenke and Ganguli 2018"),
    "gaussian": Surrogate(5, 2.0, _gaussian, "alpha / sqrt(pi) exp(-(alpha u)^2), the derivative of erf"),
}

_FUSED = dict(SURROGATES)  # those that the kernels were written for, whatever the table holds later


def get_surrogate(name: str) -> Surrogate:
    """The surrogate called `name`. Raises ValueError that lists the names there are."""
    if name not in SURROGATES:
        raise ValueError(f"unknown surrogate {name!r}: use one of {', '.join(SURROGATES)}")
    return SURROGATES[name]


def has_kernel(name: str) -> bool:
    """Whether the fused kernels compute this surrogate: those that come with the package, as they come."""
    return name in _FUSED and SURROGATES[name] is _FUSED[name]


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u: Tensor, name: str, alpha: float) -> Tensor:
        ctx.save_for_backward(u)
        ctx.name, ctx.alpha = name, alpha
        return (u >= 0).to(u.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (u,) = ctx.saved_tensors
        return grad * SURROGATES[ctx.name].derivative(u, ctx.alpha), None, None


def spike(u: Tensor, name: str, alpha: float) -> Tensor:
    """1 where u >= 0 and 0 elsewhere (same shape and dtype); the gradient is the surrogate's."""
    return _Spike.apply(u, name, alpha)
