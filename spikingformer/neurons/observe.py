"""Records the spikes of a model's neuron layers by hooks."""

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from .lif import LIF


@contextlib.contextmanager
def observed_spikes(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """A dict {name of the neuron layer: its spikes (T, B, C, H, W)}, filled by the last call of the model inside."""
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
