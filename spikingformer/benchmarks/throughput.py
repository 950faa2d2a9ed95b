"""Pictures per second and peak memory of one model, with its firing rate.

A spiking network's speed depends on how much it fires, so the rate is always given with the time.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikingformer.models import SpikingTransformer

MODES = ("inference", "training")


@dataclass(frozen=True)
class Measurement:
    """One batch size. Times are medians over `repeats` runs after a warm-up."""

    batch: int
    mode: str  # "inference" or "training" (forward, loss, backward; no optimiser)
    device: str
    dtype: str
    samples_per_second: float
    milliseconds: float  # median of one call on the whole batch
    spread: float  # (slowest - fastest) / median
    repeats: int
    peak_memory_mb: float  # CUDA: allocated; CPU: largest resident set of the process so far
    cuda_graph: bool  # the step was replayed as one graph, as `train` does it
    firing_rate: float  # spikes per neuron and time step, over all neuron layers


@torch.no_grad()
def firing_rate(model: SpikingTransformer, x: Tensor) -> float:
    """Spikes per neuron and time step over all neuron layers, for the batch x in the model's current mode."""
    total = torch.zeros(2, dtype=torch.float64)

    def count(_: nn.Module, __: tuple, spikes: Tensor) -> None:
        total[0] += spikes.double().sum().item()
        total[1] += spikes.numel()

    hooks = [n.register_forward_hook(count) for n in model.neurons()]
    buffers = {k: v.clone() for k, v in model.named_buffers()}  # counting must not change running statistics
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
        for k, v in model.named_buffers():
            v.copy_(buffers[k])
    return (total[0] / total[1]).item()


def example_input(model: SpikingTransformer, batch: int, device: torch.device, seed: int = 0) -> Tensor:
    """Random input of the model's own shape: pictures N(0, 1), or event counts (Poisson, mean 0.2)."""
    c = model.config
    generator = torch.Generator().manual_seed(seed)
    if c.takes_events:
        rate = torch.full((batch, c.time_steps, 2, *c.img_size), 0.2)
        return torch.poisson(rate, generator).to(device)
    return torch.randn(batch, c.in_chans, *c.img_size, generator=generator).to(device)


@torch.no_grad()
def calibrate(model: nn.Module, x: Tensor, seed: int = 0) -> None:
    """Makes random weights fire like a trained network's: fresh ones are nearly silent, so their speed means nothing.

    BatchNorm weights and biases are drawn from [0.6, 1.8] and [-0.2, 0.8]; running statistics are those of the batch x.
    The model is left in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.weight.uniform_(0.6, 1.8, generator=generator)
        norm.bias.uniform_(-0.2, 0.8, generator=generator)
        norm.momentum = 1.0
    model.train()
    model(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def peak_memory_mb(device: torch.device) -> float:
    """CUDA: the allocator's peak since its last reset; CPU: the process's largest resident set.

    Raises ValueError for the CPU if the system is not POSIX.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ModuleNotFoundError:
        raise ValueError(
            f"peak memory on the CPU needs a POSIX system's getrusage, and this is {sys.platform}"
        ) from None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _call(model: SpikingTransformer, x: Tensor, mode: str, autocast: torch.dtype | None) -> Callable[[], None]:
    context = torch.autocast(x.device.type, autocast or torch.bfloat16, enabled=autocast is not None)
    target = torch.zeros(len(x), dtype=torch.long, device=x.device)

    def infer() -> None:
        with torch.inference_mode(), context:
            model(x)

    def train() -> None:
        model.zero_grad(set_to_none=True)
        with context:
            loss = F.cross_entropy(model(x).float(), target)
        loss.backward()

    return infer if mode == "inference" else train


def _captured(call: Callable[[], None]) -> Callable[[], None]:
    from spikingformer.training.step_graph import capture_graph

    for _ in range(2):  # so that the libraries have chosen their kernels
        call()
    replay, _ = capture_graph(call)
    return replay


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    model: SpikingTransformer,
    batch: int,
    mode: str = "inference",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    repeats: int = 5,
) -> Measurement:
    """Times `model` on random input of one batch size. Raises ValueError for an unknown mode or batch < 1."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if batch < 1 or repeats < 1:
        raise ValueError(f"batch and repeats must be at least 1, got {batch} and {repeats}")
    device = torch.device(device)
    model = model.to(device).train(mode == "training")
    x = example_input(model, batch, device)
    rate = firing_rate(model, x)
    call = _call(model, x, mode, None if dtype == torch.float32 else dtype)
    graph = device.type == "cuda" and mode == "training"
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    call()
    if graph:
        call = _captured(call)
    _wait(device)  # else the first time includes the rest of the warm-up
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - start)
    median = statistics.median(times)
    return Measurement(
        batch=batch,
        mode=mode,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        samples_per_second=batch / median,
        milliseconds=median * 1e3,
        spread=(max(times) - min(times)) / median,
        repeats=repeats,
        peak_memory_mb=peak_memory_mb(device),
        cuda_graph=graph,
        firing_rate=rate,
    )


def sweep(
    model: SpikingTransformer,
    batches: list[int] | None,
    mode: str,
    device: str,
    dtype: torch.dtype,
    repeats: int,
    seconds: float = 60.0,
) -> Iterator[Measurement]:
    """Measures each batch size; with None, doubles from 1 until memory, or `seconds` per batch size, is used up."""
    if batches is not None:
        for batch in batches:
            yield measure(model, batch, mode, device, dtype, repeats)
        return
    batch = 1
    while True:
        start = time.perf_counter()
        try:
            result = measure(model, batch, mode, device, dtype, repeats)
        except (torch.OutOfMemoryError, MemoryError):
            return
        yield result
        if time.perf_counter() - start > seconds / 2:
            return
        batch *= 2
