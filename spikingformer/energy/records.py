"""Running records of the counter: one a product, attention, neuron layer or elementwise operation."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .facts import Attention, Elementwise, Kind, Neuron, Operand, Product
from .geometry import ConvGeometry
from .tally import Ledger, OperandTally, Stats

_ROLE_NAMES = {"qk": "q@k^T", "qk_v": "(q@k^T)@v", "kv": "k^T@v", "q_kv": "q@(k^T@v)"}
Side = tuple[Tensor, Tensor, Kind | None, Kind | None]


def matmul_views(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Operands as (matrices, m, k) and (matrices, k, n)."""
    x = a if a.ndim == 3 else a.unsqueeze(0)
    y = b if b.ndim == 3 else b.reshape(1, b.shape[0], -1)
    return x, y


class ProductTally:
    """Adds up one product (one call of it a forward pass)."""

    def __init__(self, path: str, module_type: str, op: str, call: int):
        self.path, self.module_type, self.op, self.call = path, module_type, op, call
        self.left, self.right = OperandTally(), OperandTally()
        self.weighted = op != "matmul"
        self.folded_norm = False
        self.role = ""
        self.sides: Side | None = None  # operands, until an attention takes them
        self.executions = self.dense = self.valid = self.outputs = 0
        self.events = self.events_nonzero_weights = 0
        self.stands_for = 1
        self.identical = True  # a picture's time steps were equal in every batch
        self.compared = False
        self.own_bias = False
        self.parameters = 0
        self.in_shape: tuple[int, ...] = ()
        self.out_shape: tuple[int, ...] = ()
        self.kernel: tuple[int, ...] = ()
        self.stride: tuple[int, ...] = ()
        self.groups = 1
        self.geometry: ConvGeometry | None = None
        self.fan_out: Tensor | None = None
        self.fan_out_nonzero: Tensor | None = None  # None: no weight is zero
        self.steps = 1

    @property
    def name(self) -> str:
        return self.path

    def start_convolution(self, x: Tensor, weight: Tensor, bias: Any, args: Any, out: Tensor, repeats: int) -> None:
        """Sets the geometry; a new input size sets it again."""
        stride, padding, dilation, transposed, _, groups = args[3:9]
        axes = weight.ndim - 2
        geometry = ConvGeometry(
            in_channels=x.shape[-axes - 1],
            out_channels=out.shape[-axes - 1],
            kernel=tuple(weight.shape[2:]),
            stride=tuple(stride) * (axes if len(stride) == 1 else 1),
            padding=tuple(padding) * (axes if len(padding) == 1 else 1),
            dilation=tuple(dilation) * (axes if len(dilation) == 1 else 1),
            groups=groups,
            in_size=tuple(x.shape[-axes:]),
            out_size=tuple(out.shape[-axes:]),
            transposed=transposed,
        )
        self.stands_for, self.own_bias = repeats, bias is not None
        self.parameters = weight.numel() + (bias.numel() if bias is not None else 0)
        if geometry == self.geometry:
            return
        self.geometry, self.kernel, self.stride, self.groups = geometry, geometry.kernel, geometry.stride, groups
        self.in_shape = (geometry.in_channels, *geometry.in_size)
        self.out_shape = (geometry.out_channels, *geometry.out_size)
        if not x.is_meta:
            self.fan_out = geometry.fan_out(x.device)
            self.fan_out_nonzero = geometry.fan_out_nonzero(weight) if bool((weight == 0).any()) else None

    def start_linear(self, rows: Tensor, weight: Tensor, weight_is_left: bool, bias: bool) -> None:
        """rows: (executions, in)."""
        n_in = rows.shape[-1]
        n_out = weight.numel() // n_in if weight.ndim < 3 else weight.shape[-2 if weight_is_left else -1]
        self.in_shape, self.out_shape = (n_in,), (n_out,)
        self.own_bias |= bias
        self.parameters = n_in * n_out + (n_out if self.own_bias else 0)
        if rows.is_meta or self.fan_out is not None:
            return
        self.fan_out = torch.tensor(n_out, device=rows.device)
        flat = (weight if weight_is_left else weight.transpose(-1, -2)) if weight.ndim > 1 else weight[None]
        if flat.ndim == 2 and bool((flat == 0).any()):
            self.fan_out_nonzero = (flat != 0).sum(0)

    def add_bias(self, bias: Tensor) -> None:
        """A bias added by a separate operation."""
        if not self.own_bias:
            self.own_bias = True
            self.parameters += bias.numel()

    def add_weighted(self, stats: Stats, kind: Kind | None, runs: int, outputs: int, ledger: Ledger, x: Tensor) -> None:
        """One call of a convolution or linear layer on x (runs, ...)."""
        self.left.add(stats, kind, ledger)
        self.executions += runs
        self.outputs += outputs
        g = self.geometry
        self.dense += runs * (g.dense() if g else math.prod(self.in_shape) * self.out_shape[0])
        self.valid += runs * (g.valid() if g else math.prod(self.in_shape) * self.out_shape[0])
        if stats.positions is None or self.fan_out is None:
            return
        events = (stats.positions * self.fan_out).sum()
        kept = events if self.fan_out_nonzero is None else ((x != 0).sum(0) * self.fan_out_nonzero).sum()
        ledger.put(torch.stack([events, kept]), self._add_events)

    def add_activations(
        self, x: Tensor, y: Tensor, kind_x: Kind | None, kind_y: Kind | None, steps: int, outputs: int, ledger: Ledger
    ) -> None:
        """One product of activations x (matrices, m, k) @ y (matrices, k, n)."""
        count, m, k = x.shape
        n = y.shape[2]
        self.left.add(Stats(x, steps, 0), kind_x, ledger)
        self.right.add(Stats(y, steps, 0), kind_y, ledger)
        self.in_shape, self.out_shape = (m, k), (m, n)
        self.executions += count
        self.outputs += outputs
        self.dense += count * m * k * n
        self.valid += count * m * k * n
        if not x.is_meta:
            events = ((x != 0).sum(1) * (y != 0).sum(2)).sum()
            ledger.put(torch.stack([events, events]), self._add_events)

    def _add_events(self, values: list[int]) -> None:
        self.events += values[0]
        self.events_nonzero_weights += values[1]

    def saw_differences(self, values: list[int]) -> None:
        """How many values differ between the time steps of what may be a still picture."""
        self.compared = True
        self.identical &= values[0] == 0

    def _shape_text(self) -> str:
        if self.geometry is None:
            (a, *rest), (b, *_) = self.in_shape, self.out_shape
            return f"{a}->{b}" if not rest else f"({a},{rest[0]})@({rest[0]},{self.out_shape[1]})"
        g = self.geometry
        extra = (f" s{g.stride[0]}" if max(g.stride) > 1 else "") + (f" g{g.groups}" if g.groups > 1 else "")
        size = "x".join(map(str, g.out_size))
        return f"{g.in_channels}->{g.out_channels} {'x'.join(map(str, g.kernel))}{extra} @{size}"

    def record(self) -> Product:
        """The finished record."""
        suffix = f":{_ROLE_NAMES[self.role]}" if self.role else "" if self.weighted else ":matmul"
        steps = max(len(self.left.nonzero_by_step), 1)
        return Product(
            name=self.path + suffix,
            module_type=self.module_type,
            op=self.op,
            shape=self._shape_text(),
            in_shape=self.in_shape,
            out_shape=self.out_shape,
            kernel=self.kernel,
            stride=self.stride,
            groups=self.groups,
            parameters=self.parameters,
            own_bias=self.own_bias,
            folded_norm=self.folded_norm,
            executions=self.executions,
            copies=steps if self.compared and self.identical and self.call == 0 else 1,
            stands_for=steps if self.compared and self.identical and self.call == 0 else self.stands_for,
            dense=self.dense,
            valid=self.valid,
            outputs=self.outputs,
            input=self.left.operand(),
            other=None if self.weighted else self.right.operand(),
            events=self.events,
            events_nonzero_weights=self.events_nonzero_weights,
            role=self.role,
        )

    @staticmethod
    def records(tallies: list["ProductTally"]) -> list[Product]:
        """Finished records. Calls of one module for equal time steps (one call per step) become one record."""
        merged: dict[tuple, Product] = {}
        for t in tallies:
            p = t.record()
            key = (p.name, p.op, p.shape, p.kind, p.role)
            if key not in merged:
                merged[key] = p
                continue
            into = merged[key]
            _merge(into, p)
            if t.compared and t.identical and t.call > 0:
                into.copies += 1
                into.stands_for += 1
        names: dict[str, int] = {}
        for p in merged.values():
            names[p.name] = names.get(p.name, 0) + 1
            if names[p.name] > 1:
                p.name += f"#{names[p.name]}"
        return list(merged.values())


def _merge_operand(a: Operand, b: Operand) -> None:
    a.kind = max(a.kind, b.kind)
    a.elements += b.elements
    a.nonzero += b.nonzero
    a.total += b.total
    a.nonzero_by_step += b.nonzero_by_step


def _merge(a: Product, b: Product) -> None:
    for name in ("executions", "dense", "valid", "outputs", "events", "events_nonzero_weights"):
        setattr(a, name, getattr(a, name) + getattr(b, name))
    _merge_operand(a.input, b.input)
    if a.other is not None and b.other is not None:
        _merge_operand(a.other, b.other)
    a.folded_norm |= b.folded_norm


class AttentionTally:
    """Adds up q, k and v of one attention."""

    def __init__(self, name: str, order: str, tokens: int, head_dim: int):
        self.name, self.order, self.tokens, self.head_dim = name, order, tokens, head_dim
        self.matrices = 0
        self.operands = [OperandTally(), OperandTally(), OperandTally()]

    def add(self, matrices: int, qkv: list[tuple[Tensor, Kind | None]], steps: int, ledger: Ledger) -> None:
        """One more execution."""
        self.matrices += matrices
        for tally, (x, kind) in zip(self.operands, qkv, strict=True):
            tally.add(Stats(x, steps, 0), kind, ledger)

    def record(self) -> Attention:
        q, k, v = (t.operand() for t in self.operands)
        return Attention(self.name, self.order, self.matrices, self.tokens, self.head_dim, q, k, v)


class NeuronTally:
    """Adds up one neuron layer; counts per unit stay on the device until the end."""

    def __init__(self, name: str, module_type: str):
        self.name, self.module_type = name, module_type
        self.output = OperandTally()
        self.shape: tuple[int, ...] = ()
        self.unit_counts: Tensor | None = None
        self.trials = 0  # (sample, time step) pairs

    def add(self, s: Tensor, kind: Kind | None, steps: int, batch: int, ledger: Ledger) -> None:
        """Spikes s (T, B, ...), (T * B, ...) or (B, ...)."""
        lead = 2 if s.ndim > 2 and s.shape[0] == steps and s.shape[1] == batch else 1
        runs = math.prod(s.shape[:lead])
        self.shape = tuple(s.shape[lead:])
        by_run = s.flatten(0, lead - 1)
        self.output.add(Stats(by_run, runs // batch if runs % batch == 0 else 1, 0), kind, ledger)
        self.trials += runs
        if s.is_meta:
            return
        counts = (by_run != 0).sum(0)
        if self.unit_counts is None:
            self.unit_counts = counts
        elif self.unit_counts.shape == counts.shape:
            self.unit_counts += counts

    @staticmethod
    def records(tallies: list["NeuronTally"]) -> list[Neuron]:
        """One record per layer (calls of one step each are joined), without modules that turned out not to fire."""
        merged: dict[str, Neuron] = {}
        units: dict[str, tuple[Tensor | None, int]] = {}
        for t in tallies:
            if t.output.kind != Kind.BINARY:
                continue
            if t.name in merged:
                into = merged[t.name]
                into.updates += t.output.elements
                _merge_operand(into.output, t.output.operand())
                counts, trials = units[t.name]
                both = counts is not None and t.unit_counts is not None and counts.shape == t.unit_counts.shape
                units[t.name] = (counts + t.unit_counts if both else None, trials + t.trials)  # type: ignore[operator]
            else:
                merged[t.name] = Neuron(t.name, t.module_type, t.shape, t.output.elements, t.output.operand())
                units[t.name] = (t.unit_counts, t.trials)
        for name, (counts, trials) in units.items():
            if counts is not None:
                _find_extremes(merged[name], counts.cpu(), trials)
        return list(merged.values())


def _find_extremes(neuron: Neuron, counts: Tensor, trials: int) -> None:
    neuron.silent = int((counts == 0).sum())
    neuron.saturated = int((counts == trials).sum())
    by_channel = counts.flatten(1) if counts.ndim > 1 else counts[:, None] if counts.ndim else counts.reshape(1, 1)
    neuron.silent_channels = (by_channel == 0).all(1).nonzero().flatten().tolist()
    neuron.saturated_channels = (by_channel == trials).all(1).nonzero().flatten().tolist()


@dataclass
class ElementwiseTally:
    """Adds up one kind of elementwise operation in one module."""

    name: str
    op: str
    count: int = 0
    stands_for: int = 1

    def record(self) -> Elementwise:
        return Elementwise(self.name, self.op, self.count, self.stands_for)
