"""Runs a program on the compiled kernels, all spikes as bits: in float32, or with int8 weights."""

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from spikingformer.native import status
from spikingformer.native.library import current_isa, kernel
from spikingformer.native.neuron_op import neuron_args, neuron_constants
from spikingformer.native.stem_op import STEM_FORWARD
from spikingformer.neurons import LIFConfig

from .fixed_point import (
    FRACTION_BITS,
    input_bits,
    quantize_input,
    quantize_neuron,
    quantize_scale,
)
from .int8_reference import HIGHEST
from .packing import PackedProduct, ProductArgs, pack_product
from .program import AddBits, Attention, Fire, Product, Program, Step, build_program

FORMS = ("float32", "int8")
_MOST_PLANS = 32
CACHE_BYTES = 26 << 20  # slices of the batch are cut so that their widest currents stay about this small


_Call = tuple[Callable[..., None], tuple]  # a kernel and its arguments


@dataclass
class _Plan:
    """The calls for inputs of one shape, to be made again as they are.

    At batch 1 the Python that works them out takes several percent of a run.
    """

    calls: list[_Call]  # the first one reads pictures, the last one writes logits: these two addresses are left out
    kept: list[Any]  # what the arguments point to


def _saturates_unseen(step: Attention) -> bool:
    """Whether counts q (k^T v) may stop at HIGHEST: any that large fires the neuron, and a hard reset forgets it."""
    n = step.lif
    largest = HIGHEST * step.scale / (n.tau if n.decay_input else 1)
    return n.v_reset is not None and largest > 2 * (n.v_threshold - n.v_reset)  # twice: rounding decides nothing


def _words(channels: int) -> int:
    return (channels + 63) // 64


class Engine:
    """A model made ready for inference on this processor; a later change of the model does not reach it.

    `form`: "float32" (the model's own numbers up to rounding; sums are exact, whatever the batch) or "int8"
    (int8 weights, fixed-point neurons; equal to `int8_reference.run` bit for bit). Called like the model: pictures
    (B, C, H, W) or event frames (B, T, C, H, W) to logits (B, num_classes), float32. No gradients.

    Threads may share an engine: its buffers serve one call at a time, so calls take turns. A copy (`copy.deepcopy`,
    pickle) has buffers of its own and runs beside the original.

    Raises ValueError for a model not of this package, a Spikformer of more than 126 blocks (counts are bytes), neurons
    or an attention scale that the int8 form does not have, and where the C++ kernels are missing.
    """

    def __init__(self, model: nn.Module | Program, form: str = "float32"):
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
        if not (found := status()).available:
            raise ValueError(f"the engine needs the compiled kernels: {found.reason}")
        self.program = model if isinstance(model, Program) else build_program(model)
        self.form = form
        self.integer = form == "int8"
        self._isa = current_isa()
        self._packed = {}
        added = 1  # how often spikes were added to the counts: their largest value
        for step in self.program.steps:
            if isinstance(step, AddBits):
                added = 1 if step.replace else added + 1
                if added > 255:
                    depth = sum(isinstance(step, Attention) for step in self.program.steps)
                    raise ValueError(
                        "the engine counts up to 255 spikes in the residual, a Spikformer of 126 blocks; got "
                        f"{depth} blocks: call the model itself"
                    )
            elif isinstance(step, Product):
                max_count = added if step.source == "counts" else 1
                self._packed[step.name] = pack_product(step, max_count, self.integer, input_bits(self.program))
        if self.integer:
            for step in self.program.steps:  # refuse at once, not in the middle of a run
                if isinstance(step, Fire | Attention):
                    quantize_neuron(step.lif)
                if isinstance(step, Attention):
                    quantize_scale(step.scale)
        # The widest head in which no count may saturate, 0 where all may: the int8 form is defined to saturate.
        exact = (
            s for s in self.program.steps if isinstance(s, Attention) and not self.integer and not _saturates_unseen(s)
        )
        self._exact_head_width = max((self.program.config.embed_dim // s.heads for s in exact), default=0)
        # Copies: in double precision they may be the model's own, at any strides
        self._head_weight = self.program.head_weight.T.clone(memory_format=torch.contiguous_format)
        self._head_bias = self.program.head_bias.clone(memory_format=torch.contiguous_format)
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._odd = False  # which of two buffers took the last spikes
        self._plans: dict[tuple, _Plan] = {}  # by shape; they point into the buffers
        self._made: _Plan | None = None  # under way
        self._lock = threading.Lock()  # held by the call that uses the buffers: the kernels run without Python's lock

    def __getstate__(self) -> dict[str, Any]:
        """A copy has buffers of its own, calls that point into them, and its own lock."""
        state = {**self.__dict__, "_buffers": {}, "_plans": {}, "_made": None}
        del state["_lock"]  # cannot be copied
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def drop_weights(self) -> None:
        """Forgets the program's weights in double precision: the packed ones are all that a run needs."""
        none = torch.empty(0, device="cpu")
        steps = (replace(s, weight=none, bias=none) if isinstance(s, Product) else s for s in self.program.steps)
        self.program = replace(self.program, steps=tuple(steps), head_weight=none, head_bias=none)

    def _buffer(self, name: str, size: int, dtype: torch.dtype) -> Tensor:
        kept = self._buffers.get((name, dtype))
        if kept is None or len(kept) < size:
            self._plans.clear()
            self._made = None
            kept = self._buffers[name, dtype] = torch.empty(size, dtype=dtype, device="cpu")
        return kept[:size]

    def _call(self, name: str, signature: str, *args: Any, keep: Any = None, first: Any = None) -> None:
        """Calls a kernel, and notes the call for the next time.

        `keep`: what an address in `args` belongs to. `first`: a first argument that is another one the next time.
        """
        function = kernel(name, signature)
        if self._made is not None:
            self._made.calls.append((function, args))
            self._made.kept.append(keep)
        function(*args if first is None else (first, *args))

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward_steps(x)[-1]

    def forward_steps(self, x: Tensor) -> Tensor:
        """Logits after each time step, (T, B, num_classes), float32. Waits while another thread's call is running."""
        with self._lock:
            return self._forward_steps(x)

    def forward_steps_if_free(self, x: Tensor) -> Tensor | None:
        """`forward_steps`; None at once while another thread's call is running, and for more tokens than it takes."""
        if self._has_too_many_tokens(x) or not self._lock.acquire(blocking=False):
            return None
        try:
            return self._forward_steps(x)
        finally:
            self._lock.release()

    def _tokens(self, x: Tensor) -> int:
        return x.shape[-2] * x.shape[-1] // self.program.config.patch_size**2

    def _has_too_many_tokens(self, x: Tensor) -> bool:
        return self._tokens(x) * self._exact_head_width > HIGHEST

    def _forward_steps(self, x: Tensor) -> Tensor:
        c = self.program.config
        if not isinstance(x, Tensor):
            raise ValueError(
                f"expected a torch tensor, got {type(x).__name__}: convert it, for example with "
                "torch.from_numpy(x).float()"
            )
        if x.ndim not in (4, 5) or x.shape[-3] != c.in_chans:
            raise ValueError(
                f"expected pictures (B, {c.in_chans}, H, W) or event frames (B, T, {c.in_chans}, H, W), got "
                f"{tuple(x.shape)}"
            )
        c.check_size(x.shape[-2], x.shape[-1])
        if self._has_too_many_tokens(x):
            raise ValueError(
                f"with this attention scale and neuron, the float32 engine takes spike counts up to {HIGHEST} in "
                f"attention, got an input of {self._tokens(x)} tokens and heads of width {self._exact_head_width}: "
                "give smaller pictures, or call the model itself"
            )
        if x.device.type != "cpu":
            raise ValueError(f"the engine runs on the CPU, got an input on {x.device}: give x.cpu()")
        if current_isa() != self._isa:
            raise RuntimeError(f"this engine was packed for {self._isa}, in use is {current_isa()}: make a new one")
        steps = c.time_steps if x.ndim == 4 else x.shape[1]
        if steps < 1:
            raise ValueError("event frames need at least one time step, got none")
        if not len(x):
            return torch.empty(steps, 0, len(self._head_bias), dtype=torch.float32, device="cpu")
        largest = self._slice(x, steps)
        if len(x) <= largest:
            return self._run(x, steps)
        return torch.cat([self._run(part, steps) for part in x.split(largest)], 1)

    def _slice(self, x: Tensor, steps: int) -> int:
        """Samples at a time, in equal slices whose layers stay in the last cache between their steps."""
        widest = steps * x.shape[-2] * x.shape[-1] * self.program.config.embed_dim // 4 * (2 if self.integer else 4)
        slices = -(-len(x) * widest // CACHE_BYTES)
        return -(-len(x) // max(slices, 1))

    def _run(self, x: Tensor, steps: int) -> Tensor:
        pictures = self._pictures(x)
        logits = torch.empty(steps, len(x), len(self._head_bias), dtype=torch.float32, device="cpu")
        threads = torch.get_num_threads()
        key = (x.shape, pictures.stride(), steps, threads)
        if (plan := self._plans.get(key)) is None:
            plan = self._first_run(pictures, x.shape, logits, steps, threads)
            if self._made is not None:  # no buffer had to grow meanwhile
                if len(self._plans) == _MOST_PLANS:
                    self._plans.clear()
                self._plans[key] = plan
        else:
            (stem, stem_args), *calls, (head, head_args) = plan.calls
            stem(pictures.data_ptr(), *stem_args)
            for function, args in calls:
                function(*args)
            head(logits.data_ptr(), *head_args)
        return logits

    def _pictures(self, x: Tensor) -> Tensor:
        """Pictures, or the event frames of all steps one after another, (N, C, H, W), float32."""
        images = x.detach() if x.ndim == 4 else x.detach().transpose(0, 1).flatten(0, 1)
        if self.integer and images.dtype == torch.float64:  # rounded once, not twice
            bits = input_bits(self.program)
            return quantize_input(images, bits).float() / 2**bits
        return images.float().resolve_neg()

    def _first_run(self, pictures: Tensor, of: torch.Size, logits: Tensor, steps: int, threads: int) -> _Plan:
        """Runs the program on `pictures`, made from an input of shape `of`, and notes the calls."""
        self._made = plan = _Plan([], [])
        self._odd = False
        batch, (height, width) = of[0], of[-2:]
        channels, repeated = of[-3], len(of) == 4
        element = torch.int16 if self.integer else torch.float32
        current = self._buffer("none", 1, element)
        bits = stream = self._buffer("none", 1, element)
        counts = self._buffer("none", 1, torch.uint8)
        added = 0  # how often spikes were added to the counts: their largest value
        fired: Fire | None = None  # the neurons that the last product's call has fired already
        program = self.program.steps
        for step, after in zip(program, (*program[1:], None), strict=True):
            tokens = steps * batch * height * width
            if isinstance(step, Product) and step.source == "picture":
                channels = self._packed[step.name].outputs
                current = self._stem(pictures, self._packed[step.name], threads)
            elif isinstance(step, Product):
                p = self._packed[step.name]
                channels = p.outputs
                out = stream if step.into == "add" else self._buffer(step.into, tokens * p.outputs, element)
                args = ProductArgs(
                    (counts if step.source == "counts" else bits).data_ptr(), p.weight.data_ptr(),
                    None if p.scale is None else p.scale.data_ptr(), p.bias.data_ptr(), out.data_ptr(), steps * batch,
                    height, width, p.channels, p.outputs, p.taps, step.source == "counts", step.into == "add",
                    max(added, 1), threads, None if p.rows is None else p.rows.data_ptr(),
                )  # fmt: skip
                fired = _neurons_of(step, after)
                if fired is not None:
                    bits = self._product_fire(args, fired, steps, step.into != "current")
                else:
                    name = "engine_product_i8" if self.integer else "engine_product_f32"
                    self._call(name, "p", ctypes.addressof(args), keep=args)
                if step.into == "current":
                    current = out
                else:
                    stream = out
            elif isinstance(step, Fire):
                source = stream if step.source == "stream" else current
                shape = (steps, batch, height, width, channels)
                if step is not fired:
                    bits = self._fire(step, source, repeated, *shape, threads)
                if step.pool == "sps":
                    bits = self._pool(bits, *shape, threads)
                if step.pool:
                    height, width = -(-height // 2), -(-width // 2)
                repeated = False
            elif isinstance(step, Attention):
                channels //= 3
                out = self._buffer("attention", tokens * _words(channels), torch.int64)
                self._attention(step, bits, out, steps, batch, height * width, channels, threads)
                bits = out
            else:
                assert isinstance(step, AddBits)
                counts = self._buffer("counts", tokens * channels, torch.uint8)
                self._call(
                    "engine_add_bits", "pllipi",
                    bits.data_ptr(), tokens, channels, int(step.replace), counts.data_ptr(), threads,
                )  # fmt: skip
                added = 1 if step.replace else added + 1
        self._head(logits, counts if self.program.counts else stream, height * width, threads)
        return plan

    def _bits(self, size: int) -> Tensor:
        """A buffer of spikes that is not the last one: a product may still read that."""
        self._odd = not self._odd
        return self._buffer(f"bits {self._odd}", size, torch.int64)

    def _product_fire(self, args: ProductArgs, fire: Fire, steps: int, keep_currents: bool) -> Tensor:
        """The spikes of neurons on a product's currents, in one call."""
        out = self._bits(args.images * args.height * args.width * _words(args.outputs))
        shape = (ctypes.addressof(args), steps, int(keep_currents))
        if self.integer:
            n = quantize_neuron(fire.lif)
            self._call(
                "engine_product_fire_i8", "pliiiip", *shape, n.keep, n.take, n.threshold, out.data_ptr(), keep=args
            )
        else:
            neuron = _float_neuron(steps, fire.lif)
            self._call(
                "engine_product_fire_f32",
                "plipp",
                *shape,
                ctypes.addressof(neuron),
                out.data_ptr(),
                keep=(args, neuron),
            )
        return out

    def _stem(self, pictures: Tensor, p: PackedProduct, threads: int) -> Tensor:
        n, c, h, w = pictures.shape
        out = self._buffer("current", n * h * w * p.outputs, torch.int16 if self.integer else torch.float32)
        if not self.integer:
            self._call(
                "stem_forward", STEM_FORWARD,
                *pictures.stride(), p.weight.data_ptr(), p.bias.data_ptr(), out.data_ptr(), n, h, w, c, p.outputs,
                threads, first=pictures.data_ptr(),
            )  # fmt: skip
        else:
            assert p.scale is not None
            self._call(
                "engine_integer_stem", "pllllfpppllllllpi",
                *pictures.stride(), 2.0 ** input_bits(self.program), p.weight.data_ptr(), p.scale.data_ptr(),
                p.bias.data_ptr(), n, h, w, c, p.outputs, p.weight.shape[2], out.data_ptr(), threads,
                first=pictures.data_ptr(),
            )  # fmt: skip
        return out

    def _fire(
        self,
        step: Fire,
        source: Tensor,
        repeated: bool,
        steps: int,
        batch: int,
        height: int,
        width: int,
        channels: int,
        threads: int,
    ) -> Tensor:
        pool = step.pool == "cml"
        rows, columns = (-(-height // 2), -(-width // 2)) if pool else (height, width)
        words = _words(channels)
        out = self._bits(steps * batch * rows * columns * words)
        shape = (int(repeated), steps, batch, height, width, channels, int(pool))
        if self.integer:
            n = quantize_neuron(step.lif)
            self._call(
                "engine_fire_i16", "pillllliiiipi",
                source.data_ptr(), *shape, n.keep, n.take, n.threshold, out.data_ptr(), threads,
            )  # fmt: skip
        else:
            neuron = _float_neuron(steps, step.lif)
            self._call(
                "engine_fire_f32", "pilllllippi",
                source.data_ptr(), *shape, ctypes.addressof(neuron), out.data_ptr(), threads, keep=neuron,
            )  # fmt: skip
        return out

    def _pool(
        self, bits: Tensor, steps: int, batch: int, height: int, width: int, channels: int, threads: int
    ) -> Tensor:
        words = _words(channels)
        pooled = self._bits(steps * batch * -(-height // 2) * -(-width // 2) * words)
        self._call(
            "engine_pool_bits",
            "pllllpi",
            bits.data_ptr(),
            steps * batch,
            height,
            width,
            words,
            pooled.data_ptr(),
            threads,
        )
        return pooled

    def _attention(
        self,
        step: Attention,
        qkv: Tensor,
        out: Tensor,
        steps: int,
        batch: int,
        tokens: int,
        channels: int,
        threads: int,
    ) -> None:
        shape = (steps, batch, tokens, channels, step.heads)
        if self.integer:
            n = quantize_neuron(step.lif)
            scale = quantize_scale(step.scale)
            self._call(
                "engine_attention_i16", "pllllliiiipi",
                qkv.data_ptr(), *shape, scale, n.keep, n.take, n.threshold, out.data_ptr(), threads,
            )  # fmt: skip
        else:
            neuron = _float_neuron(steps, step.lif)
            self._call(
                "engine_attention_f32", "plllllfppi",
                qkv.data_ptr(), *shape, step.scale, ctypes.addressof(neuron), out.data_ptr(), threads, keep=neuron,
            )  # fmt: skip

    def _head(self, logits: Tensor, stream: Tensor, tokens: int, threads: int) -> None:
        steps, batch, classes = logits.shape
        name = {torch.float32: "f32", torch.int16: "i16", torch.uint8: "u8"}[stream.dtype]
        unit = 2.0**-FRACTION_BITS if self.integer and not self.program.counts else 1.0
        self._call(
            f"engine_head_{name}", "ppdllllppli",
            stream.data_ptr(), unit, steps, batch, tokens, self.program.config.embed_dim, self._head_weight.data_ptr(),
            self._head_bias.data_ptr(), classes, threads, first=logits.data_ptr(),
        )  # fmt: skip


def _neurons_of(product: Product, after: Step | None) -> Fire | None:
    """The neurons that one call with the product fires: those that read its currents, without pooling first."""
    source = "current" if product.into == "current" else "stream"
    return after if isinstance(after, Fire) and after.source == source and after.pool != "cml" else None


def _float_neuron(steps: int, config: LIFConfig) -> ctypes.Structure:
    return neuron_args(steps, *neuron_constants(config))
