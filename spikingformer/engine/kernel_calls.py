"""A program's kernels, for inputs of one shape after another: their weights, their buffers and their calls."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spikingformer.native.library import kernel
from spikingformer.native.neuron_op import neuron_args, neuron_constants
from spikingformer.native.stem_op import STEM_FORWARD
from spikingformer.neurons import LIFConfig

from .fixed_point import FRACTION_BITS, input_bits, quantize_input, quantize_neuron, quantize_scale
from .packing import PackedProduct, ProductArgs, pack_product
from .program import AddBits, Attention, Fire, Product, Program, Step

_MOST_PLANS = 32

_Call = tuple[Callable[..., None], tuple]  # a kernel and its arguments


@dataclass
class _Plan:
    """The calls for inputs of one shape, to be made again as they are.

    At batch 1 the Python that works them out takes several percent of a run.
    """

    calls: list[_Call]  # the first one reads pictures, the last one writes logits: these two addresses are left out
    kept: list[Any]  # what the arguments point to


def _words(channels: int) -> int:
    return (channels + 63) // 64


class KernelCalls:
    """Runs a program on the compiled kernels, one input at a time: the runs share buffers.

    integer: int8 weights and fixed-point neurons, else float32. A copy has buffers of its own.
    Raises ValueError for a Spikformer of more than 126 blocks: counts are bytes.
    """

    def __init__(self, program: Program, integer: bool):
        self.program = program
        self.integer = integer
        self._packed = {}
        added = 1  # how often spikes were added to the counts: their largest value
        for step in program.steps:
            if isinstance(step, AddBits):
                added = 1 if step.replace else added + 1
                if added > 255:
                    depth = sum(isinstance(step, Attention) for step in program.steps)
                    raise ValueError(
                        "the engine counts up to 255 spikes in the residual, a Spikformer of 126 blocks; got "
                        f"{depth} blocks: call the model itself"
                    )
            elif isinstance(step, Product):
                max_count = added if step.source == "counts" else 1
                self._packed[step.name] = pack_product(step, max_count, integer, input_bits(program))
        # Copies: in double precision they may be the model's own, at any strides
        self._head_weight = program.head_weight.T.clone(memory_format=torch.contiguous_format)
        self._head_bias = program.head_bias.clone(memory_format=torch.contiguous_format)
        self.classes = len(self._head_bias)
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._odd = False  # which of two buffers took the last spikes
        self._plans: dict[tuple, _Plan] = {}  # by shape; they point into the buffers
        self._made: _Plan | None = None  # under way

    def __getstate__(self) -> dict[str, Any]:
        """A copy has buffers of its own, and calls that point into them."""
        return {**self.__dict__, "_buffers": {}, "_plans": {}, "_made": None}

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

    def run(self, x: Tensor, steps: int) -> Tensor:
        """Pictures (B, C, H, W) or event frames (B, T, C, H, W) to logits after each step, (T, B, num_classes)."""
        pictures = self._pictures(x)
        logits = torch.empty(steps, len(x), self.classes, dtype=torch.float32, device="cpu")
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
