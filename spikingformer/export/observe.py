"""Spikes seen from outside, by the neurons' names."""

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from spikingformer.neurons import LIF


@contextlib.contextmanager
def observed_spikes(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Fills a dict {name of the neuron layer: its spikes (T, B, C, H, W)} with what the last call inside fired."""
    spikes: dict[str, Tensor] = {}

    def keep(name: str) -> object:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            spikes[name] = output

        return hook

    handles = [
        module.register_forward_hook(keep(name))  # type: ignore[arg-type]
        for name, module in model.named_modules()
        if isinstance(module, LIF)
    ]
    try:
        yield spikes
    finally:
        for handle in handles:
            handle.remove()
