"""Whole-model inference on the CPU: spikes are bits between all layers, buffers are allocated once per input shape.

    engine = Engine(model)                      # float32, BatchNorm folded; or Engine(model, "int8")
    logits = engine(pictures)                   # (B, C, H, W) or (B, T, C, H, W), as the model takes them

T: time steps, B: batch, C, O: channels in and out, H, W: rows and columns.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import int8_reference as integer
from .folding import AttentionSpec, NeuronSpec, Product, plan_of
from .library import available_isas, current_isa, kernel, status, threads

PRECISIONS = ("fp32", "int8")
_VECTOR_BYTES = {"avx512": 64, "avx2": 32, "portable": 16, "neon": 16}
_MAX_VECTORS = 12  # sums that stay in registers
_MAX_VECTORS_INT8_CONV = 192  # outputs of a tile whose nine taps of int8 weights fit a 1 MB L2


class EngineArgs(ctypes.Structure):
    """`EngineArgs` of src/engine.cpp."""

    _fields_ = [  # noqa: RUF012  (ctypes wants a plain list)
        *[(n, ctypes.c_int64) for n in (
            "steps", "batch", "height", "width", "channels", "outputs", "taps", "tile_width")],
        *[(n, ctypes.c_int32) for n in ("pool", "stream_mode", "threads", "input_steps")],
        ("tau", ctypes.c_float), ("threshold", ctypes.c_float), ("keep", ctypes.c_int32),
        ("integer_threshold", ctypes.c_int32),
    ]  # fmt: skip


def _tile_width(outputs: int, isa: str, int8: bool, kernel_size: int) -> int:
    lanes = _VECTOR_BYTES[isa] // (2 if int8 else 4)
    most = _MAX_VECTORS
    if int8 and kernel_size == 3:
        most = min(most, max(1, _MAX_VECTORS_INT8_CONV // lanes))
    vectors = -(-outputs // lanes)
    tiles = -(-vectors // most)
    return -(-vectors // tiles) * lanes


def _tiled(weight: Tensor, width: int) -> Tensor:
    """(O, C, k, k) -> [tile][tap][C][tile width], zeros past the last output."""
    o, c, k, _ = weight.shape
    tiles = -(-o // width)
    padded = weight.new_zeros(tiles * width, c, k * k)
    padded[:o] = weight.reshape(o, c, k * k)
    return padded.unflatten(0, (tiles, width)).permute(0, 3, 2, 1).contiguous()


def _padded(values: Tensor, size: int) -> Tensor:
    out = values.new_zeros(size)
    out[: len(values)] = values
    return out


@dataclass
class _Layer:
    """A product ready to run: weights in the kernels' layout for one instruction set."""

    spec: Product
    weights: Tensor
    channels: tuple[Tensor, ...]  # fp32: bias; int8: multiplier, shift, bias
    tile_width: int


@dataclass
class _Program:
    """Calls and buffers for one input shape."""

    calls: list[Callable[[], None]]
    source: Tensor  # the input goes here, (t, B, H, W, C)
    sums: Tensor  # (B, C): what the head reads
    divisor: float
    buffers: list[Any]
    spikes: list[tuple[Tensor, int]]  # bits of every layer and how many of them are real


class Engine:
    """Runs an eval model of the spikingformer family on bits.

    model: in eval mode; its weights are copied, so later training does not reach the engine.
    precision: "fp32" computes what the model computes, up to the order of float sums; "int8" has int8 weights and
    fixed-point neurons and is defined by `int8_reference`.

    Raises ValueError for another precision, another family, a neuron that is not the published kind or more than seven
    input channels with int8, and RuntimeError where the compiled kernels are not available.
    """

    def __init__(self, model: Any, precision: str = "fp32"):
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        if not available_isas():
            raise RuntimeError(f"the engine needs the compiled kernels: {status().reason}")
        self.plan = plan_of(model)
        self.precision = precision
        if precision == "int8" and self.plan.in_chans > 7:
            raise ValueError(f"int8 takes at most 7 input channels, got {self.plan.in_chans}: use fp32")
        self.isa = current_isa()
        self._layers = [
            layer if isinstance(layer, AttentionSpec) else self._prepare(layer, stem=i == 0)
            for i, layer in enumerate(self.plan.layers)
        ]
        self._programs: dict[tuple[int, ...], _Program] = {}

    def _prepare(self, spec: Product, stem: bool) -> _Layer:
        o, _, k, _ = spec.weight.shape
        lanes = _VECTOR_BYTES[self.isa] // 4
        int8 = self.precision == "int8"
        width = -(-o // lanes) * lanes if stem else _tile_width(o, self.isa, int8, k)
        padded = -(-o // width) * width
        if not int8:
            return _Layer(spec, _tiled(spec.weight.float(), width), (_padded(spec.bias.float(), padded),), width)
        q = integer.quantise(spec, stem)
        shift = _padded(q.shift, padded).clamp_min(1)
        channels = (_padded(q.multiplier, padded), shift, _padded(q.bias, padded))
        return _Layer(spec, _tiled(q.weight if stem else q.weight.to(torch.int8), width), channels, width)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights and channel constants, without the head."""
        tensors = [t for x in self._layers if isinstance(x, _Layer) for t in (x.weights, *x.channels)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def _arguments(self, t: int, b: int, h: int, w: int, neuron: NeuronSpec | None) -> EngineArgs:
        n = neuron or NeuronSpec(2.0, 1.0)
        args = EngineArgs(steps=t, batch=b, height=h, width=w, taps=1, threads=threads(), input_steps=t)
        args.tau, args.threshold = n.tau, n.threshold
        args.keep, args.integer_threshold = integer.keep_factor(n), round(n.threshold * integer.ONE)
        return args

    def _compile(self, frames: int, b: int, h: int, w: int, repeats: int) -> _Program:
        int8, t = self.precision == "int8", frames * repeats
        source = torch.empty(frames, b, h, w, self.plan.in_chans, dtype=torch.int16 if int8 else torch.float32)
        calls: list[Callable[[], None]] = []
        buffers: list[Any] = []
        spikes: list[tuple[Tensor, int]] = []
        bits, stream = torch.empty(0), torch.empty(0)

        def call(name: str, signature: str, *arguments: Any) -> None:
            function = kernel(name, signature)
            buffers.extend(arguments)
            values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
            values = [ctypes.byref(v) if isinstance(v, ctypes.Structure) else v for v in values]
            calls.append(lambda: function(*values))

        def new_bits(channels: int) -> Tensor:
            words = torch.zeros(t * b * h * w, -(-channels // 64), dtype=torch.int64)
            spikes.append((words, t * b * h * w * channels))
            return words

        for i, layer in enumerate(self._layers):
            if isinstance(layer, AttentionSpec):
                args = self._arguments(t, b, h, w, layer.neuron)
                args.channels = channels = stream.shape[-1]
                out = new_bits(channels)
                scale = round(layer.scale * integer.ONE)
                call("engine_attention", "piplfip", args, int(int8), bits, layer.heads, layer.scale, scale, out)
                bits = out
                continue
            spec = layer.spec
            args = self._arguments(t, b, h, w, spec.neuron)
            o, c, k, _ = spec.weight.shape
            args.channels, args.outputs, args.taps, args.tile_width = c, o, k * k, layer.tile_width
            args.pool = int(spec.pool == "cml")
            args.stream_mode = ("none", "write", "add").index(spec.stream)
            if spec.stream == "write":
                stream = torch.empty(t, b, h * w, o, dtype=torch.int32 if int8 else torch.float32)
            if spec.pool == "cml":
                h, w = (h + 1) // 2, (w + 1) // 2
            out = new_bits(o) if spec.neuron else None
            if i == 0:
                args.input_steps = frames
                if int8:
                    call("engine_integer_stem", "pppppppi", args, source, layer.weights, *layer.channels, out,
                         integer.STEM_SUM_SHIFT)  # fmt: skip
                else:
                    call("engine_float_stem", "ppppp", args, source, layer.weights, *layer.channels, out)
            else:
                target = stream if spec.stream != "none" else None
                name, signature = ("engine_integer_layer", "pppppppp") if int8 else ("engine_float_layer", "pppppp")
                call(name, signature, args, bits, layer.weights, *layer.channels, target, out)
            if out is not None:
                bits = out
            if spec.pool == "sps":
                full, (rows, columns) = bits, (h, w)
                h, w = (h + 1) // 2, (w + 1) // 2
                bits = new_bits(o)
                call("engine_pool", "pllllpi".replace(" ", ""), full, t * b, rows, columns, full.shape[1], bits,
                     threads())  # fmt: skip
        sums = torch.empty(b, stream.shape[-1], dtype=torch.int64 if int8 else torch.float32)
        call("engine_head_sums", "ipllllpi", int(int8), stream, t, b, h * w, stream.shape[-1], sums, threads())
        divisor = t * h * w * (integer.ONE if int8 else 1)
        return _Program(calls, source, sums, divisor, buffers, spikes)

    def _frames(self, x: Tensor) -> tuple[Tensor, int]:
        """Input to (frames (t, B, C, H, W), repeats), as the model does it."""
        if x.ndim not in (4, 5) or x.shape[-3] != self.plan.in_chans:
            raise ValueError(
                f"expected pictures (B, {self.plan.in_chans}, H, W) or event frames (B, T, {self.plan.in_chans}, H, W)"
                f", got shape {tuple(x.shape)}"
            )
        r = self.plan.reduction
        if x.shape[-1] % r or x.shape[-2] % r:
            raise ValueError(f"height and width must be multiples of {r}, got {tuple(x.shape[-2:])}: resize or pad")
        return (x.unsqueeze(0), self.plan.time_steps) if x.ndim == 4 else (x.transpose(0, 1), 1)

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Tensor:
        """Pictures (B, C, H, W) or event frames (B, T, C, H, W) to logits (B, classes)."""
        frames, repeats = self._frames(x)
        if current_isa() != self.isa:
            raise ValueError(f"the engine was built for {self.isa}, the instruction set in use is {current_isa()}")
        t, b, _, h, w = frames.shape
        if b == 0:
            return self.plan.head(torch.zeros(0, self._layers[-1].spec.weight.shape[0]))
        key = (t, b, h, w, repeats, threads())
        if key not in self._programs:
            self._programs.clear()  # buffers of one shape at a time
            self._programs[key] = self._compile(t, b, h, w, repeats)
        program = self._programs[key]
        if self.precision == "int8":
            frames = integer.quantise_input(frames)
        program.source.copy_(frames.permute(0, 1, 3, 4, 2))
        for call in program.calls:
            call()
        return self.plan.head((program.sums.double() / program.divisor).float())

    def firing_rates(self) -> list[float]:
        """Share of ones in every layer's spikes at the last call, in layer order."""
        if not self._programs:
            raise ValueError("there was no call yet: run the engine on an input first")
        program = next(iter(self._programs.values()))
        rates = []
        for words, total in program.spikes:
            ones = torch.zeros((), dtype=torch.int64)
            for bit in range(64):
                ones += ((words >> bit) & 1).sum()
            rates.append(int(ones) / total)
        return rates
