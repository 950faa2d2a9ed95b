"""The neuron as a module."""

from torch import Tensor, nn

from .backend import choose_backend
from .config import LIFConfig
from .reference import lif_reference

State = dict["LIF", Tensor]  # the membranes of a model in flight, one entry a neuron layer


def lif(x: Tensor, config: LIFConfig, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Runs LIF neurons over x (T, ...) with the backend of the moment; see `lif_reference` for the meaning.

    Returns (spikes (T, ...) in x's dtype, last membrane (...)).
    """
    backend = choose_backend(x)
    if backend == "native":
        from spikingformer.native import ops as native_ops

        return native_ops.lif(x, config, v)
    if backend == "triton":
        from .triton import ops as triton_ops

        spikes, membrane = triton_ops.lif(x, config, v)
        assert membrane is not None
        return spikes, membrane
    return lif_reference(x, config, v)


class LIF(nn.Module):
    """A layer of LIF neurons. It has no weights and keeps no state between calls.

    Called with x (T, ...): currents; returns spikes, the same shape and dtype, each 0 or 1.
    With a `state` dict, the membrane starts from `state[self]` where there is one and is left there afterwards.
    """

    def __init__(self, config: LIFConfig = LIFConfig()):  # noqa: B008  (frozen)
        super().__init__()
        self.config = config

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        spikes, v = lif(x, self.config, None if state is None else state.get(self))
        if state is not None:
            state[self] = v
        return spikes

    def extra_repr(self) -> str:
        c = self.config
        return f"tau={c.tau}, v_threshold={c.v_threshold}, v_reset={c.v_reset}, surrogate={c.surrogate}({c.alpha})"
