"""Counts what a model executes, at the level of torch's own operations.

Convolutions, linear layers and products of activations are seen where torch dispatches them, so a model's style
(modules, functional calls, one time step a call or all at once) does not matter, nor do names. Modules only tell where
an operation belongs. T: time steps, B: samples.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from spikingformer.layers import ConvBN, ConvBNLIF
from spikingformer.models import SpikingTransformer
from spikingformer.neurons import LIF, use_backend

from .facts import Facts, Kind
from .kinds import UNKNOWN, Origin, infer, tensors_in
from .records import AttentionTally, ElementwiseTally, NeuronTally, ProductTally, matmul_views
from .tally import Ledger, Stats

_POOLS = ("max_pool", "adaptive_max_pool")
_AVERAGES = ("mean", "avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d")
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, LIF)  # layers that a complete count has records of
_READ_BY_PARENT = nn.modules.linear.NonDynamicallyQuantizableLinear  # nn.MultiheadAttention reads its weight alone
_MATMULS = {"mm": (0, 1, None), "bmm": (0, 1, None), "addmm": (1, 2, 0), "baddbmm": (1, 2, 0), "mv": (0, 1, None)}
_UNCOUNTED = {"gelu", "sigmoid", "tanh", "silu", "exp", "erf", "pow", "sqrt", "rsqrt", "log", "softplus", "hardswish"}
_UNCOUNTED_PARTS = ("softmax", "layer_norm", "group_norm", "rms_norm", "attention", "lstm", "gru", "rnn", "_fft_")


class _Frame:
    """One module call in flight."""

    def __init__(self, name: str, module: nn.Module, input_kind: Kind | None, repeats: int):
        self.name, self.module, self.input_kind, self.repeats = name, module, input_kind, repeats
        self.elementwise_only = True
        self.pending: list[tuple[str, str, int, int]] = []  # (module, operation, count, time steps it stands for)
        self.uncounted: list[tuple[str, int]] = []
        self.neurons: list[tuple[str, nn.Module, Tensor]] = []


class OperationCounter(TorchDispatchMode):
    """Counts a model's operations over any number of batches.

        counter = OperationCounter(model)
        for pictures, labels in loader:
            counter.add(pictures, labels)
        facts = counter.finish()

    `time_steps`: T of the model. It is detected for this package's models, for input (B, T, C, H, W), and for models
    that fold T into the batch of their first convolution; only other models need it.
    """

    def __init__(self, model: nn.Module, time_steps: int | None = None, name: str = ""):
        super().__init__()
        self.model = model
        self.name = name or type(model).__name__
        self._given_steps = time_steps
        self._steps = time_steps or 1
        self._products: dict[tuple[str, str, int], ProductTally] = {}
        self._attentions: dict[str, AttentionTally] = {}
        self._neurons: dict[tuple[str, int], NeuronTally] = {}
        self._elementwise: dict[tuple[str, str], ElementwiseTally] = {}
        self._uncounted: dict[str, int] = {}
        self._ledger = Ledger()
        self._samples = 0
        self._correct: int | None = None
        self._input_shape: tuple[int, ...] = ()

    def add(self, x: Tensor, labels: Tensor | None = None, batch_size: int | None = None) -> Tensor:
        """Runs the model on a batch, in eval mode and without gradients, and counts; returns its output.

        `labels` (B,): counts how many are classified correctly. `batch_size`: samples in x, if its first axis is not
        the batch.

        Raises ValueError for anything but a tensor, an empty batch, and labels that are not one class number a sample.
        """
        model = self.model
        if not isinstance(x, Tensor):
            raise ValueError(f"expected a tensor of inputs, got {type(x).__name__}: convert it first")
        if labels is not None and getattr(labels, "ndim", None) != 1:
            got = f"shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(
                f"expected labels (B,), one class number a sample, got {got}: one-hot or soft targets become numbers "
                "by argmax(1)"
            )
        self._batch = batch_size or (len(labels) if labels is not None else len(x))
        if self._batch < 1:
            raise ValueError("got an empty batch: counting needs at least one sample")
        folded = len(x) if x.ndim > 2 and len(x) != self._batch == x.shape[1] else None
        self._steps = self._given_steps or _known_steps(model, x) or folded or self._steps
        self._input_shape = tuple(x.shape[1:])
        self._calls: dict[Any, int] = {}
        self._first_inputs: dict[str, Tensor] = {}
        self._cached: tuple[Tensor, Any, Stats] | None = None
        self._origins: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        for p in [*model.parameters(), *model.buffers()]:
            self._origins[p] = Origin(weight=True)
        self._origins[x] = Origin(Kind.ANALOG if x.is_meta else None, picture=True)
        root = _Frame("", model, None, 1)
        self._stack = [root]
        was_training = [m for m in model.modules() if m.training]
        model.eval()
        try:
            with ExitStack() as stack, torch.no_grad():
                stack.enter_context(_attention_in_parts())
                if x.is_meta:
                    stack.enter_context(use_backend("reference"))
                for name, module in model.named_modules():
                    stack.enter_context(module.register_forward_pre_hook(self._enter_hook(name), with_kwargs=True))
                    stack.enter_context(module.register_forward_hook(self._leave))
                stack.enter_context(self)
                output = model(x)
        finally:
            for m in was_training:
                m.training = True
            self._commit(root)
            self._origins.clear()
            self._cached = None
            self._first_inputs.clear()
        self._samples += self._batch
        if labels is not None:
            self._ledger.put((output.argmax(1) == labels).sum(), self._add_correct)
        self._ledger.settle()
        return output

    def finish(self) -> Facts:
        """The record of everything counted so far."""
        if not self._samples:
            raise ValueError("nothing has been counted yet: call add() with at least one batch")
        facts = Facts(
            model=self.name,
            samples=self._samples,
            time_steps=self._steps,
            parameters=sum(p.numel() for p in self.model.parameters()),
            source="measured",
            input_shape=self._input_shape,
            uncounted=dict(self._uncounted),
            correct=self._correct,
        )  # fmt: skip
        facts.products = ProductTally.records(list(self._products.values()))
        if self._given_steps is None and _known_time(self.model) is None:  # one call a time step
            calls = [p.executions // p.copies * p.stands_for // self._samples for p in facts.products if p.kernel]
            facts.time_steps = max([self._steps, *calls])
        facts.attentions = [t.record() for t in self._attentions.values()]
        facts.neurons = NeuronTally.records(list(self._neurons.values()))
        facts.elementwise = [t.record() for t in self._elementwise.values()]
        seen = {t.name for t in self._products.values()} | {t.name for t in self._neurons.values()}
        for n, m in self.model.named_modules():
            parent = n.rpartition(".")[0]
            if n and isinstance(m, _LAYERS) and n not in seen:
                if type(m) is _READ_BY_PARENT and any(s == parent or s.startswith(f"{parent}.") for s in seen):
                    continue
                facts.never_called.append(n)
        return facts

    def _add_correct(self, values: list[int]) -> None:
        self._correct = (self._correct or 0) + values[0]

    # modules in flight

    def _enter_hook(self, name: str) -> Any:
        def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
            inputs = tensors_in(args) or tensors_in(kwargs.values())
            repeats = self._stack[-1].repeats
            if isinstance(module, (ConvBN, ConvBNLIF)):
                at = 1 if isinstance(module, ConvBN) else 2
                repeats = kwargs.get("repeats", args[at] if len(args) > at else 1)
            kind = self._origins.get(inputs[0], UNKNOWN).kind if inputs else None
            self._stack.append(_Frame(name, module, kind, repeats))

        return enter

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        frame, parent = self._stack.pop(), self._stack[-1]
        assert frame.module is module, "a module was left without its forward hook"
        found = tensors_in([output] if isinstance(output, Tensor) else output if isinstance(output, tuple) else [])
        result = found[0] if found else None
        known = isinstance(module, LIF)
        if result is not None and known:
            self._origins[result] = Origin(Kind.BINARY)
        if result is not None and frame.elementwise_only and not isinstance(module, (nn.Sequential, nn.ModuleList)):
            made = self._origins.get(result, UNKNOWN).kind
            if (made in (Kind.BINARY, None) and frame.input_kind != Kind.BINARY and result.is_floating_point()
                    and result is not (args[0] if args else None)):  # fmt: skip
                frame.neurons = [(frame.name, module, result)]
                frame.pending, frame.uncounted = [], []
        parent.elementwise_only &= frame.elementwise_only
        parent.pending += frame.pending
        parent.uncounted += frame.uncounted
        parent.neurons += frame.neurons

    def _commit(self, root: _Frame) -> None:
        for name, op, count, stands_for in root.pending:
            elementwise = self._elementwise.setdefault((name, op), ElementwiseTally(name or self.name, op))
            elementwise.count += count
            elementwise.stands_for = stands_for
        for op, count in root.uncounted:
            self._uncounted[op] = self._uncounted.get(op, 0) + count
        for name, module, result in root.neurons:
            call = self._next_call(("neuron", name))
            tally = self._neurons.setdefault((name, call), NeuronTally(name, type(module).__name__))
            tally.add(result, self._origins.get(result, UNKNOWN).kind, self._steps, self._batch, self._ledger)

    def _next_call(self, key: Any) -> int:
        self._calls[key] = self._calls.get(key, -1) + 1
        return self._calls[key]

    # operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        composite = torch._C.DispatchKey.CompositeImplicitAutograd
        if func.namespace == "aten" and func.has_kernel_for_dispatch_key(composite):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        out = func(*args, **kwargs)
        tensors = tensors_in([*args, *kwargs.values()])
        origins = [self._origins.get(t, UNKNOWN) for t in tensors]
        plain = name[:-1] if name.endswith("_") and not name.endswith("__") else name
        origin = infer(plain, func, args, origins)
        origin = self._observe(plain, args, tensors, origins, out, origin)
        for t in tensors_in([out] if isinstance(out, Tensor) else out if isinstance(out, (tuple, list)) else []):
            self._origins[t] = origin
        return out

    def _observe(self, name: str, args: Any, tensors: list, origins: list, out: Any, origin: Origin) -> Origin:
        """Records one operation; returns the origin of its result."""
        frame = self._stack[-1]
        if name == "convolution":
            return self._convolution(frame, args, out)
        if name in _MATMULS:
            left, right, bias = _MATMULS[name]
            return self._matmul(frame, args[left], args[right], args[bias] if bias is not None else None, out, origin)
        moving = [o for o in origins if not o.weight]
        if not moving or not tensors or not isinstance(out, (Tensor, tuple)):
            return origin
        result = out if isinstance(out, Tensor) else out[0]
        if "batch_norm" in name:
            frame.elementwise_only = False
            if origins[0].product is not None and origins[0].product.weighted:
                origins[0].product.folded_norm = True
            else:
                frame.pending.append((frame.name, "norm", tensors[0].numel(), 1))
        elif name.startswith(_POOLS):
            frame.elementwise_only = False
            window = args[1] if isinstance(args[1], (list, tuple)) else [args[1]]
            size = 1
            for side in window if len(window) > 1 else list(window) * 2:
                size *= side
            stands_for = frame.repeats if origins[0].kind == Kind.ANALOG else 1  # spikes differ from step to step
            frame.pending.append((frame.name, "max pool", result.numel() * (size - 1), stands_for))
        elif name in _AVERAGES:
            frame.pending.append((frame.name, "average", max(tensors[0].numel() - result.numel(), 0), 1))
        elif name == "add" and len(moving) == 1 and len(tensors) == 2 and _is_bias_of(moving[0], origins, tensors):
            moving[0].product.add_bias(next(t for t, o in zip(tensors, origins, strict=True) if o.weight))
            return moving[0]  # a linear layer that torch split into a product and its bias
        elif name in ("add", "sub") and len(tensors) == 2:
            frame.pending.append((frame.name, "residual add" if len(moving) == 2 else "add", result.numel(), 1))
        elif name == "mul" and len(tensors) == 2:
            frame.pending.append((frame.name, "multiply", result.numel(), 1))
        elif name in _UNCOUNTED or any(part in name for part in _UNCOUNTED_PARTS):
            frame.uncounted.append((name, result.numel()))
        return origin

    def _product(self, frame: _Frame, op: str) -> ProductTally:
        key = (frame.name, op, self._next_call((frame.name, op)))
        frame.elementwise_only = False
        if key not in self._products:
            path = frame.name or self.name
            self._products[key] = ProductTally(path, type(frame.module).__name__, op, key[2])
        return self._products[key]

    def _stats(self, x: Tensor, steps: int, spatial: int) -> Stats:
        key = (x.data_ptr() if not x.is_meta else id(x), x.shape, x.stride(), x._version, steps, spatial)
        if self._cached is None or self._cached[1] != key:
            self._cached = (x, key, Stats(x, steps, spatial))  # holding x keeps its address its own
        return self._cached[2]

    def _convolution(self, frame: _Frame, args: Any, out: Tensor) -> Origin:
        x, weight, bias = args[:3]
        origin = self._origins.get(x, UNKNOWN)
        tally = self._product(frame, f"conv{'_transpose' if args[6] else ''}{weight.ndim - 2}d")
        runs = len(x) if x.ndim == weight.ndim else 1
        steps = runs // self._batch if runs % self._batch == 0 else 1
        if self._given_steps is None and steps > self._steps:
            self._steps = steps
        tally.start_convolution(x, weight, bias, args, out, frame.repeats)
        stats = self._stats(x, steps, weight.ndim - 2)
        tally.add_weighted(stats, origin.kind, runs, out.numel(), self._ledger, x)
        if origin.picture and frame.repeats == 1 and not x.is_meta:
            if steps > 1:
                y = x.unflatten(0, (steps, -1))
                self._ledger.put((y != y[:1]).sum(), tally.saw_differences)
            elif tally.call == 0:
                self._first_inputs[frame.name] = x
            elif (first := self._first_inputs.get(frame.name)) is not None and first.shape == x.shape:
                self._ledger.put((first != x).sum(), tally.saw_differences)
        return Origin(Kind.ANALOG, product=tally)

    def _matmul(self, frame: _Frame, a: Tensor, b: Tensor, bias: Any, out: Tensor, origin: Origin) -> Origin:
        left, right = self._origins.get(a, UNKNOWN), self._origins.get(b, UNKNOWN)
        if left.weight and right.weight:
            return origin
        bias_is_weight = isinstance(bias, Tensor) and self._origins.get(bias, UNKNOWN).weight
        if left.weight or right.weight:
            tally = self._product(frame, "linear")
            act, weight, act_origin = (b, a, right) if left.weight else (a, b, left)
            rows = act.transpose(-1, -2) if left.weight and act.ndim > 1 else act
            rows = rows.flatten(0, -2) if rows.ndim > 1 else rows[None]
            runs = len(rows)
            steps = self._steps if runs % (self._steps * self._batch) == 0 else 1
            tally.start_linear(rows, weight, left.weight, bias_is_weight)
            stats = self._stats(rows, steps, 0)
            tally.add_weighted(stats, act_origin.kind, runs, out.numel(), self._ledger, rows)
            return Origin(Kind.ANALOG, product=tally)
        tally = self._product(frame, "matmul")
        x, y = matmul_views(a, b)
        steps = self._steps if len(x) % (self._steps * self._batch) == 0 else 1
        tally.add_activations(x, y, left.kind, right.kind, steps, out.numel(), self._ledger)
        tally.sides = (x, y, left.kind, right.kind)
        self._join_attention(frame, tally, left, right)
        origin.product = tally
        return origin

    def _join_attention(self, frame: _Frame, second: ProductTally, left: Origin, right: Origin) -> None:
        """Recognises (q k^T) v and q (k^T v) by one product of activations flowing into the next."""
        first = next((o.product for o in (left, right) if o.product is not None and not o.product.weighted), None)
        if first is None or first.sides is None or second.sides is None:
            return
        order = "qk" if left.product is first else "kv"
        (a, b, ka, kb), (c, d, kc, kd) = first.sides, second.sides
        q, k, v = ((a, ka), (b, kb), (d, kd)) if order == "qk" else ((c, kc), (a, ka), (b, kb))
        first.role, second.role = ("qk", "qk_v") if order == "qk" else ("kv", "q_kv")
        tokens, head_dim = q[0].shape[-2:]
        tally = self._attentions.setdefault(
            frame.name, AttentionTally(frame.name or self.name, order, tokens, head_dim)
        )
        steps = self._steps if len(a) % (self._steps * self._batch) == 0 else 1
        tally.add(len(a), [q, k, v], steps, self._ledger)
        first.sides = second.sides = None


@contextmanager
def _attention_in_parts() -> Iterator[None]:
    """Lets torch's own attention run as products and a softmax, which can be counted, not as one fused operation."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _is_bias_of(made: Origin, origins: list[Origin], tensors: list[Tensor]) -> bool:
    weight = next(t for t, o in zip(tensors, origins, strict=True) if o.weight)
    return made.product is not None and made.product.op == "linear" and weight.numel() == made.product.out_shape[0]


def _known_time(model: nn.Module) -> int | None:
    return model.time_steps if isinstance(model, SpikingTransformer) else None


def _known_steps(model: nn.Module, x: Tensor) -> int | None:
    return x.shape[1] if isinstance(model, SpikingTransformer) and x.ndim == 5 else _known_time(model)


def count_operations(
    model: nn.Module, batches: Iterable[Tensor | tuple[Tensor, Tensor]], time_steps: int | None = None, name: str = ""
) -> Facts:
    """Counts a model over batches of inputs, or of (inputs, labels) for the accuracy. See `OperationCounter`.

    Raises ValueError for a batch that is neither, and as `OperationCounter.add` does.
    """
    counter = OperationCounter(model, time_steps, name)
    for batch in batches:
        if isinstance(batch, Tensor):
            counter.add(batch)
        elif isinstance(batch, (tuple, list)) and len(batch) >= 2:
            counter.add(batch[0], batch[1])
        else:
            raise ValueError(
                f"expected batches that are a tensor of inputs or a pair (inputs, labels), got {type(batch).__name__}: "
                "take these out of it, or call OperationCounter.add yourself"
            )
    return counter.finish()
