"""The CPU table: our models against the published composition, torch.compile of it, and SpikingJelly's own model.

    python -m benchmarks.cpu_models [--rows TEXT] [--no-compile] [--output FILE]

Per row, parity is proven first (float64 logits and gradients, float32 error on the timed input); then all competitors
run interleaved in one process, and medians are compared. Firing rates stand beside. Activation memory is measured in
a process of its own per competitor (peak RSS less what stood before the step).
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

import spikingformer
from benchmarks.plain import PlainModel, calibrate
from spikingformer.benchmarks import firing_rate
from spikingformer.benchmarks.throughput import example_input
from spikingformer.engine import Engine

ROWS = {  # name: (model, batch, mode, rounds)
    "inference CIFAR 4-384 b32": ("spikingformer_cml_4_384", 32, "inference", 7),
    "inference CIFAR 4-384 b1": ("spikingformer_cml_4_384", 1, "inference", 15),
    "inference ImageNet 8-384 b2": ("spikingformer_cml_8_384", 2, "inference", 5),
    "inference ImageNet 8-384 b1": ("spikingformer_cml_8_384", 1, "inference", 5),
    "inference DVS 2-256 T=16 b4": ("spikingformer_cml_2_256", 4, "inference", 5),
    "training CIFAR 4-384 b16": ("spikingformer_cml_4_384", 16, "training", 5),
    "training DVS 2-256 T=16 b4": ("spikingformer_cml_2_256", 4, "training", 5),
}


def prepare(name: str, batch: int):
    torch.manual_seed(0)
    model = timm.create_model(name)
    calibrate(model, example_input(model, max(batch, 4), torch.device("cpu"), seed=1))
    return model.to(memory_format=torch.channels_last), example_input(model, batch, torch.device("cpu"))


def step(model, x, mode):
    if mode == "inference":
        with torch.inference_mode():
            return model(x)
    model.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(x), torch.arange(len(x)) % model_classes(model))
    loss.backward()
    return loss


def model_classes(model) -> int:
    inner = getattr(model, "_orig_mod", model)
    return getattr(inner, "m", inner).num_classes


def parity(model, plain, x, mode) -> dict:
    """Proves equal work before a clock starts; leaves the process where it is broken.

    In float64, logits and all gradients of both are equal to 1e-8. In float32 a sum in another order can flip a spike
    that sits on the threshold, so there each is compared with the float64 truth, on the input that is timed
    (`float32_errors`).
    """
    few = x[: 1 if mode == "inference" else 2].double()
    exact, other = copy.deepcopy(model).double(), copy.deepcopy(plain).double()
    exact.train(mode == "training"), other.train(mode == "training")
    step(exact, few, "training"), step(other, few, "training")
    theirs = dict(other.m.named_parameters())
    for key, p in exact.named_parameters():
        torch.testing.assert_close(p.grad, theirs[key].grad, rtol=1e-7, atol=1e-9, msg=key)
    with torch.no_grad():
        torch.testing.assert_close(exact(few), other(few), rtol=1e-8, atol=1e-9)
        model.train(mode == "training"), plain.train(mode == "training")
        ours, rival = float32_errors(exact(x.double()), model(x), plain(x))
    return {"float64": "equal", "float32_error_ours": ours, "float32_error_plain": rival}


def float32_errors(truth: torch.Tensor, ours: torch.Tensor, plain: torch.Tensor) -> tuple[float, float]:
    """Errors of our logits and the plain form's, as shares of the spread; leaves where ours are out of proportion.

    The median over samples is given: one spike that sits on its threshold and flips moves its own sample by up to a
    fifth of the spread, in either form, and leaves the others alone. Held are the median, at three times the plain
    form's, and the mean, at that and 0.05 more; a wrong kernel moves every sample by about 1.
    """
    scale = truth.std().item() or 1.0
    mine, rival = ((logits - truth).abs().flatten(1).mean(1) / scale for logits in (ours, plain))
    (median, mean), (rival_median, rival_mean) = ((e.median().item(), e.mean().item()) for e in (mine, rival))
    if median > 3 * rival_median + 0.01 or mean > 3 * rival_mean + 0.05:
        raise SystemExit(
            f"parity is broken: our errors {median:.4f} (median), {mean:.4f} (mean) of the logits' spread, the "
            f"competitor's {rival_median:.4f}, {rival_mean:.4f}"
        )
    return median, rival_median


def timed_row(name: str, model_name: str, batch: int, mode: str, rounds: int, compiled: bool) -> dict:
    model, x = prepare(model_name, batch)
    plain = PlainModel(model)
    checked = parity(model, plain, x, mode)
    rate = firing_rate(model, x)
    runners = {"ours": model, "plain": plain}
    if mode == "inference":
        runners |= {"engine float32": Engine(model), "engine int8": Engine(model, "int8")}
    warmup = {}
    if compiled:
        runners["compiled"] = torch.compile(PlainModel(model).train(mode == "training"))
    for key, runner in runners.items():
        if isinstance(runner, torch.nn.Module):
            runner.train(mode == "training")
        start = time.perf_counter()
        step(runner, x, mode)
        warmup[key] = time.perf_counter() - start
    times: dict[str, list[float]] = {key: [] for key in runners}
    for _ in range(rounds):
        for key, runner in runners.items():
            start = time.perf_counter()
            step(runner, x, mode)
            times[key].append(time.perf_counter() - start)
    median = {key: statistics.median(t) for key, t in times.items()}
    return {
        "row": name,
        "model": model_name,
        "batch": batch,
        "mode": mode,
        "rounds": rounds,
        "firing_rate": rate,
        "parity": checked,
        "samples_per_second": {k: batch / m for k, m in median.items()},
        "speedup_over_plain": {k: median["plain"] / m for k, m in median.items() if k != "plain"},
        "first_call_seconds": warmup,
        "all_seconds": times,
    }


def activation_memory(kind: str, model_name: str, batch: int) -> None:
    """Runs in a process of its own: prints the peak RSS of two training steps less that of the imports, in MB."""
    torch.nn.functional.conv2d(torch.zeros(1, 3, 8, 8), torch.zeros(4, 3, 3, 3)).sum()  # libraries load lazily
    imports = resident_mb("VmRSS")
    torch.manual_seed(0)
    model = timm.create_model(model_name).to(memory_format=torch.channels_last)
    x = example_input(model, batch, torch.device("cpu"))
    runner = (PlainModel(model) if kind == "plain" else model).train()
    for _ in range(2):
        step(runner, x, "training")
    peak = resident_mb("VmHWM")
    print(json.dumps({"peak_mb": peak, "imports_mb": imports, "step_mb": peak - imports}))


def resident_mb(field: str) -> float:
    """Of this process alone: ru_maxrss would start at the peak of the process that started it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def memory_rows() -> list[dict]:
    rows = []
    for name, batch in (("spikingformer_cml_4_384", 16), ("spikingformer_cml_2_256", 4)):
        row = {"model": name, "batch": batch}
        for kind in ("ours", "plain"):
            argv = [sys.executable, "-m", "benchmarks.cpu_models", "--memory", kind, name, str(batch)]
            out = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
            row[kind] = json.loads(out.strip().splitlines()[-1])
        row["ratio"] = row["ours"]["step_mb"] / row["plain"]["step_mb"]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="", help="only rows whose name contains this")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        return activation_memory(args.memory[0], args.memory[1], int(args.memory[2]))
    from benchmarks.machine import describe_machine

    result = {**describe_machine(), "threads": args.threads, "spikingformer": spikingformer.__version__, "rows": []}
    for name, row in ROWS.items():
        if args.rows not in name:
            continue
        measured = timed_row(name, *row, compiled=not args.no_compile)
        result["rows"].append(measured)
        speeds = "  ".join(f"{k} {v:.2f}/s" for k, v in measured["samples_per_second"].items())
        over = "  ".join(f"{k} {v:.2f}x" for k, v in measured["speedup_over_plain"].items())
        print(f"{name}: {speeds}  |  over plain: {over}  |  firing {measured['firing_rate']:.1%}", flush=True)
        if args.output:
            args.output.write_text(json.dumps(result, indent=1))
    if not args.rows:
        result["activation_memory"] = memory_rows()
        for row in result["activation_memory"]:
            print(f"memory {row['model']} b{row['batch']}: {row['ratio']:.2f} of the plain composition", flush=True)
    if args.output:
        args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
