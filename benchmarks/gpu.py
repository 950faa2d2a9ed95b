"""The GPU table in one call: parity, kernels, end-to-end speed and memory, a training leg.

    python -m benchmarks.gpu [--output FOLDER] [--minutes 9.5] [--sections parity,kernels,...] [--no-compile]

Each section runs in a process of its own, so that a fault in one leaves the others standing; after each,
FOLDER/results.json, log.txt and summary.txt are written (FOLDER: --output, else $OUT, else benchmarks/results/gpu). No
speed is claimed on a red gate: a row is timed after its own parity check, and marked where that failed. Competitors run
interleaved; figures are medians. SpikingJelly's neurons take part where it is installed (2.0: activation_based;
0.0.0.0.12: clock_driven). Kernels compile first, in many processes at once, beside the parity checks. torch.compile of
the plain composition takes minutes: give it a call of its own, `--sections compiled`.
"""

import argparse
import contextlib
import copy
import importlib
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Section: the most seconds it may take. Run in this order; what the clock no longer allows is recorded as skipped.
SECTIONS = {"parity": 150, "cifar": 110, "kernels": 80, "dvs": 70, "imagenet": 110, "learn": 60, "compiled": 420}
SHARDS = 8  # processes that share the parity cases; as many warm the compile cache
ROWS = {  # section: (name, model, batches); batches are tried upwards until memory is full or time is out
    "cifar": [("CIFAR 4-384", "spikingformer_cml_4_384", (64, 256))],
    "dvs": [("DVS 2-256 T=16", "spikingformer_cml_2_256", (16,))],
    "imagenet": [
        ("ImageNet 8-512", "spikingformer_cml_8_512", (64,)),
        ("ImageNet 8-768", "spikingformer_cml_8_768", (32,)),
    ],
    "compiled": [("CIFAR 4-384", "spikingformer_cml_4_384", (256,))],
}
ROUNDS = 5


class Report:
    """A section's results, on disk after every change."""

    def __init__(self, path: Path, section: str):
        self.path, self.data = path, {"section": section, "results": []}

    def add(self, **result: Any) -> None:
        """Keeps one result and prints it."""
        self.data["results"].append(result)
        self.path.write_text(json.dumps(self.data, indent=1))
        print(json.dumps(result), flush=True)

    @contextlib.contextmanager
    def guard(self, **what: Any) -> Iterator[None]:
        """Records an exception with what was being done, and goes on."""
        try:
            yield
        except Exception as error:
            self.add(**what, error=f"{type(error).__name__}: {error}", trace=traceback.format_exc()[-1500:])
            torch.cuda.empty_cache()


def milliseconds(f: Callable[[], Any], rounds: int = ROUNDS, warm_up: int = 2) -> float:
    """Median of single calls by device events."""
    for _ in range(warm_up):
        f()
    times = []
    for _ in range(rounds):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        f()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


# ---------------------------------------------------------------------------------------------------------- parity


def relative(a: Tensor, b: Tensor) -> float:
    """Error of a against b, over b's norm."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-12)).item()


def stage_case(shape, pool, with_residual, repeats, dtype, dropped=False):
    """(fused, plain in float64, leaves, output gradients) of one stage, on the same numbers."""
    from spikingformer.neurons import LIFConfig, lif_reference
    from spikingformer.neurons.triton.ops import bn_pool_lif, bn_statistics

    config = LIFConfig()
    y = (torch.randn(shape, device="cuda") * 2 + 0.3).to(dtype).permute(0, 1, 4, 2, 3)
    channels = y.shape[2]
    weight = torch.rand(channels, device="cuda") + 0.5
    leaves = [y, weight, torch.randn(channels, device="cuda")]
    if with_residual:
        leaves.append(torch.randn(shape, device="cuda").to(dtype).permute(0, 1, 4, 2, 3))

    scale = torch.linspace(0, 2, shape[1], device="cuda") if dropped else None  # of samples, as drop path has it

    def fused(y, weight, bias, residual=None):
        mean, rstd = bn_statistics(y, repeats=repeats)
        s, current = bn_pool_lif(
            y, mean, rstd, weight, bias, config, pool=pool, residual=residual,
            scale=scale, batch_statistics=True, want_current=with_residual, repeats=repeats,
        )  # fmt: skip
        return [s] if current is None else [s, current]

    def halve(x):
        return F.max_pool2d(x.flatten(0, 1), 3, 2, 1).unflatten(0, x.shape[:2])

    def plain(y, weight, bias, residual=None):
        z = F.batch_norm(y.flatten(0, 1), None, None, weight, bias, True).unflatten(0, y.shape[:2])
        z = z if scale is None else z * scale.to(z.dtype).view(-1, 1, 1, 1)
        z = z if residual is None else z + residual
        current = halve(z) if pool == "cml" else z
        s = lif_reference(current.expand(repeats * len(current), *current.shape[1:]), config)[0]
        s = halve(s) if pool == "sps" else s
        return [s, z] if with_residual else [s]

    return fused, plain, leaves


def attention_case(steps, batch, tokens, heads, width, dtype):
    """As `stage_case`, for attention on packed spikes."""
    from spikingformer.neurons import LIFConfig, lif_reference
    from spikingformer.neurons.triton.ops import spike_attention_packed

    config = LIFConfig(v_threshold=0.5)
    rate = (4.0 / (tokens * width)) ** (1 / 3)
    qkv = (torch.rand(steps, batch, tokens, 3 * heads * width, device="cuda") < rate).to(dtype)

    def fused(qkv):
        return [spike_attention_packed(qkv, heads, 0.125, config)]

    def plain(qkv):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(2, 3) for x in qkv.chunk(3, -1))
        y = q @ (k.mT @ v) * 0.125
        return [lif_reference(y.transpose(2, 3).flatten(3), config)[0]]

    return fused, plain, [qkv]


def lif_case(steps, neurons, dtype):
    """As `stage_case`, for the neuron alone."""
    from spikingformer.neurons import LIFConfig, lif_reference
    from spikingformer.neurons.triton.ops import lif

    config = LIFConfig()
    x = (torch.randn(steps, neurons, device="cuda") * 2).to(dtype)
    return (
        lambda x: [lif(x, config, want_membrane=False)[0]],
        lambda x: [lif_reference(x, config)[0]],
        [x],
    )


def parity_of(fused, plain, leaves) -> dict[str, float]:
    """Shares of spikes that differ and gradient errors, against the plain form in float64."""
    dtype = leaves[0].dtype
    ours = [x.detach().requires_grad_() for x in leaves]
    truth = [x.detach().double().requires_grad_() for x in leaves]
    a, b = fused(*ours), plain(*truth)
    grads = [torch.randn_like(t).to(dtype) for t in b]
    ga = torch.autograd.grad(a, ours, grads)
    gb = torch.autograd.grad(b, truth, [g.double() for g in grads])
    return {
        "spikes_that_differ": (a[0].double() != b[0]).double().mean().item(),
        "gradient_error": max(relative(x, y) for x, y in zip(ga, gb, strict=True)),
        "firing_rate": b[0].double().mean().item(),
    }


def parity_section(report: Report, shard: int) -> None:
    """Every kernel at model shapes. float32: 1e-4 of a gradient's norm; half precision: 4 eps, rounded a few times."""
    cases: dict[str, Callable[[torch.dtype], tuple]] = {
        "lif T=4": lambda d: lif_case(4, 100003, d),
        "lif T=16": lambda d: lif_case(16, 30011, d),
        "stage": lambda d: stage_case((4, 4, 8, 8, 384), None, False, 1, d),
        "stage T=16": lambda d: stage_case((16, 2, 8, 8, 256), None, False, 1, d),
        "stage residual": lambda d: stage_case((4, 4, 8, 8, 384), None, True, 1, d),
        "stage residual drop path": lambda d: stage_case((4, 4, 8, 8, 384), None, True, 1, d, dropped=True),
        "stage residual T=16": lambda d: stage_case((16, 2, 8, 8, 256), None, True, 1, d),
        "stage repeated": lambda d: stage_case((1, 4, 32, 32, 48), None, False, 4, d),
        "cml": lambda d: stage_case((4, 4, 32, 32, 192), "cml", False, 1, d),
        "cml T=16": lambda d: stage_case((16, 2, 33, 31, 64), "cml", False, 1, d),
        "cml repeated": lambda d: stage_case((1, 2, 64, 64, 96), "cml", False, 4, d),
        "sps": lambda d: stage_case((4, 4, 32, 32, 192), "sps", False, 1, d),
        "sps repeated": lambda d: stage_case((1, 2, 63, 64, 48), "sps", False, 4, d),
        "attention N=64 d=32": lambda d: attention_case(4, 4, 64, 12, 32, d),
        "attention N=64 d=16 T=16": lambda d: attention_case(16, 2, 64, 16, 16, d),
        "attention N=196 d=64": lambda d: attention_case(4, 2, 196, 8, 64, d),
        "attention N=196 d=96": lambda d: attention_case(4, 2, 196, 8, 96, d),
    }
    every = [(name, case, dtype) for dtype in (torch.bfloat16, torch.float32) for name, case in cases.items()]
    for name, case, dtype in every[shard::SHARDS]:
        what = {"kernel": name, "dtype": str(dtype)}
        with report.guard(**what):
            torch.manual_seed(0)
            found = parity_of(*case(dtype))
            allowed = 1e-4 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
            # A sum in another order flips the few spikes that sit on the threshold.
            good = found["gradient_error"] < allowed and found["spikes_that_differ"] < 1e-4
            report.add(**what, **found, allowed=allowed, ok=good)


# --------------------------------------------------------------------------------------------------------- kernels


def kernels_section(report: Report) -> None:
    """Bytes that must move over the time taken, beside what a plain copy reaches on this card."""
    from spikingformer.neurons.triton import launch

    source = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    ceiling = 2 * source.numel() * 2 / milliseconds(lambda: target.copy_(source)) / 1e6
    report.add(kernel="copy", gigabytes_per_second=ceiling)
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    report.add(kernel="matrix product bf16", teraflops=2 * 8192**3 / milliseconds(lambda: square @ square) / 1e9)
    d = torch.bfloat16
    # Reads and writes per element of y that cannot be avoided, in units of y: (forward, backward). Statistics are one
    # more read forward; backward reads y and the gradient twice, because the sums come before what they are used in.
    cases = {
        "lif T=4": (lif_case(4, 2**26, d), 2, 3),
        "lif T=16": (lif_case(16, 2**24, d), 2, 3),
        "stage T=4 C=384": (stage_case((4, 1024, 8, 8, 384), None, False, 1, d), 3, 5),
        "stage T=4 C=1536": (stage_case((4, 256, 8, 8, 1536), None, False, 1, d), 3, 5),
        "stage T=16 C=256": (stage_case((16, 256, 8, 8, 256), None, False, 1, d), 3, 5),
        "stage residual T=4 C=384": (stage_case((4, 1024, 8, 8, 384), None, True, 1, d), 5, 8),
        "stage repeated C=48": (stage_case((1, 1024, 32, 32, 48), None, False, 4, d), 6, 10),
        "cml T=4 C=192": (stage_case((4, 128, 32, 32, 192), "cml", False, 1, d), 2.25, 3.9),
        "sps T=4 C=192": (stage_case((4, 128, 32, 32, 192), "sps", False, 1, d), 2.25, 5),
        "attention N=64 d=32": (attention_case(4, 1024, 64, 12, 32, d), 4 / 3, 7 / 3),
        "attention N=196 d=64": (attention_case(4, 128, 196, 8, 64, d), 4 / 3, 4),
        "attention N=64 d=16 T=16": (attention_case(16, 256, 64, 16, 16, d), 4 / 3, 7 / 3),
    }
    tiles = {
        "default": cases,
        **{x: [n for n in cases if "T=" in n and "attention" not in n] for x in ("half", "double")},
    }
    for setting, name in [(setting, name) for setting, names in tiles.items() for name in names]:
        (fused, _, leaves), forward_units, backward_units = cases[name]
        with report.guard(kernel=name, setting=setting), elements_scaled(launch, setting):
            leaves = [x.detach().requires_grad_() for x in leaves]
            grads = [torch.randn_like(o) for o in fused(*leaves)]
            with torch.no_grad():
                forward = milliseconds(captured(lambda fused=fused, leaves=leaves: fused(*leaves)))
            both = captured(lambda fused=fused, a=(leaves, grads): torch.autograd.grad(fused(*a[0]), *a))
            backward = milliseconds(both) - forward
            size = leaves[0].numel() * leaves[0].element_size() / 1e6
            report.add(
                kernel=name,
                setting=setting,
                forward_ms=forward,
                backward_ms=backward,
                forward_share_of_copy=forward_units * size / forward / ceiling,
                backward_share_of_copy=backward_units * size / backward / ceiling,
            )


@contextlib.contextmanager
def elements_scaled(launch: Any, setting: str) -> Iterator[None]:
    """Tiles half or twice as large as the heuristic's: shows whether the heuristic is the right one on this card."""
    from spikingformer.neurons.triton import lif as lif_module

    chosen = launch.elements_per_thread
    factor = {"default": 1, "half": 0.5, "double": 2}[setting]

    def scaled(steps: int, itemsize: int) -> int:
        return max(1, int(chosen(steps, itemsize) * factor))

    launch.elements_per_thread = lif_module.elements_per_thread = scaled
    try:
        yield
    finally:
        launch.elements_per_thread = lif_module.elements_per_thread = chosen


# ------------------------------------------------------------------------------------------------------ end to end


class WithNeuron(nn.Module):
    """The plain composition with another library's neuron in place of the loop."""

    def __init__(self, plain: nn.Module, neuron: Callable[[Tensor, Any], Tensor]):
        super().__init__()
        self.plain, self.neuron = plain, neuron

    def forward(self, x: Tensor) -> Tensor:
        from benchmarks import plain

        own = plain.plain_lif
        plain.plain_lif = self.neuron
        try:
            return self.plain(x)
        finally:
            plain.plain_lif = own


def spikingjelly_neurons() -> dict[str, Callable[[Tensor, Any], Tensor]]:
    """{name: neuron} of what is installed here; each is tried once."""
    found: dict[str, Callable[[Tensor, Any], Tensor]] = {}

    def offer(name: str, make: Callable[[Any], nn.Module]) -> None:
        def run(x: Tensor, config: Any) -> Tensor:
            return make(config)(x.contiguous())

        try:
            from spikingformer.neurons import LIFConfig

            x = torch.randn(4, 64, device="cuda", requires_grad=True)
            run(x, LIFConfig()).sum().backward()
            found[name] = run
        except Exception as error:
            print(f"{name} does not run here: {type(error).__name__}: {error}", flush=True)

    with contextlib.suppress(ImportError):
        # Beside 2.0 the published code's version can lie under a name of its own.
        package = "spikingjelly_published" if importlib.util.find_spec("spikingjelly_published") else "spikingjelly"
        old = importlib.import_module(f"{package}.clock_driven.neuron")
        old_surrogate = importlib.import_module(f"{package}.clock_driven.surrogate")
        offer(
            "spikingjelly_0_12_cupy",
            lambda c: old.MultiStepLIFNode(
                tau=c.tau, v_threshold=c.v_threshold, detach_reset=True, backend="cupy",
                surrogate_function=old_surrogate.Sigmoid(alpha=4.0),
            ).cuda(),
        )  # fmt: skip
    with contextlib.suppress(ImportError):
        from spikingjelly.activation_based import neuron as new
        from spikingjelly.activation_based import surrogate as new_surrogate

        offer(
            "spikingjelly_2",  # picks its fused kernels by itself
            lambda c: new.LIFNode(
                tau=c.tau, v_threshold=c.v_threshold, detach_reset=True, step_mode="m",
                surrogate_function=new_surrogate.Sigmoid(alpha=4.0),
            ).cuda(),
        )  # fmt: skip
    return found


def recomputing(model: nn.Module) -> nn.Module:
    """A copy that keeps no spikes for backward."""
    other = copy.deepcopy(model)
    other.set_grad_checkpointing(True)
    return other


class Step:
    """One training step (forward, loss, backward; no optimiser) of a model on a fixed batch."""

    def __init__(self, model: nn.Module, x: Tensor, target: Tensor, dtype: torch.dtype):
        self.model, self.x, self.target, self.dtype = model.train(), x, target, dtype

    def __call__(self) -> None:
        self.model.zero_grad(set_to_none=True)
        # The cache of cast weights would outlive a captured graph.
        with torch.autocast("cuda", self.dtype, cache_enabled=not torch.cuda.is_current_stream_capturing()):
            loss = F.cross_entropy(self.model(self.x), self.target)
        # float16 gradients need a scale; a fixed one costs the same as the real scaler's.
        (loss * (1024.0 if self.dtype == torch.float16 else 1.0)).backward()


def captured(call: Callable[[], Any]) -> Callable[[], None]:
    """The call as one CUDA graph: no launch overhead."""
    from spikingformer.training.step_graph import capture_graph

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    if isinstance(call, Step):
        call.model.zero_grad(set_to_none=True)
    replay, result = capture_graph(call)
    return lambda: (replay(), result)[0]  # what the graph writes to lives as long as its replay


def peak_megabytes(step: Step) -> float:
    """Most memory that one step has allocated beyond weights and input."""
    step.model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def model_parity(model, others: dict[str, nn.Module], x: Tensor) -> dict[str, Any]:
    """Logits and gradients of each in float32 against the plain definition in float64, on few samples."""
    from spikingformer.neurons import use_backend

    few = x[:2]
    exact = copy.deepcopy(model).double().train()
    with use_backend("reference"):
        logits = exact(few.double())
        logits.logsumexp(1).sum().backward()
    truth = torch.cat([p.grad.flatten() for p in exact.parameters()])
    found: dict[str, Any] = {}
    for name, other in others.items():
        buffers = {k: b.clone() for k, b in other.named_buffers()}
        other.train().zero_grad(set_to_none=True)
        out = other(few)
        out.logsumexp(1).sum().backward()
        grads = torch.cat([p.grad.flatten() for p in other.parameters()])
        found[name] = {"logits": relative(out, logits), "gradient": relative(grads, truth)}
        other.zero_grad(set_to_none=True)
        for k, b in other.named_buffers():
            b.copy_(buffers[k])
    # A spike on the threshold falls either way in float32 and its effect spreads, so ours is held to what the plain
    # composition's own rounding does, times three.
    allowed = {k: 3 * found["plain"][k] + 1e-3 for k in ("logits", "gradient")}
    found["ok"] = all(found[n][k] <= allowed[k] for n in ("ours",) for k in allowed)
    return found


def table_section(report: Report, section: str, compile_plain: bool, deadline: float) -> None:
    """Training rows of one section: all competitors, interleaved."""
    import timm

    import spikingformer
    from benchmarks.plain import PlainModel
    from spikingformer.benchmarks import calibrate, firing_rate
    from spikingformer.benchmarks.throughput import example_input

    report.data["spikingformer"] = spikingformer.__version__
    torch.backends.cudnn.benchmark = True
    cuda = torch.device("cuda")
    for name, model_name, batches in ROWS[section]:
        with report.guard(row=name):
            torch.manual_seed(0)
            model = timm.create_model(model_name)
            model = model.to(cuda, memory_format=torch.channels_last)
            calibrate_on_cpu_draws(calibrate, model, example_input(model, 8, cuda, seed=1))
            plain = PlainModel(model)
            checked = model_parity(model, {"plain": plain, "ours": model}, example_input(model, 2, cuda))
            report.add(row=name, parity=checked)
            rate = firing_rate(model.train(), example_input(model, 8, cuda))
            for batch in batches:
                if time.monotonic() > deadline:
                    report.add(row=name, batch=batch, skipped="out of time")
                    continue
                with report.guard(row=name, batch=batch):
                    timed = timed_row(report, model, plain, batch, compile_plain)
                    report.add(row=name, batch=batch, firing_rate=rate, parity_ok=checked["ok"], **timed)


def calibrate_on_cpu_draws(calibrate: Callable, model: nn.Module, x: Tensor) -> None:
    """`calibrate` draws with a CPU generator: the model goes there for the draws, its statistics come from the GPU."""
    model.cpu()
    calibrate(model, x[:1].cpu())
    model.cuda()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for bn in norms:
        bn.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    for bn in norms:
        bn.momentum = 0.1


def timed_row(report, model, plain, batch: int, compile_plain: bool) -> dict[str, Any]:
    """Pictures per second and peak memory of every competitor on one batch."""
    from spikingformer.benchmarks.throughput import example_input

    x = example_input(model, batch, torch.device("cuda"))
    target = torch.arange(batch, device="cuda") % model.num_classes
    bf16, fp16 = torch.bfloat16, torch.float16
    steps = {"ours": Step(model, x, target, bf16)}
    if compile_plain:  # alone with ours: its compilation takes the time of all the others
        steps["plain_compiled"] = Step(torch.compile(plain), x, target, bf16)
    else:
        steps["ours_recomputing"] = Step(recomputing(model), x, target, bf16)
        steps["plain"] = Step(plain, x, target, bf16)
        for name, neuron in spikingjelly_neurons().items():
            # The old CuPy neuron has no bfloat16: it runs in the published recipe's float16.
            steps[name] = Step(WithNeuron(plain, neuron), x, target, fp16 if "0_12" in name else bf16)
    memory: dict[str, float] = {}
    first_call: dict[str, float] = {}
    runners: dict[str, Callable[[], Any]] = {}
    for name, step in steps.items():
        with report.guard(competitor=name, batch=batch):
            start = time.monotonic()
            step()
            torch.cuda.synchronize()
            first_call[name] = time.monotonic() - start
            memory[name] = peak_megabytes(step)
            runners[name] = step
    # `train` runs ours in a graph; others may gain by one, too
    for name in ("ours", "ours_recomputing", "plain", "plain_compiled", "spikingjelly_2"):
        if name in runners:
            with report.guard(competitor=f"{name}_graph", batch=batch):
                runners[f"{name}_graph"] = captured(steps[name])
    times: dict[str, list[float]] = {name: [] for name in runners}
    for round_ in range(ROUNDS):
        for name, run in runners.items():
            times[name].append(milliseconds(run, rounds=1, warm_up=2 if round_ == 0 else 0))
    median = {name: statistics.median(t) for name, t in times.items()}
    ours = min((median[n] for n in ("ours", "ours_graph") if n in median), default=float("nan"))
    return {
        "pictures_per_second": {n: batch / ms * 1e3 for n, ms in median.items()},
        "ours_speedup_over": {n: ms / ours for n, ms in median.items()},
        "step_megabytes": memory,
        "first_call_seconds": first_call,
        "all_milliseconds": times,
    }


def warm_section(report: Report, shard: int) -> None:
    """One step of one model in one type: its kernels then lie compiled in Triton's cache on disk.

    The last shard is the plain composition through torch.compile, whose cache lies there, too.
    """
    import timm

    import spikingformer  # noqa: F401  (registers the models)
    from benchmarks.plain import PlainModel
    from spikingformer.benchmarks.throughput import example_input

    rows = [row for section in ("cifar", "imagenet", "dvs") for row in ROWS[section]]
    name, model_name, batches = rows[shard % len(rows)]
    if shard == SHARDS:
        name, model_name, batches = ROWS["compiled"][0]
    half = shard < len(rows) or shard == SHARDS
    model = timm.create_model(model_name).cuda().to(memory_format=torch.channels_last)
    x = example_input(model, batches[0] if half else 2, torch.device("cuda"))
    target = torch.zeros(len(x), dtype=torch.long, device="cuda")
    start = time.monotonic()
    if shard == SHARDS:
        model = torch.compile(PlainModel(model))
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        loss = F.cross_entropy(model.train()(x), target)
    loss.backward()
    torch.cuda.synchronize()
    report.add(row=name, warm="bfloat16" if half else "float32", seconds=time.monotonic() - start)


# ----------------------------------------------------------------------------------------------------------- learn


def learn_section(report: Report, seconds: float) -> None:
    """Trains on scikit-learn's digits in bf16 on the fused kernels: the loss falls and held-out digits are read."""
    import timm
    from sklearn.datasets import load_digits

    import spikingformer  # noqa: F401  (registers the models)
    from spikingformer.neurons import use_backend

    digits = load_digits()
    pictures = torch.tensor(digits.images, dtype=torch.float32).div(16)[:, None]
    pictures = F.interpolate(pictures, 32, mode="bilinear").cuda()
    labels = torch.tensor(digits.target).cuda()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).cuda()
    test, train = order[:360], order[360:]
    torch.manual_seed(0)
    model = timm.create_model("spikingformer_cml_2_384", in_chans=1, num_classes=10).cuda()
    model = model.to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    start, curve, seen = time.monotonic(), [], 0
    while time.monotonic() - start < seconds and len(curve) < 40:
        model.train()
        for rows in train[torch.randperm(len(train), device="cuda")].split(128)[:-1]:
            with torch.autocast("cuda", torch.bfloat16):
                loss = F.cross_entropy(model(pictures[rows]), labels[rows])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            seen += len(rows)
        model.eval()
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            accuracy = (model(pictures[test]).argmax(1) == labels[test]).float().mean().item()
        curve.append({"loss": loss.item(), "accuracy": accuracy, "seconds": time.monotonic() - start})
    with torch.no_grad(), use_backend("reference"):
        by_definition = (model(pictures[test]).argmax(1) == labels[test]).float().mean().item()
    report.add(curve=curve, pictures_seen=seen, accuracy_by_definition=by_definition, ok=curve[-1]["accuracy"] > 0.9)


# ------------------------------------------------------------------------------------------------------------ main


def run_section(section: str, shard: int, folder: Path, seconds: float, compile_plain: bool) -> None:
    """In the section's own process."""
    report = Report(folder / f"{section}-{shard}.json", section)
    torch.backends.cudnn.allow_tf32 = False  # float32 parity means float32
    deadline = time.monotonic() + 0.7 * seconds
    with report.guard(section=section):
        if section == "parity":
            parity_section(report, shard)
        elif section == "warm":
            warm_section(report, shard)
        elif section == "kernels":
            kernels_section(report)
        elif section == "learn":
            learn_section(report, min(40.0, 0.5 * seconds))
        else:
            table_section(report, section, compile_plain and section == "compiled", deadline)


def lines_of(result: dict[str, Any]) -> list[str]:
    """What the summary says of one result; nothing for most."""
    what = result.get("kernel") or result.get("row") or result.get("competitor") or ""
    if "error" in result:
        return [f"  ERROR {what} {result.get('dtype', '')}: {result['error'][:300]}"]
    if result.get("ok") is False:
        return [f"  RED {what} {result}"[:300]]
    if "parity" in result:
        return [f"  {what} parity {result['parity']}"]
    if "pictures_per_second" in result:
        speeds = "  ".join(f"{n} {v:.0f}/s" for n, v in result["pictures_per_second"].items())
        memory = "  ".join(f"{n} {v:.0f} MB" for n, v in result["step_megabytes"].items())
        return [f"  {what} b{result['batch']} parity {'ok' if result['parity_ok'] else 'RED'}: {speeds} | {memory}"]
    if "forward_share_of_copy" in result:
        ways = ", ".join(
            f"{way} {result[f'{way}_ms']:.3f} ms {result[f'{way}_share_of_copy']:.0%} of a copy"
            for way in ("forward", "backward")
        )
        return [f"  {what} ({result['setting']}): {ways}"]
    return [f"  {what} {result}"[:300]] if {"gigabytes_per_second", "teraflops", "curve", "warm"} & set(result) else []


def gather(work: Path, output: Path, machine: dict[str, Any]) -> str:
    """Writes what all sections have found so far; returns the summary."""
    found, lines = [], []
    for path in sorted(work.glob("*.json"), key=lambda p: p.stat().st_mtime):
        found.append(json.loads(path.read_text()))
        results = found[-1]["results"]
        lines.append(f"{path.stem}: {len(results)} results")
        lines += [line for result in results for line in lines_of(result)]
    text = "\n".join(lines)
    (output / "results.json").write_text(json.dumps({"machine": machine, "sections": found}, indent=1))
    (output / "summary.txt").write_text(text + "\n")
    logs = [f"===== {p.name}\n{p.read_text(errors='replace')[-200_000:]}" for p in sorted(work.glob("*.log"))]
    (output / "log.txt").write_text("\n".join(logs))
    return text


def run_together(jobs: list[tuple[str, int]], work: Path, seconds: float, extra: list[str]) -> None:
    """Each job (section, shard) in a process of its own, all at once; stops what is still running at the end."""
    running = []
    for section, shard in jobs:
        command = [sys.executable, "-m", "benchmarks.gpu", "--one", section, "--shard", str(shard)]
        command += ["--output", str(work), "--seconds", str(seconds), *extra]
        log = (work / f"{section}-{shard}.log").open("w")
        running.append((section, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT), log))
    end = time.monotonic() + seconds
    try:
        for section, process, _ in running:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                print(f"{section}: stopped after {seconds:.0f} s", flush=True)
    finally:
        for _, process, log in running:
            process.kill()
            process.wait()
            log.close()


def main() -> None:
    """Runs the sections one after the other, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", "benchmarks/results/gpu")))
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything")
    parser.add_argument("--sections", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile of the plain composition out")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--shard", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=600, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return run_section(args.one, args.shard, args.output, args.seconds, not args.no_compile)
    unknown = [s for s in args.sections.split(",") if s not in SECTIONS]
    if unknown:
        raise SystemExit(f"unknown section {unknown[0]!r}: use one of {', '.join(SECTIONS)}")
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: this script measures one; on CPU run benchmarks/cpu_models.py")
    from benchmarks.machine import describe_machine

    def leave(*_: Any) -> None:
        raise SystemExit("stopped: what was measured so far is written")

    signal.signal(signal.SIGTERM, leave)
    machine = describe_machine()
    args.output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    text = "nothing ran"
    with tempfile.TemporaryDirectory() as folder:
        for section in args.sections.split(","):
            seconds = min(SECTIONS[section], end - time.monotonic())
            if seconds < 30:
                print(f"{section}: skipped, out of time", flush=True)
                continue
            start = time.monotonic()
            jobs = [(section, 0)]
            if section == "parity":
                jobs = [(s, i) for s in ("parity", "warm") for i in range(SHARDS)]
                jobs += [] if args.no_compile else [("warm", SHARDS)]
            try:
                run_together(jobs, Path(folder), seconds, ["--no-compile"] if args.no_compile else [])
            finally:
                text = gather(Path(folder), args.output, machine)
            print(f"== {section}: {time.monotonic() - start:.0f} s", flush=True)
        print(text, flush=True)


if __name__ == "__main__":
    main()
