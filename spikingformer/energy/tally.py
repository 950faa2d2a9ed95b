"""Sums that stay on the device and are fetched together, once per batch."""

from collections.abc import Callable

import torch
from torch import Tensor

from .facts import Count, Kind, Operand


class Ledger:
    """Collects int64 and float64 results of a batch; `settle` fetches all of them in one transfer."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._sinks: list[tuple[Callable[[list], None], bool]] = []

    def put(self, values: Tensor, sink: Callable[[list], None]) -> None:
        """`sink` is called with the values (int64 or float64, flattened to a list) by `settle`."""
        real = values.dtype == torch.float64
        assert real or values.dtype == torch.int64, values.dtype
        flat = values.reshape(-1)
        self._parts.append(flat.view(torch.int64) if real else flat)
        self._sinks.append((sink, real))

    def settle(self) -> None:
        """Fetches everything put since the last call and passes it to the sinks."""
        if not self._parts:
            return
        sizes = [p.numel() for p in self._parts]
        for values, (sink, real) in zip(torch.cat(self._parts).cpu().split(sizes), self._sinks, strict=True):
            sink((values.view(torch.float64) if real else values).tolist())
        self._parts, self._sinks = [], []


class OperandTally:
    """Adds up one operand over batches.

    The kind is decided at the end from all batches, so it does not depend on how samples were batched.
    """

    def __init__(self) -> None:
        self.produced: Kind | None = None
        self.observed = Kind.ZERO
        self.elements = 0
        self.nonzero_by_step: list[Count] = []
        self.total = 0.0

    def add(self, stats: "Stats", produced: Kind | None, ledger: Ledger) -> None:
        """One more batch of values. `produced`: the largest kind that their producer can give."""
        if produced is not None:
            self.produced = produced if self.produced is None else max(self.produced, produced)
        self.elements += stats.elements
        if stats.nonzero_by_step is None or stats.ones is None or stats.fractions is None or stats.total is None:
            return
        ledger.put(stats.nonzero_by_step, self._add_steps)
        ledger.put(torch.stack([stats.nonzero_by_step.sum(), stats.ones, stats.fractions]), self._observe)
        ledger.put(stats.total, self._add_total)

    def _add_steps(self, values: list[int]) -> None:
        if len(self.nonzero_by_step) < len(values):
            self.nonzero_by_step += [0] * (len(values) - len(self.nonzero_by_step))
        for i, v in enumerate(values):
            self.nonzero_by_step[i] += v

    def _observe(self, values: list[int]) -> None:
        nonzero, ones, fractions = values
        if nonzero:
            seen = Kind.ANALOG if fractions else Kind.BINARY if ones == nonzero else Kind.INTEGER
            self.observed = max(self.observed, seen)

    def _add_total(self, values: list[float]) -> None:
        self.total += values[0]

    @property
    def kind(self) -> Kind:
        """Analog if the producer gives reals; else what the values showed; for all zeros, what the producer gives."""
        if self.produced == Kind.ANALOG or self.observed == Kind.ANALOG:
            return Kind.ANALOG
        if self.observed == Kind.ZERO:
            return Kind.ANALOG if self.produced is None else self.produced
        return self.observed

    def operand(self) -> Operand:
        """The record."""
        return Operand(self.kind, self.elements, sum(self.nonzero_by_step), self.total, list(self.nonzero_by_step))


class Stats:
    """Sums over one tensor, computed once even if several products read it (q, k and v share their input).

    `positions`: for (N, C, *spatial), nonzero values per step and position, (steps, *spatial).
    """

    def __init__(self, x: Tensor, steps: int, spatial: int):
        self.elements = x.numel()
        self.positions: Tensor | None = None
        self.nonzero_by_step: Tensor | None = None
        self.ones: Tensor | None = None
        self.fractions: Tensor | None = None
        self.total: Tensor | None = None
        if x.is_meta:
            return
        y = x.unflatten(0, (steps, -1))
        reduced = (1, 2) if spatial else tuple(range(1, y.ndim))
        self.positions = (y != 0).sum(reduced)
        self.nonzero_by_step = self.positions.flatten(1).sum(1) if spatial else self.positions
        self.ones = (x == 1).sum()
        self.fractions = (x != x.round()).sum() if x.is_floating_point() else torch.zeros_like(self.ones)
        self.total = x.sum(dtype=torch.float64)
