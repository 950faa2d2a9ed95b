"""One estimate as a document, from which the JSON, the CSV, the table and the report are made.

Everything is per sample; energies in mJ for totals and pJ for single operations.
"""

import csv
import io
from dataclasses import asdict
from typing import Any

from .comparison import ann_twin
from .constants import CONSTANTS
from .facts import Facts, Kind, Neuron, Operand, Product
from .memory import add_memory, ann_memory_mj
from .pricing import PRESETS, Bill, Line, get_preset

SCHEMA = "spikingformer-energy/1"
FEW_SAMPLES = 1000

LAYER_COLUMNS = ("name", "op", "shape", "parameters", "dense", "valid", "input_kind", "input_rate", "sops", "macs",
                 "acs", "updates", "energy_pj", "share", "rate_by_step")  # fmt: skip


def energy_document(
    facts: Facts,
    preset: str = "exact",
    also: tuple[str, ...] = (),
    memory: str = "none",
    trained: bool = True,
    real_data: bool = True,
) -> dict[str, Any]:
    """The estimate under one preset, with the totals of other presets.

    `trained`, `real_data`: False adds a warning that the rates mean nothing.
    """
    chosen = get_preset(preset)
    has_rates = facts.source != "shapes only"
    bill = add_memory(chosen.price(facts), facts, memory) if has_rates else Bill(preset)
    twin = ann_twin(facts, chosen.price(facts))  # arithmetic against arithmetic
    total_pj = bill.energy_mj * 1e9
    lines: dict[str, list[Line]] = {}
    for line in bill.lines:
        lines.setdefault(line.name, []).append(line)
    others = [get_preset(name) for name in dict.fromkeys(also) if name != preset]
    return {
        "schema": SCHEMA,
        "model": facts.model,
        "source": facts.source,
        "samples": facts.samples if facts.source == "measured" else 0,
        "accuracy": facts.accuracy,
        "parameters": facts.parameters,
        "time_steps": facts.time_steps,
        "input_shape": list(facts.input_shape),
        "preset": {"name": chosen.name, "summary": chosen.summary},
        "memory_model": memory,
        "totals": {
            "dense": sum(facts.per_sample(p, p.dense, True) for p in facts.products),
            "valid": sum(facts.per_sample(p, p.valid, True) for p in facts.products),
            "valid_weighted": sum(facts.per_sample(p, p.valid, True) for p in facts.products if p.weighted),
            "sops": sum(facts.per_sample(p, p.events) for p in facts.products) if has_rates else None,
            "macs": bill.macs if has_rates else None,
            "acs": bill.acs if has_rates else None,
            "energy_mj": bill.energy_mj if has_rates else None,
            "by_component_mj": bill.by_component(),
        },
        "ann": {**asdict(twin), "memory_mj": ann_memory_mj(facts, memory)},
        "also": [_total(p.price(facts)) for p in others] if has_rates else [],
        "layers": [_layer(facts, p, lines, total_pj, has_rates) for p in facts.products],
        "neurons": [_neuron(facts, n, lines, total_pj, has_rates) for n in facts.neurons],
        "elementwise": [
            {
                "name": e.name,
                "op": e.op,
                "operations": e.count / facts.samples,
                "operations_unrolled": e.count * e.stands_for / facts.samples,
            }
            for e in facts.elementwise
        ],
        "attention": [
            {"name": a.name, "order": a.order, "tokens": a.tokens, "head_dim": a.head_dim,
             "q_rate": a.q.mean, "k_rate": a.k.mean, "v_rate": a.v.mean}
            for a in facts.attentions
        ] if has_rates else [],
        "lines": [asdict(line) for line in bill.lines],
        "uncounted": facts.uncounted,
        "constants": {name: asdict(c) for name, c in CONSTANTS.items()},
        "warnings": warnings_for(facts, trained, real_data),
    }  # fmt: skip


def _total(bill: Bill) -> dict[str, Any]:
    return {"preset": bill.preset, "summary": PRESETS[bill.preset].summary, "macs": bill.macs, "acs": bill.acs,
            "energy_mj": bill.energy_mj}  # fmt: skip


def _rates(operand: Operand, known: bool) -> dict[str, Any]:
    return {
        "input_rate": operand.rate if known else None,
        "input_mean": operand.mean if known else None,
        "rate_by_step": operand.rate_by_step,
    }


def _layer(facts: Facts, p: Product, lines: dict[str, list[Line]], total_pj: float, known: bool) -> dict[str, Any]:
    mine = lines.get(p.name, [])
    energy = sum(line.energy_pj for line in mine)
    return {
        "name": p.name,
        "op": p.op,
        "shape": p.shape,
        "parameters": p.parameters,
        "dense": facts.per_sample(p, p.dense, True),
        "valid": facts.per_sample(p, p.valid, True),
        "input_kind": p.kind.label,
        **_rates(p.input, known),
        "sops": facts.per_sample(p, p.events) if known else None,
        "macs": sum(line.macs for line in mine) if known else None,
        "acs": sum(line.acs for line in mine) if known else None,
        "energy_pj": energy if known else None,
        "share": energy / total_pj if known and total_pj else None,
        "once_for_still_picture": p.stands_for > 1,
    }


def _neuron(facts: Facts, n: Neuron, lines: dict[str, list[Line]], total_pj: float, known: bool) -> dict[str, Any]:
    energy = sum(line.energy_pj for line in lines.get(n.name, []))
    return {
        "name": n.name,
        "op": n.module_type,
        "shape": "x".join(map(str, n.shape)),
        "updates": n.updates / facts.samples,
        "firing_rate": n.output.rate if known else None,
        "rate_by_step": n.output.rate_by_step,
        "silent": n.silent,
        "saturated": n.saturated,
        "silent_channels": n.silent_channels,
        "saturated_channels": n.saturated_channels,
        "energy_pj": energy if known else None,
        "share": energy / total_pj if known and total_pj else None,
    }


def warnings_for(facts: Facts, trained: bool, real_data: bool) -> list[str]:
    """What a reader must know before quoting the figures."""
    found = []
    if facts.source == "shapes only":
        return ["no firing rates: give --data, --rates or --assume-rate for an energy"]
    if facts.source != "measured":
        found.append(f"{facts.source}: nothing was measured; attention assumes that spikes coincide independently")
    else:
        if not trained:
            found.append("untrained weights: firing rates and energies say nothing about a trained model")
        if not real_data:
            found.append("dummy input: firing rates and energies say nothing about real data")
        if facts.samples < FEW_SAMPLES:
            found.append(f"only {facts.samples} samples: rates may still change; use {FEW_SAMPLES} or more")
        silent = [n.name for n in facts.neurons if n.output.nonzero == 0]
        if silent:
            found.append(f"{len(silent)} neuron layers never fired: {_some(silent)}")
    if any(p.weighted and p.kind == Kind.INTEGER for p in facts.products):
        found.append("some products read integers, not spikes: presets differ in how they count them")
    if facts.never_called:
        found.append(f"layers that the input did not reach are not counted: {_some(facts.never_called)}")
    if facts.uncounted:
        found.append(f"operations without a price are not counted: {_some(list(facts.uncounted))}")
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def table_rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Products and neuron layers as flat rows with the columns LAYER_COLUMNS, then one row for each other component."""
    rows = [{**dict.fromkeys(LAYER_COLUMNS), **{k: v for k, v in layer.items() if k in LAYER_COLUMNS}}
            for layer in document["layers"]]  # fmt: skip
    for n in document["neurons"]:
        row = {**dict.fromkeys(LAYER_COLUMNS), **{k: v for k, v in n.items() if k in LAYER_COLUMNS}}
        rows.append({**row, "input_kind": "analog", "input_rate": n["firing_rate"]})
    for e in document["elementwise"]:
        rows.append({**dict.fromkeys(LAYER_COLUMNS), "name": e["name"], "op": e["op"], "acs": e["operations"]})
    return rows


def to_csv(document: dict[str, Any]) -> str:
    """One line per operation; the rates of the time steps are separated by spaces."""
    text = io.StringIO()
    writer = csv.DictWriter(text, LAYER_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in table_rows(document):
        writer.writerow({**row, "rate_by_step": " ".join(f"{r:.6g}" for r in row["rate_by_step"] or [])})
    return text.getvalue()
