"""What was counted, without prices: exact totals over all samples, one record per operation.

Counts are totals over `Facts.samples`; a price divides. Measured counts are integers; counts derived from
assumed firing rates are expectations and may be fractional.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

Count = int | float


class Kind(enum.IntEnum):
    """What values a tensor holds; each kind includes those before it."""

    ZERO = 0  # nothing but zeros
    BINARY = 1  # zeros and ones
    INTEGER = 2
    ANALOG = 3

    @property
    def label(self) -> str:
        return self.name.lower()


@dataclass
class Operand:
    """The activations that entered a product."""

    kind: Kind
    elements: Count  # values seen
    nonzero: Count
    total: float  # sum of the values
    nonzero_by_step: list[Count] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Share of nonzero values: the firing rate, if they are spikes."""
        return float(self.nonzero) / float(self.elements) if self.elements else 0.0

    @property
    def mean(self) -> float:
        """Mean value: equals the rate, if they are spikes."""
        return self.total / float(self.elements) if self.elements else 0.0

    @property
    def rate_by_step(self) -> list[float]:
        """The rate at each time step."""
        steps = len(self.nonzero_by_step)
        return [float(n) * steps / float(self.elements) if self.elements else 0.0 for n in self.nonzero_by_step]


@dataclass
class Product:
    """A convolution, a linear layer, or a product of two activations."""

    name: str  # path of the module, followed by ":..." for a product without weights
    module_type: str
    op: str  # "conv1d" ... "conv3d", "conv_transpose2d", "linear", "matmul"
    shape: str  # for display
    in_shape: tuple[int, ...]  # one execution
    out_shape: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int
    parameters: int
    own_bias: bool
    folded_norm: bool  # a BatchNorm follows directly and folds into this product's weights and bias
    executions: int  # (sample, time step) pairs that it ran on; matrices for a product without weights
    copies: int  # equal executions of a still picture among them; an engine needs one
    stands_for: int  # time steps that one execution of a still picture stands for
    dense: int  # products including those with zero padding, without bias
    valid: int  # products excluding those with zero padding
    outputs: int  # output elements, so bias additions
    input: Operand
    other: Operand | None  # right operand of a product without weights
    events: Count  # nonzero inputs x valid fan-out; for two activations, true coincidences
    events_nonzero_weights: Count  # the same, counted only where the weight is not zero
    role: str = ""  # "qk", "qk_v", "kv", "q_kv" inside an attention

    @property
    def weighted(self) -> bool:
        return self.other is None

    @property
    def kind(self) -> Kind:
        """Kind of the input; for two activations the smaller kind of the two."""
        if self.other is None:
            return self.input.kind
        return min(self.input.kind, self.other.kind)


@dataclass
class Attention:
    """q, k, v of one spiking self-attention, found by following one product of activations into the next."""

    name: str
    order: str  # which product was executed first, "qk" or "kv"
    matrices: int  # samples x time steps x heads
    tokens: int  # N
    head_dim: int  # d
    q: Operand
    k: Operand
    v: Operand


@dataclass
class Neuron:
    """A layer of spiking neurons."""

    name: str
    module_type: str
    shape: tuple[int, ...]  # of one sample at one time step
    updates: int
    output: Operand
    silent: int | None = None  # units that never fired over all samples and steps
    saturated: int | None = None  # units that always fired
    silent_channels: list[int] = field(default_factory=list)
    saturated_channels: list[int] = field(default_factory=list)

    @property
    def units(self) -> int:
        n = 1
        for side in self.shape:
            n *= side
        return n


@dataclass
class Elementwise:
    """Additions, comparisons or multiplications outside products and neurons."""

    name: str
    op: str  # "residual add", "max pool", "average", "multiply", "norm"
    count: Count  # elementary operations
    stands_for: int = 1  # time steps that one execution of a still picture stands for


@dataclass
class Facts:
    """Everything counted on one model."""

    model: str
    samples: int
    time_steps: int
    parameters: int
    source: str  # "measured", "assumed rate 0.1", "rates file x.json", "shapes only"
    input_shape: tuple[int, ...] = ()
    products: list[Product] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    neurons: list[Neuron] = field(default_factory=list)
    elementwise: list[Elementwise] = field(default_factory=list)
    uncounted: dict[str, int] = field(default_factory=dict)  # operation -> elements, for operations without a record
    never_called: list[str] = field(default_factory=list)  # products and neurons that the input did not reach
    correct: int | None = None  # samples classified correctly

    @property
    def accuracy(self) -> float | None:
        return None if self.correct is None or not self.samples else self.correct / self.samples

    def per_sample(self, product: Product, count: Count, unrolled: bool = False) -> float:
        """A count of `product` per sample: a still picture's equal time steps count once, or T times if `unrolled`."""
        once = count / self.samples / product.copies
        return once * product.stands_for if unrolled else once

    def steps_of(self, product: Product) -> int:
        """Time steps that a product runs for, unrolled: T, or 1 after the mean over time."""
        if self.time_steps < 2:
            return 1
        runs = product.executions / self.samples / product.copies * product.stands_for
        return self.time_steps if runs >= self.time_steps and runs % self.time_steps == 0 else 1
