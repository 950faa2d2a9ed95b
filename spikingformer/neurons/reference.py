"""The definition of the neuron. Every fused form is tested against this one.

T: time steps first, the rest of the shape is free.
"""

import torch
from torch import Tensor

from .config import LIFConfig
from .surrogate import spike


def lif_step(x: Tensor, v: Tensor, config: LIFConfig) -> tuple[Tensor, Tensor]:
    """One time step: current x and membrane v (any one shape) give (spikes, next membrane)."""
    leaked = v - config.v_rest
    h = v + (x - leaked) / config.tau if config.decay_input else v - leaked / config.tau + x
    assert config.alpha is not None
    s = spike(h - config.v_threshold, config.surrogate, config.alpha)
    fired = s.detach() if config.detach_reset else s
    if config.v_reset is None:
        return s, h - fired * config.v_threshold
    return s, (1 - fired) * h + fired * config.v_reset


def lif_reference(x: Tensor, config: LIFConfig, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Runs the neuron over x (T, ...).

    The state is kept in x's dtype, but at least in float32. `v` (...) is the membrane to start from, at rest when None.
    Returns (spikes (T, ...) in x's dtype, the last membrane (...) in the state's dtype).
    """
    state_dtype = torch.promote_types(x.dtype, torch.float32)
    if v is None:
        v = torch.full_like(x[0], config.v_rest, dtype=state_dtype)
    spikes = []
    for current in x.to(state_dtype).unbind(0):
        s, v = lif_step(current, v, config)
        spikes.append(s)
    return torch.stack(spikes).to(x.dtype), v
