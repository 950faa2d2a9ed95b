# ruff: noqa: RUF005  (Triton joins tuples with + alone)
"""The neuron inside the kernels: one step forward, one step of its gradient, all surrogates.

Everything here works on float32 tiles of any shape. `../reference.py` is the definition.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..config import LIFConfig
from ..surrogate import SURROGATES


class Neuron(NamedTuple):
    """LIFConfig as a compile-time constant of the kernels."""

    tau: float
    reciprocal: float | None  # 1 / tau where it is exact (tau a power of two), else None: divide
    v_threshold: float
    v_reset: float | None
    surrogate: int  # SURROGATES[...].index
    alpha: float
    detach_reset: bool
    decay_input: bool


def compile_time_neuron(config: LIFConfig) -> Neuron:
    """The kernels' form of `config`."""
    tau = float(config.tau)
    exact = tau.hex().startswith("0x1.0000000000000p")
    assert config.alpha is not None
    return Neuron(
        tau,
        1.0 / tau if exact else None,
        float(config.v_threshold),
        None if config.v_reset is None else float(config.v_reset),
        SURROGATES[config.surrogate].index,
        float(config.alpha),
        bool(config.detach_reset),
        bool(config.decay_input),
    )


@triton.jit
def _over_tau(x, NEURON: tl.constexpr):
    # Spikes decided exactly at the threshold are common, so the quotient is rounded as the reference rounds it.
    if NEURON.reciprocal is not None:
        return x * NEURON.reciprocal
    else:
        return tl.div_rn(x, tl.full(x.shape, NEURON.tau, tl.float32))


@triton.jit
def rest(shape: tl.constexpr, NEURON: tl.constexpr):
    """The membrane that a sequence starts from."""
    if NEURON.v_reset is None:
        return tl.zeros(shape, tl.float32)
    else:
        return tl.full(shape, NEURON.v_reset, tl.float32)


@triton.jit
def charge(v, x, NEURON: tl.constexpr):
    """h_t from v_{t-1} and the current x_t."""
    leaked = v
    if NEURON.v_reset is not None:
        leaked = v - NEURON.v_reset
    if NEURON.decay_input:
        return v + _over_tau(x - leaked, NEURON)
    else:
        return v - _over_tau(leaked, NEURON) + x


@triton.jit
def fires(h, NEURON: tl.constexpr):
    """Boolean spikes: h - v_threshold >= 0."""
    return h - NEURON.v_threshold >= 0


@triton.jit
def reset(h, fired, NEURON: tl.constexpr):
    """v_t from h_t."""
    if NEURON.v_reset is None:
        return tl.where(fired, h - NEURON.v_threshold, h)
    else:
        return tl.where(fired, NEURON.v_reset, h)


@triton.jit
def surrogate_derivative(h, NEURON: tl.constexpr):
    """What stands for d spike / d h; the formulas and their sources are in `../surrogate.py`."""
    u = h - NEURON.v_threshold
    if NEURON.surrogate == 0:
        # s (1 - s) written with exp(-|x|): one exponential, no overflow, no cancellation in 1 - s.
        e = tl.exp(-tl.abs(NEURON.alpha * u))
        return NEURON.alpha * e / ((1 + e) * (1 + e))
    elif NEURON.surrogate == 1:
        w = (1.5707963267948966 * NEURON.alpha) * u
        return (0.5 * NEURON.alpha) / (1 + w * w)
    elif NEURON.surrogate == 2:
        return tl.where(tl.abs(u) < 0.5 / NEURON.alpha, NEURON.alpha, 0.0)
    elif NEURON.surrogate == 3:
        return NEURON.alpha * tl.maximum(1 - NEURON.alpha * tl.abs(u), 0.0)
    elif NEURON.surrogate == 4:
        w = 1 + NEURON.alpha * tl.abs(u)
        return 1 / (w * w)
    else:
        tl.static_assert(NEURON.surrogate == 5, "no kernel form of this surrogate")
        w = NEURON.alpha * u
        return (0.5641895835477563 * NEURON.alpha) * tl.exp(-w * w)


@triton.jit
def charge_gradient(h, grad_s, grad_v, NEURON: tl.constexpr):
    """dL/dh_t from dL/ds_t and dL/dv_t."""
    slope = surrogate_derivative(h, NEURON)
    if NEURON.v_reset is None:
        through_reset = grad_v
        if not NEURON.detach_reset:
            grad_s -= grad_v * NEURON.v_threshold
    else:
        through_reset = tl.where(fires(h, NEURON), 0.0, grad_v)
        if not NEURON.detach_reset:
            grad_s += grad_v * (NEURON.v_reset - h)
    return grad_s * slope + through_reset


@triton.jit
def input_gradient(grad_h, NEURON: tl.constexpr):
    """dL/dx_t from dL/dh_t."""
    if NEURON.decay_input:
        return grad_h * (1.0 / NEURON.tau)
    else:
        return grad_h


@triton.jit
def carried_gradient(grad_h, NEURON: tl.constexpr):
    """dL/dv_{t-1} from dL/dh_t."""
    return grad_h * (1.0 - 1.0 / NEURON.tau)


@triton.jit
def charges(v, currents, STEPS: tl.constexpr, NEURON: tl.constexpr):
    """h at every step of a tuple of currents."""
    hs = ()
    for t in tl.static_range(STEPS):
        h = charge(v, currents[t], NEURON)
        hs = hs + (h,)
        v = reset(h, fires(h, NEURON), NEURON)
    return hs
