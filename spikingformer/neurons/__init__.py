"""Neurons: one LIF equation, its surrogates, and the fused forms that equal it."""

from .backend import choose_backend, requested_backend, use_backend
from .config import LIFConfig
from .lif import LIF, State, lif
from .reference import lif_reference, lif_step
from .surrogate import SURROGATES, get_surrogate, spike

__all__ = [
    "LIF",
    "SURROGATES",
    "LIFConfig",
    "State",
    "choose_backend",
    "get_surrogate",
    "lif",
    "lif_reference",
    "lif_step",
    "requested_backend",
    "spike",
    "use_backend",
]
