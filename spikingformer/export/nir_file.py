"""NIR, the exchange format of neuromorphic tools (arXiv 2311.14641), for the parts of our models that it can express.

NIR has convolutions, neurons and sums. It has no max-pool and no product of two activations, so a whole model cannot be
written. The parts without these can (a block's MLP, the stages without a pool).
"""

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from spikingformer.files import write_atomic
from spikingformer.layers import ConvBN, ConvBNLIF
from spikingformer.models import SpikingTransformer, spikformer, spikingformer
from spikingformer.neurons import LIF, LIFConfig

from .extras import require
from .fold import fold_batch_norm, is_folded
from .metadata import ExportMetadata, describe
from .prepare import ExportReport, check_weights, checked_target

if TYPE_CHECKING:
    import nir

_WHY_POOL = "it max-pools, and NIR has no max-pool"
_WHY_ATTENTION = "it multiplies activations with activations (q k^T v), and NIR has no such node"


class NotInNIR(ValueError):
    """NIR cannot express a layer; `layer` is its module name."""

    def __init__(self, layer: str, why: str, parts: list[str]):
        self.layer = layer
        instead = f"; parts that can be written: {', '.join(parts)}" if parts else ""
        super().__init__(f"{layer} cannot be written to NIR: {why}{instead}")


def export_nir(
    model: SpikingTransformer,
    path: str | Path,
    *,
    part: str = "",
    metadata: ExportMetadata | None = None,
) -> ExportReport:
    """Writes `model`, or the module called `part` of it, folded, as a NIR graph that is stepped with dt = 1.

    Raises NotInNIR, a ValueError that names the first layer that NIR cannot express, and the parts that can be written.
    """
    require("nir")
    import nir

    target = checked_target(path, ".nir")
    check_weights(model)
    described = describe(model) if metadata is None else metadata
    graph = to_nir(model, part)
    graph.metadata = {**described.to_strings(), "spikingformer.part": part}
    written = io.BytesIO()  # HDF5 ends the process if the disk is full
    nir.write(written, graph)
    write_atomic(target, written.getvalue())
    return ExportReport(target, target.stat().st_size, described, None, None)


def to_nir(model: SpikingTransformer, part: str = "") -> "nir.NIRGraph":
    """The NIR graph of a part of `model` ("": all of it), for inputs of the model's own picture size."""
    modules = dict(model.named_modules())
    if part not in modules:
        raise ValueError(f"the model has no module {part!r}: use one of {', '.join(exportable_parts(model))}")
    folded = model if is_folded(model) else fold_batch_norm(model)
    _refuse_what_is_not_in_nir(folded, part)
    module = dict(folded.named_modules())[part]
    channels, size = _input_of(folded, part)
    graph = _Graph(size)
    graph.add("input", _nir().Input(input_type=np.array([channels, *size])))
    last = _write(module, part or "model", "input", graph, channels)
    graph.add("output", _nir().Output(output_type=np.array([graph.channels[last], *size])), last)
    return _nir().NIRGraph(graph.nodes, graph.edges)


def exportable_parts(model: SpikingTransformer) -> list[str]:
    """Names of the largest modules of `model` that NIR can express."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f + ".") for f in found)
        if name and not inside and _is_writable(module) and _first_refusal(module, name) is None:
            found.append(name)
    return found


def run_nir(graph: "nir.NIRGraph", x: Tensor) -> Tensor:
    """Steps a NIR graph of convolutions and LIF neurons over x (T, B, C, H, W) with dt = 1: output (T, B, C, H, W).

    Forward Euler, v += (v_leak - v + R I) dt / tau, as NIR's neurons are defined; inputs of a node are summed.
    """
    nir = _nir()
    before: dict[str, list[str]] = {name: [a for a, b in graph.edges if b == name] for name in graph.nodes}
    values: dict[str, Tensor] = {}

    def value(name: str) -> Tensor:
        if name in values:
            return values[name]
        node = graph.nodes[name]
        y = x if isinstance(node, nir.Input) else sum(value(n) for n in before[name])
        assert isinstance(y, Tensor)
        if isinstance(node, nir.Conv2d):
            weight, bias = torch.as_tensor(node.weight).to(x), torch.as_tensor(node.bias).to(x)
            padding = tuple(int(p) for p in node.padding)
            y = nn.functional.conv2d(y.flatten(0, 1), weight, bias, padding=padding).unflatten(0, x.shape[:2])
        elif isinstance(node, nir.LIF):
            y = _run_lif(node, y)
        elif not isinstance(node, nir.Input | nir.Output):
            raise ValueError(f"run_nir has no {type(node).__name__} (node {name}): it runs files of export_nir")
        values[name] = y
        return y

    return value("output")


def _run_lif(node: "nir.LIF", current: Tensor) -> Tensor:
    tau, r, leak, threshold, reset = (
        torch.as_tensor(a).to(current) for a in (node.tau, node.r, node.v_leak, node.v_threshold, node.v_reset)
    )
    v, spikes = torch.zeros_like(current[0]), []
    for i in current:
        v = v + (leak - v + r * i) / tau
        fired = v > threshold
        v = torch.where(fired, reset, v)
        spikes.append(fired.to(current.dtype))
    return torch.stack(spikes)


@dataclass
class _Graph:
    size: tuple[int, int]
    nodes: dict[str, Any] = field(default_factory=dict)
    edges: list[tuple[str, str]] = field(default_factory=list)
    channels: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, node: Any, *inputs: str) -> str:
        self.nodes[name] = node
        self.edges += [(i, name) for i in inputs]
        return name


def _write(module: nn.Module, name: str, source: str, graph: _Graph, channels: int) -> str:
    """Adds the nodes of `module` after node `source`; returns the name of its last node."""
    key = name.replace(".", "_")  # NIR files are HDF5: names are single path parts
    if isinstance(module, LIF):
        out = graph.add(key, _lif_node(module.config, (channels, *graph.size)), source)
        graph.channels[out] = channels
        return out
    if isinstance(module, ConvBN | ConvBNLIF):
        out = graph.add(f"{key}_conv", _conv_node(module.conv, graph.size), source)
        graph.channels[out] = module.conv.out_channels
        return (
            _write(module.lif, f"{name}.lif", out, graph, graph.channels[out]) if isinstance(module, ConvBNLIF) else out
        )
    for child, label in _in_order(module):
        source = _write(child, f"{name}.{label}", source, graph, channels)
        channels = graph.channels[source]
    return source


def _in_order(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """The children of a chain of modules, in call order."""
    if isinstance(module, spikingformer.MLP):
        return [(module.lif, "lif"), (module.fc1, "fc1"), (module.fc2, "fc2")]
    assert isinstance(module, spikformer.MLP), type(module)
    return [(module.fc1, "fc1"), (module.fc2, "fc2")]


def _is_writable(module: nn.Module) -> bool:
    return isinstance(module, LIF | ConvBN | ConvBNLIF | spikingformer.MLP | spikformer.MLP)


def _first_refusal(module: nn.Module, name: str) -> tuple[str, str] | None:
    """(name, why) of the first layer in `module` that NIR cannot express."""
    for child_name, child in module.named_modules(prefix=name):
        if isinstance(child, ConvBNLIF) and child.pool is not None:
            return child_name, _WHY_POOL
        if isinstance(child, spikingformer.Attention | spikformer.Attention):
            return child_name, _WHY_ATTENTION
        if isinstance(child, LIF) and child.config.v_reset is None:
            return child_name, "its neuron resets by subtraction, and NIR's LIF resets to a value"
        if isinstance(child, LIF) and not child.config.decay_input:
            return child_name, "its neuron adds the input undecayed, and the reset would then not match NIR's LIF"
    return None


def _refuse_what_is_not_in_nir(model: SpikingTransformer, part: str) -> None:
    module = dict(model.named_modules())[part]
    refusal = _first_refusal(module, part)
    if refusal is None and not _is_writable(module):
        refusal = (part or "the model", f"{type(module).__name__} is more than a chain of convolutions and neurons")
    if refusal is not None:
        raise NotInNIR(*refusal, exportable_parts(model))


def _input_of(model: SpikingTransformer, part: str) -> tuple[int, tuple[int, int]]:
    """(channels, (rows, columns)) of what the module called `part` receives."""
    module, c = dict(model.named_modules())[part], model.config
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    channels = convs[0].in_channels if convs else 0
    halvings = len(c.pooled_stages)
    if part.startswith("stem.stages."):
        stage = int(part.split(".")[2])
        own = part.count(".") > 2 and c.pool == "cml"  # the neuron inside a CML stage comes after its pool
        halvings = sum(1 for i in c.pooled_stages if i < stage + own)
    size = (c.img_size[0] >> halvings, c.img_size[1] >> halvings)
    return channels or _channels_before_lif(model, part), size


def _channels_before_lif(model: SpikingTransformer, part: str) -> int:
    parent = dict(model.named_modules())[part.rpartition(".")[0]]
    return parent.conv.out_channels if isinstance(parent, ConvBNLIF) else model.config.embed_dim


def _conv_node(conv: nn.Conv2d, size: tuple[int, int]) -> Any:
    assert conv.bias is not None
    weight, bias = conv.weight.detach().cpu().numpy(), conv.bias.detach().cpu().numpy()
    padding = conv.padding[0]
    return _nir().Conv2d(size, weight, stride=1, padding=(padding, padding), dilation=1, groups=1, bias=bias)


def _lif_node(config: LIFConfig, shape: tuple[int, ...]) -> Any:
    def full(value: float) -> np.ndarray:
        return np.full(shape, value, np.float32)

    # NIR fires at v > v_threshold, ours at v >= v_threshold: the next number below makes them the same in float32
    below = float(np.nextafter(np.float32(config.v_threshold), np.float32(-np.inf)))
    return _nir().LIF(
        tau=full(config.tau),
        r=full(1),
        v_leak=full(config.v_rest),
        v_threshold=full(below),
        v_reset=full(config.v_rest),
    )


def _nir() -> Any:
    require("nir")
    import nir

    return nir
