"""The CPU kernels against torch's dense products, over the firing rate.

    python -m benchmarks.cpu_kernels [--rounds N] [--isa NAME] [--cpu-time] [--output FILE] [--plot PICTURE]

Parity is proven first for every line; then spike and dense product run interleaved in one process and medians are
compared. With --cpu-time one thread runs and its CPU time counts, which other work on the machine disturbs little
(wall-clock times do not mean much on a shared machine). "crossing" is the firing rate at which the two meet,
interpolated, or null where the spike product stays ahead. The LIF line compares with a copy of the same bytes.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from spikingformer import native
from spikingformer.native import ops, product_op
from spikingformer.neurons import LIFConfig

from .machine import describe_machine

CLOCK = [time.perf_counter]
RATES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7)
SHAPES = (  # images, channels in, out, side, kernel: CIFAR 4-384 at T * B = 64, two of its blocks' products
    (64, 384, 384, 8, 1),
    (64, 384, 1536, 8, 1),
    (64, 1536, 384, 8, 1),
    (16, 48, 96, 32, 3),
    (16, 96, 192, 32, 3),
    (32, 192, 384, 16, 3),
    (64, 384, 384, 8, 3),
)


def interleaved(functions: list[Callable[[], object]], rounds: int) -> list[float]:
    """Median milliseconds of each function; they take turns."""
    times: list[list[float]] = [[] for _ in functions]
    for f in functions:
        f()
    for _ in range(rounds):
        for f, kept in zip(functions, times, strict=True):
            start = CLOCK[0]()
            f()
            kept.append((CLOCK[0]() - start) * 1e3)
    return [statistics.median(t) for t in times]


def crossing(rates: list[float], speedups: list[float]) -> float | None:
    """The rate at which the speed-up falls to 1, interpolated; None where it never does."""
    points = list(zip(rates, speedups, strict=True))
    for (r0, s0), (r1, s1) in itertools.pairwise(points):
        if s0 >= 1 > s1:
            return round(r0 + (r1 - r0) * (s0 - 1) / (s0 - s1), 3)
    return None if speedups[-1] >= 1 else 0.0


def _pack_and_multiply(s: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return product_op.product_forward(product_op.pack_spikes(s), weight, None)


def product_lines(rounds: int) -> list[dict]:
    """One line a shape: times and speed-ups over the firing rate, packing included."""
    lines = []
    for n, c, o, side, k in SHAPES:
        torch.manual_seed(0)
        weight, grad = torch.randn(o, c, k, k), torch.randn(n, side, side, o).permute(0, 3, 1, 2)
        weight = torch.nn.Parameter(weight, requires_grad=False)
        rows = []
        for rate in RATES:
            s = (torch.rand(n, side, side, c) < rate).float().permute(0, 3, 1, 2)
            packed = product_op.pack_spikes(s)
            dense = F.conv2d(s, weight, padding=k // 2)
            torch.testing.assert_close(product_op.product_forward(packed, weight, None), dense, rtol=1e-3, atol=1e-2)
            dense_gradient = product_op._dense_weight_gradient(s, grad, weight)
            torch.testing.assert_close(
                product_op.product_weight_gradient(packed, grad, k), dense_gradient, rtol=1e-3, atol=0.1
            )
            times = interleaved(
                [
                    partial(F.conv2d, s, weight, padding=k // 2),
                    partial(_pack_and_multiply, s, weight),
                    partial(product_op._dense_weight_gradient, s, grad, weight),
                    partial(product_op.product_weight_gradient, packed, grad, k),
                ],
                rounds,
            )
            names = ("dense_ms", "spike_ms", "dense_gradient_ms", "spike_gradient_ms")
            rows.append({"rate": round(packed.rate, 4), **dict(zip(names, (round(t, 3) for t in times), strict=True))})
        rates = [r["rate"] for r in rows]
        line = {
            "product": f"{c}->{o} at {side}x{side}, kernel {k}, {n} images",
            "rows": rows,
            "crossing_forward": crossing(rates, [r["dense_ms"] / r["spike_ms"] for r in rows]),
            "crossing_gradient": crossing(rates, [r["dense_gradient_ms"] / r["spike_gradient_ms"] for r in rows]),
        }
        lines.append(line)
        print(line["product"])
        for r in rows:
            print(
                f"  rate {r['rate']:.2f}: forward {r['dense_ms']:.2f} -> {r['spike_ms']:.2f} ms "
                f"({r['dense_ms'] / r['spike_ms']:.2f}x), weight gradient {r['dense_gradient_ms']:.2f} -> "
                f"{r['spike_gradient_ms']:.2f} ms ({r['dense_gradient_ms'] / r['spike_gradient_ms']:.2f}x)"
            )
        print(
            f"  crossing: forward {line['crossing_forward']}, weight gradient {line['crossing_gradient']}", flush=True
        )
    return lines


def plot(lines: list[dict], path: str) -> None:
    """Time against the firing rate: a panel for the forward, one for the weight gradient; dense is 1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, form in zip(figure.subplots(1, 2), ("", "gradient_"), strict=True):
        for line in lines:
            rates = [100 * r["rate"] for r in line["rows"]]
            shares = [r[f"spike_{form}ms"] / r[f"dense_{form}ms"] for r in line["rows"]]
            axes.plot(rates, shares, marker="o", label=line["product"])
        axes.axhline(1, color="black", linestyle="--", label="dense product (oneDNN)")
        axes.set(xlabel="inputs that fire, %", ylim=(0, None), title="weight gradient" if form else "forward")
    figure.axes[0].set_ylabel("time over the dense product's")
    figure.axes[0].legend(fontsize="x-small")
    figure.savefig(path, dpi=110)


def lif_line(rounds: int) -> dict:
    """ns per neuron-step at [4, 16, 384, 8, 8]: copy, forward, forward and backward, SpikingJelly's LIFNode."""
    from spikingjelly.activation_based import functional, neuron, surrogate

    rival = neuron.LIFNode(tau=2.0, surrogate_function=surrogate.Sigmoid(4.0), detach_reset=True, step_mode="m")
    torch.manual_seed(0)
    x = torch.randn(4, 16, 384, 8, 8) * 1.5
    grad, target = torch.randn_like(x), torch.empty_like(x)
    leaf = x.clone().requires_grad_()

    def forward(current: torch.Tensor) -> torch.Tensor:
        return ops.lif(current, LIFConfig(), want_membrane=False)[0]  # as layers call it

    def both() -> None:
        torch.autograd.grad(forward(leaf), leaf, grad)

    def rival_forward(current: torch.Tensor) -> torch.Tensor:
        functional.reset_net(rival)
        return rival(current)

    def rival_both() -> None:
        torch.autograd.grad(rival_forward(leaf), leaf, grad)

    ours = forward(leaf)
    theirs = rival_forward(leaf)
    assert torch.equal(ours, theirs), "parity is broken: spikes differ"
    torch.testing.assert_close(torch.autograd.grad(ours, leaf, grad)[0], torch.autograd.grad(theirs, leaf, grad)[0])
    rate = ours.mean().item()
    runs = [lambda: target.copy_(x), lambda: forward(x), both, lambda: rival_forward(x), rival_both]
    times = interleaved(runs, rounds * 3)
    names = ("copy", "forward", "forward_backward", "spikingjelly_forward", "spikingjelly_forward_backward")
    line = {f"{n}_ns": round(t * 1e6 / x.numel(), 3) for n, t in zip(names, times, strict=True)}
    print(f"LIF [4,16,384,8,8], rate {rate:.2f}: {line}", flush=True)
    return {"rate": round(rate, 4), **line}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved runs of each form")
    parser.add_argument("--isa", help="instruction set to force (default: the best)")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, CPU time instead of wall-clock time")
    parser.add_argument("--output", help="file for the JSON result")
    parser.add_argument("--lif-only", action="store_true", help="leave the products out")
    parser.add_argument("--plot", help="picture of time against the firing rate")
    args = parser.parse_args()
    if args.cpu_time:
        torch.set_num_threads(1)
        CLOCK[0] = time.process_time
    with torch.no_grad(), native.use_isa(args.isa or native.available_isas()[0]):
        status = native.status()
        print(f"{status.isa}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        result = {"machine": describe_machine(), "isa": status.isa, "compiler": status.compiler,
                  "clock": "CPU time, 1 thread" if args.cpu_time else "wall clock"}  # fmt: skip
        with torch.enable_grad():
            result["lif"] = lif_line(args.rounds)
        if not args.lif_only:
            result["products"] = product_lines(args.rounds)
    if args.plot:
        plot(result["products"], args.plot)
    if args.output:
        with open(args.output, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
