"""The two forms in which a model is exported, with tensors as their only inputs and outputs.

Whole: an input to logits, all time steps unrolled. One step: a frame and the state to logits and the next state.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from spikingformer.models import SpikingTransformer, StreamState
from spikingformer.neurons.observe import observed_spikes


class WholeModel(nn.Module):
    """x to (logits,), or to (logits, spikes of each neuron layer (T, B, C, H, W) ...) with `spikes`."""

    def __init__(self, model: SpikingTransformer, spikes: bool = False):
        super().__init__()
        self.model, self.spikes = model, spikes

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if not self.spikes:
            return (self.model(x),)
        with observed_spikes(self.model) as fired:
            logits = self.model(x)
        return (logits, *fired.values())

    def output_names(self) -> list[str]:
        """Names of the outputs."""
        return ["logits", *(f"spikes.{name}" for name in neuron_names(self.model) if self.spikes)]


class OneStep(nn.Module):
    """(frame (B, C, H, W), steps (), feature_sum (B, C), membrane (B, C, H, W) of each neuron layer ...) to
    (logits so far, steps + 1, feature_sum, membranes ...). A stream starts from zeros."""

    def __init__(self, model: SpikingTransformer, spikes: bool = False):
        super().__init__()
        self.model, self.spikes = model, spikes

    def forward(self, frame: Tensor, steps: Tensor, feature_sum: Tensor, *membranes: Tensor) -> tuple[Tensor, ...]:
        state = StreamState(membranes, feature_sum, steps)  # type: ignore[arg-type]  # a tensor, so that it is an input
        with observed_spikes(self.model) as fired:
            logits, after = self.model.stream(frame, state)
        outputs = (logits, torch.as_tensor(after.steps), after.feature_sum, *after.membranes)
        return (*outputs, *fired.values()) if self.spikes else outputs

    def input_names(self) -> list[str]:
        """Names of the inputs."""
        return ["frame", "steps", "feature_sum", *(f"membrane.{name}" for name in neuron_names(self.model))]

    def output_names(self) -> list[str]:
        """Names of the outputs: `logits`, and the inputs' names after `next.`, so that a caller can feed them back."""
        fired = [f"spikes.{name}" for name in neuron_names(self.model) if self.spikes]
        return ["logits", *(f"next.{name}" for name in self.input_names()[1:]), *fired]


def neuron_names(model: SpikingTransformer) -> list[str]:
    """Module names of the neuron layers, in the order of `model.neurons()`."""
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(neuron)] for neuron in model.neurons()]


def start_of_stream(model: SpikingTransformer, frame: Tensor) -> tuple[Tensor, ...]:
    """(steps, feature_sum, membranes ...) before the first frame; `frame` (B, C, H, W) gives shapes and dtype."""
    with torch.no_grad():
        _, state = model.stream(frame)
    return tuple(_zeros([torch.zeros(()), state.feature_sum, *state.membranes]))


def _zeros(tensors: list[Tensor]) -> Iterator[Tensor]:
    return (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in tensors)
