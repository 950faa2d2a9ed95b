"""Energy of accesses to weights and states, in addition to arithmetic. Per sample, FP32 values, 45 nm memories."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from .constants import pj
from .facts import Facts, Kind, Product
from .pricing import Bill, Line

_SRAM = ((8 * 1024, "sram_8kb"), (32 * 1024, "sram_32kb"), (1024 * 1024, "sram_1mb"))
_BYTES = 4  # FP32


def interpolated_access(size: float) -> float:
    """pJ per access of a memory of `size` bytes: linear between the measured sizes, constant below the smallest one.

    Above 1 MB the last slope continues up to DRAM's price.
    """
    points = [(float(b), pj(name)) for b, name in _SRAM]
    if size <= points[0][0]:
        return points[0][1]
    (x0, y0), (x1, y1) = next((s for s in itertools.pairwise(points) if size <= s[1][0]), points[-2:])
    return min(y0 + (size - x0) * (y1 - y0) / (x1 - x0), pj("dram"))


def smallest_access(size: float) -> float:
    """pJ per 64-bit access of the smallest memory in the table that holds `size` bytes."""
    return next((pj(name) for limit, name in _SRAM if size <= limit), pj("dram"))


def _outputs(p: Product) -> int:
    n = 1
    for side in p.out_shape:
        n *= side
    return n


def lemaire2022(facts: Facts) -> list[Line]:
    """Lemaire et al. 2022, arXiv 2210.13107: one access per value, priced by the size of the memory that holds it.

    For each event the layer reads the event, a weight and a potential for every product it causes, and writes the
    potential back; each neuron update reads and writes its potential; each spike is written once. Addressing: two
    multiply-accumulates per event and an addition per product, in int32. Layers with analog input read an input and a
    weight for every product and write each output, as a network without spikes does.
    """
    lines = []
    for p in facts.products:
        events = facts.per_sample(p, p.events)
        weights = p.parameters * _BYTES if p.weighted else _values(p) * _BYTES
        states = _outputs(p) * _BYTES
        read = events * interpolated_access(weights)
        if p.kind == Kind.ANALOG or not p.weighted:
            inputs = events * interpolated_access(_values(p) * _BYTES)
            energy = read + inputs + facts.per_sample(p, p.outputs) * interpolated_access(states)
        else:
            spikes = facts.per_sample(p, p.input.nonzero)
            energy = read + spikes * interpolated_access(0) + 2 * events * interpolated_access(states)
            energy += spikes * 2 * (pj("int32_mul") + pj("int32_add")) + events * pj("int32_add")
        if p.own_bias or p.folded_norm:
            energy += facts.per_sample(p, p.outputs) * interpolated_access(p.out_shape[0] * _BYTES)
        lines.append(Line(p.name, "memory", energy_pj=energy))
    for n in facts.neurons:
        updates, spikes = n.updates / facts.samples, float(n.output.nonzero) / facts.samples
        energy = 2 * updates * interpolated_access(n.units * _BYTES) + spikes * interpolated_access(0)
        lines.append(Line(n.name, "memory", energy_pj=energy))
    return lines


def sram64(facts: Facts) -> list[Line]:
    """Packed 64-bit words: two FP32 values or 64 spikes per access, from the smallest memory that holds them.

    Spikes are read as bit maps, silent words included; an event reads its row of weights and reads and writes the
    accumulators that it reaches; each neuron update reads and writes its potential.
    """
    per_word, spikes_per_word = 2, 64
    lines = []
    for p in facts.products:
        events = facts.per_sample(p, p.events)
        weights = smallest_access((p.parameters if p.weighted else _values(p)) * _BYTES)
        states = smallest_access(_outputs(p) * _BYTES)
        spiking = p.kind <= Kind.BINARY
        inputs = facts.per_sample(p, p.input.elements) / (spikes_per_word if spiking else per_word)
        size = _values(p) / 8 if spiking else _values(p) * _BYTES
        energy = inputs * smallest_access(size) + events / per_word * (weights + 2 * states)
        lines.append(Line(p.name, "memory", energy_pj=energy))
    for n in facts.neurons:
        updates = n.updates / facts.samples
        energy = 2 * updates / per_word * smallest_access(n.units * _BYTES)
        energy += updates / spikes_per_word * smallest_access(n.units / 8)
        lines.append(Line(n.name, "memory", energy_pj=energy))
    return lines


def _values(p: Product) -> int:
    n = 1
    for side in p.in_shape:
        n *= side
    return n


@dataclass(frozen=True)
class MemoryModel:
    """Prices of memory accesses, for a spiking network and for the same network without spikes."""

    lines: Callable[[Facts], list[Line]]  # of the spiking network
    dense_value: Callable[[float], float]  # pJ to move one FP32 value to or from a memory of that many bytes


MEMORY_MODELS = {
    "none": MemoryModel(lambda facts: [], lambda size: 0.0),
    "lemaire2022": MemoryModel(lemaire2022, interpolated_access),
    "sram64": MemoryModel(sram64, lambda size: smallest_access(size) / 2),  # two values per word
}


def get_memory_model(name: str) -> MemoryModel:
    """The memory model called `name`. Raises ValueError that lists the existing names."""
    if name not in MEMORY_MODELS:
        raise ValueError(f"unknown memory model {name!r}: use one of {', '.join(MEMORY_MODELS)}")
    return MEMORY_MODELS[name]


def add_memory(bill: Bill, facts: Facts, model: str) -> Bill:
    """The bill with memory lines appended. Raises ValueError for an unknown memory model."""
    bill.lines += get_memory_model(model).lines(facts)
    return bill


def ann_memory_mj(facts: Facts, model: str) -> float:
    """Memory accesses of the same network without spikes at T = 1 in FP32, under the same memory model; mJ a sample.

    Each product reads an input and a weight, each output is written once. Raises ValueError for an unknown model.
    """
    price = get_memory_model(model).dense_value
    total = 0.0
    for p in facts.products:
        steps = facts.steps_of(p)
        dense = facts.per_sample(p, p.dense, unrolled=True) / steps
        outputs = facts.per_sample(p, p.outputs, unrolled=True) / steps
        inputs = _values(p) * _BYTES
        weights = p.parameters * _BYTES if p.weighted else inputs
        total += dense * (price(inputs) + price(weights)) + outputs * price(_outputs(p) * _BYTES)
    return total / 1e9
