"""Firing rates and estimated energy while a model trains."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn

from .counting import OperationCounter
from .facts import Facts, Neuron
from .pricing import get_preset


@dataclass(frozen=True)
class RateReport:
    """Firing rates and energy of a model at one moment of its training."""

    samples: int
    firing_rate: float  # of all neurons, every unit and time step counted alike
    energy_mj: float  # estimated, per sample
    sops: float  # synaptic operations per sample
    rates: dict[str, float] = field(default_factory=dict)  # firing rate of each neuron layer
    silent: dict[str, list[int]] = field(default_factory=dict)  # layer -> channels that never fired
    saturated: dict[str, list[int]] = field(default_factory=dict)  # layer -> channels that always fired
    dead_layers: list[str] = field(default_factory=list)  # layers that never fired at all

    def metrics(self) -> dict[str, float]:
        """Numbers for a log, one for each curve."""
        return {
            "firing_rate": self.firing_rate,
            "energy_mj": self.energy_mj,
            "sops": self.sops,
            "silent_channels": float(sum(map(len, self.silent.values()))),
            "saturated_channels": float(sum(map(len, self.saturated.values()))),
        }

    def problems(self) -> list[str]:
        """Sentences that name dead or saturated layers and channels; empty if there are none."""
        found = [f"{name} never fired on {self.samples} samples" for name in self.dead_layers]
        for layers, what in ((self.silent, "never"), (self.saturated, "always")):
            for name, channels in layers.items():
                if name not in self.dead_layers:
                    shown = ", ".join(map(str, channels[:8])) + (", ..." if len(channels) > 8 else "")
                    found.append(f"{name}: {len(channels)} channels {what} fired ({shown})")
        return found


class RateMonitor:
    """Counts a model on a few held-out samples, for example once per epoch.

        monitor = RateMonitor(model, samples=64)
        report = monitor.look(batch.inputs for batch in evaluation.batches())

    The model is counted in eval mode and left as it was; training itself is not slowed down or changed.
    `samples`: the most to count.
    """

    def __init__(self, model: nn.Module, samples: int = 64, preset: str = "exact"):
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        self.model, self.samples, self.preset = model, samples, get_preset(preset)

    def look(self, inputs: Iterable[Tensor]) -> RateReport:
        """Counts over inputs until enough samples were seen."""
        counter, left = OperationCounter(self.model), self.samples
        for x in inputs:
            counter.add(x[:left])
            left -= len(x[:left])
            if left <= 0:
                break
        return rate_report(counter.finish(), self.preset.name)


def rate_report(facts: Facts, preset: str = "exact") -> RateReport:
    """The report on existing counts, for example of an evaluation."""
    bill = get_preset(preset).price(facts)
    spikes = sum(float(n.output.nonzero) for n in facts.neurons)
    updates = sum(n.updates for n in facts.neurons)

    def channels(pick: str) -> dict[str, list[int]]:
        return {n.name: c for n in facts.neurons if (c := _channels(n, pick))}

    return RateReport(
        samples=facts.samples,
        firing_rate=spikes / updates if updates else 0.0,
        energy_mj=bill.energy_mj,
        sops=sum(facts.per_sample(p, p.events) for p in facts.products),
        rates={n.name: n.output.rate for n in facts.neurons},
        silent=channels("silent"),
        saturated=channels("saturated"),
        dead_layers=[n.name for n in facts.neurons if n.output.nonzero == 0],
    )


def _channels(neuron: Neuron, pick: str) -> list[int]:
    return neuron.silent_channels if pick == "silent" else neuron.saturated_channels
