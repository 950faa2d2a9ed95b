"""Presets price the same counts by different rules. Every figure is per sample.

`exact` is ours; the others restate how published tables or tools count, their mistakes included (docs/energy.md).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from .constants import FP32_MAC, pj
from .facts import Attention, Facts, Kind, Product

COMPONENTS = ("synapses", "attention", "bias", "neurons", "residual", "pooling", "other", "memory")


@dataclass
class Line:
    """One operation's price."""

    name: str
    component: str  # one of COMPONENTS
    macs: float = 0.0
    acs: float = 0.0
    energy_pj: float = 0.0


@dataclass
class Bill:
    """All lines of one preset."""

    preset: str
    lines: list[Line] = field(default_factory=list)

    @property
    def macs(self) -> float:
        return sum(line.macs for line in self.lines)

    @property
    def acs(self) -> float:
        return sum(line.acs for line in self.lines)

    @property
    def energy_mj(self) -> float:
        """Energy per sample in mJ (1 mJ = 1e9 pJ)."""
        return sum(line.energy_pj for line in self.lines) / 1e9

    def by_component(self) -> dict[str, float]:
        """mJ per sample of each component that has any."""
        sums = {c: sum(line.energy_pj for line in self.lines if line.component == c) / 1e9 for c in COMPONENTS}
        return {c: e for c, e in sums.items() if e}

    def add(self, name: str, component: str, macs: float = 0.0, acs: float = 0.0, pj_each: float | None = None) -> None:
        """Adds operations at FP32 45 nm prices, or at `pj_each` per accumulate."""
        energy = macs * FP32_MAC + acs * (pj("fp32_add") if pj_each is None else pj_each)
        self.lines.append(Line(name, component, macs, acs, energy))


@dataclass(frozen=True)
class Preset:
    """One way to count and price."""

    name: str
    summary: str
    price: Callable[[Facts], Bill]


def _component(p: Product) -> str:
    return "synapses" if p.weighted else "attention"


def price_exact(facts: Facts) -> Bill:
    """What an event-driven engine has to do, each operation once.

    Nonzero inputs x valid fan-out; accumulates where either operand is a spike, multiply-accumulates elsewhere
    (integers included); two activations count where both are nonzero; a still picture's first convolution once; one
    addition per bias (BatchNorm folded); a neuron update is one multiply-accumulate (leak and input) and one addition
    (threshold); residual additions, pool comparisons and averages are additions.
    """
    bill = Bill("exact")
    n = facts.samples
    for p in facts.products:
        events = facts.per_sample(p, p.events)
        spiking = p.kind <= Kind.BINARY
        bill.add(p.name, _component(p), macs=0 if spiking else events, acs=events if spiking else 0)
        if p.own_bias or p.folded_norm:
            bill.add(p.name, "bias", acs=facts.per_sample(p, p.outputs))
    for neuron in facts.neurons:
        bill.add(neuron.name, "neurons", macs=neuron.updates / n, acs=neuron.updates / n)
    for e in facts.elementwise:
        component = {"residual add": "residual", "max pool": "pooling", "average": "pooling"}.get(e.op, "other")
        multiplies = e.op in ("norm", "multiply")
        bill.add(e.name, component, macs=e.count / n if multiplies else 0, acs=0 if multiplies else e.count / n)
    return bill


def _dense(facts: Facts, p: Product) -> float:
    """k^2 Cin Cout / groups, + Cout with a bias, times positions; every time step is executed."""
    return facts.per_sample(p, p.dense + (p.outputs if p.own_bias else 0), unrolled=True)


def _attention_acs(facts: Facts, a: Attention, heads: float | None) -> float:
    """T heads N d^2 (min(r_k, r_v) + r_q), assuming the order q (k^T v)."""
    matrices = a.matrices / facts.samples
    runs = matrices * a.tokens * a.head_dim**2
    if heads is not None:
        runs *= matrices / facts.time_steps / heads  # T heads N (D / heads)^2 for another number of heads
    return runs * (min(a.k.mean, a.v.mean) + a.q.mean)


def _price_published(facts: Facts, name: str, heads: Callable[[int], float | None], integers: str) -> Bill:
    bill = Bill(name)
    for p in facts.products:
        if not p.weighted:
            if not p.role:
                rate = min(p.input.rate, p.other.rate) if p.other else p.input.rate
                bill.add(p.name, "attention", acs=facts.per_sample(p, p.dense, unrolled=True) * rate)
            continue
        dense = _dense(facts, p)
        if p.kind == Kind.ANALOG or (p.kind == Kind.INTEGER and integers == "mac"):
            bill.add(p.name, "synapses", macs=dense)
        else:
            bill.add(p.name, "synapses", acs=dense * p.input.mean)
    for a in facts.attentions:
        width = round(a.matrices / facts.samples / facts.time_steps) * a.head_dim
        bill.add(a.name, "attention", acs=_attention_acs(facts, a, heads(width)))
    return bill


def price_neurobench(facts: Facts) -> Bill:
    """NeuroBench's SynapticOperations: nonzero inputs x nonzero weights of convolutions and linear layers.

    Attention, biases and neurons are not counted; every execution is. NeuroBench reports operations only: the energy
    beside them is ours, at the same prices.
    """
    bill = Bill("neurobench")
    for p in facts.products:
        if p.weighted:
            events = p.events_nonzero_weights / facts.samples
            spiking = p.kind <= Kind.BINARY
            bill.add(p.name, "synapses", macs=0 if spiking else events, acs=events if spiking else 0)
    return bill


_LOG_HEADS = {768: 12.0}  # the published 8-768 logs used 12 heads in this term; the model has 8

PRESETS = {
    p.name: p
    for p in (
        Preset("exact", "events x valid fan-out, true coincidences, every component on a line of its own", price_exact),
        Preset(
            "spikingformer-paper",
            "Spikingformer's published formula with the model's real heads (arXiv 2304.11954)",
            lambda f: _price_published(f, "spikingformer-paper", lambda width: None, "mac"),
        ),
        Preset(
            "spikingformer-log",
            "as the published logs were made: 12 heads in the attention term at width 768",
            lambda f: _price_published(f, "spikingformer-log", _LOG_HEADS.get, "mac"),
        ),
        Preset(
            "spikformer-lenient",
            "published formula, integer inputs as accumulates by their mean (arXiv 2209.15425)",
            lambda f: _price_published(f, "spikformer-lenient", lambda width: None, "ac"),
        ),
        Preset(
            "spikformer-strict",
            "published formula, integer inputs as multiply-accumulates",
            lambda f: _price_published(f, "spikformer-strict", lambda width: None, "mac"),
        ),
        Preset("neurobench", "NeuroBench's synaptic operations: nonzero inputs x nonzero weights", price_neurobench),
    )
}


def get_preset(name: str) -> Preset:
    """The preset called `name`. Raises ValueError that lists the existing names."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: use one of {', '.join(PRESETS)}")
    return PRESETS[name]
