"""The neuron as a module."""

from torch import Tensor, nn

from .backend import choose_backend
from .config import LIFConfig
from .reference import lif_reference

State = dict["LIF", Tensor]  # the membranes of a model in flight, one entry a neuron layer


def lif(
    x: Tensor, config: LIFConfig, v: Tensor | None = None, want_membrane: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Runs LIF neurons over x (T, ...) with the backend of the moment; see `lif_reference` for the meaning.

    Returns (spikes (T, ...) in x's dtype, last membrane (...); None may stand for one that is not wanted).
    """
    backend = choose_backend(x, config.surrogate)
    if backend == "native":
        from spikingformer.native import ops as native_ops

        return native_ops.lif(x, config, v, want_membrane)
    if backend == "triton":
        from .triton import ops as triton_ops

        return triton_ops.lif(x, config, v, want_membrane)
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
        if state is None:
            return lif(x, self.config, want_membrane=False)[0]
        spikes, membrane = lif(x, self.config, state.get(self))
        assert membrane is not None
        state[self] = membrane
        return spikes

    def extra_repr(self) -> str:
        c = self.config
        return f"tau={c.tau}, v_threshold={c.v_threshold}, v_reset={c.v_reset}, surrogate={c.surrogate}({c.alpha})"
