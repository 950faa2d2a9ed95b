"""Firing rates that are assumed or read from a file, not measured."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Rates:
    """Firing rates of a model: the mean of each product's input, and of q, k, v in each attention.

    `nonzero`: share of nonzero values of the inputs whose mean is not that share (Spikformer's counts of spikes).
    Where it is not known, it is taken to be the mean, at most 1.

    Files are JSON: {"inputs": {"stem.stages.1.conv": 0.12, ...}, "attention": {"blocks.0.attn": [0.1, 0.03, 0.06]}},
    a bare {"layer": rate} table, or the JSON that `spikingformer energy --json` wrote.
    """

    inputs: Mapping[str, float] = field(default_factory=dict)
    attention: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    nonzero: Mapping[str, float] = field(default_factory=dict)
    default: float | None = None  # for layers that are not listed; None: every layer must be listed
    source: str = "rates"

    @classmethod
    def read(cls, path: Path) -> "Rates":
        """The rates in a file. Raises ValueError that names the file and the field that is wrong."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"no rates file {path}: give the path of a JSON file") from None
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error})") from None
        try:
            inputs, attention, nonzero = _tables(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return cls(inputs, attention, nonzero, source=f"rates file {path.name}")


def _tables(data: Any) -> tuple[dict[str, float], dict[str, tuple[float, float, float]], dict[str, float]]:
    """(mean inputs, attention rates, shares of nonzero inputs) of a file's content."""
    if not isinstance(data, dict):
        raise ValueError(f"expected an object of layer names and rates, got {data!r}")
    if str(data.get("schema", "")).startswith("spikingformer-energy/"):
        layers = [(name, r) for name, r in _named(data, "layers") if r.get("input_rate") is not None]
        nonzero = {name: r["input_rate"] for name, r in layers}
        counts = {name: r.get("input_mean") for name, r in layers if r.get("input_kind") == "integer"}
        inputs = {name: rate if counts.get(name) is None else counts[name] for name, rate in nonzero.items()}
        attention = {
            name: [r.get(f"{part}_rate") for part in "qkv"]
            for name, r in (_named(data, "attention") if "attention" in data else [])
        }
        return _inputs(inputs, "layers "), _attention(attention), _inputs(nonzero, "layers ")
    if "inputs" in data or "attention" in data:
        return _inputs(data.get("inputs", {}), "inputs "), _attention(data.get("attention", {})), {}
    return _inputs(data, ""), {}, {}


def _named(data: dict[str, Any], key: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, row) of each row in the list `data[key]`."""
    rows = data.get(key)
    if not isinstance(rows, list):
        raise ValueError(f"{key}: expected a list, got {'nothing' if rows is None else repr(rows)}")
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("name"), str):
            raise ValueError(f"{key}[{i}]: expected an object with a name, got {row!r}")
    return [(row["name"], row) for row in rows]


def _is_rate(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _inputs(table: Any, field_name: str) -> dict[str, float]:
    if not isinstance(table, dict):
        raise ValueError(f"{field_name.strip()}: expected an object of layer names and rates, got {table!r}")
    for name, rate in table.items():
        if not _is_rate(rate):
            raise ValueError(f"{field_name}{name!r}: expected a rate, a number of at least 0, got {rate!r}")
    return table


def _attention(table: Any) -> dict[str, tuple[float, float, float]]:
    if not isinstance(table, dict):
        raise ValueError(f"attention: expected an object of attention names and rates, got {table!r}")
    for name, rates in table.items():
        if not isinstance(rates, list) or len(rates) != 3 or not all(map(_is_rate, rates)):
            raise ValueError(
                f"attention {name!r}: expected the rates of q, k and v, three numbers of at least 0, got {rates!r}"
            )
    return {name: (q, k, v) for name, (q, k, v) in table.items()}
