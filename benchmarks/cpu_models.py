"""The CPU table: our models against the published composition, torch.compile of it, and SpikingJelly's own model.

    python -m benchmarks.cpu_models [--rows TEXT] [--rounds N] [--no-compile] [--output FILE]
    python -m benchmarks.cpu_models --checkpoint cifar10 [--pictures FOLDER] ...

Per row, parity is proven first (float64 logits and gradients, float32 error on the timed input); then all competitors
run interleaved in one process, and medians are compared. Firing rates stand beside. Spikformer rows also run
SpikingJelly 2.0's Spikformer with equal weights. Weights are random, calibrated to fire, and input is random;
--checkpoint takes a trained model that comes with the package, and --pictures CIFAR-10's test pictures, since a trained
model fires differently on noise.
Activation memory is measured in a process of its own per competitor (peak RSS less what stood before the step).
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

import spikingformer
from benchmarks.plain import PlainModel
from spikingformer.benchmarks import calibrate, firing_rate
from spikingformer.benchmarks.throughput import example_input
from spikingformer.data.cifar import load_cifar
from spikingformer.engine import Engine
from spikingformer.export.spikingjelly import from_spikingjelly, to_spikingjelly
from spikingformer.models import Spikformer
from spikingformer.weights import shipped_weights

ROWS = {  # name: (model, batch, mode, rounds)
    "inference CIFAR 4-384 b32": ("spikingformer_cml_4_384", 32, "inference", 7),
    "inference CIFAR 4-384 b1": ("spikingformer_cml_4_384", 1, "inference", 15),
    "inference ImageNet 8-384 b2": ("spikingformer_cml_8_384", 2, "inference", 5),
    "inference ImageNet 8-384 b1": ("spikingformer_cml_8_384", 1, "inference", 5),
    "inference DVS 2-256 T=16 b4": ("spikingformer_cml_2_256", 4, "inference", 5),
    "training CIFAR 4-384 b16": ("spikingformer_cml_4_384", 16, "training", 5),
    "training DVS 2-256 T=16 b4": ("spikingformer_cml_2_256", 4, "training", 5),
    "inference CIFAR Spikformer 4-384 b32": ("spikformer_cml_4_384", 32, "inference", 7),
    "inference CIFAR Spikformer 4-384 b1": ("spikformer_cml_4_384", 1, "inference", 15),
    "training CIFAR Spikformer 4-384 b16": ("spikformer_cml_4_384", 16, "training", 5),
}
TRAINED = "spikingformer_cml_4_384"  # the model that comes with trained weights
PUBLISHED_SIZE = "cifar10_minutes"  # the tag whose weights have the model's own size; the others are small


def trained_rows(tag: str) -> dict[str, tuple[str, int, str, int]]:
    data = "CIFAR" if tag.startswith("cifar10") else tag
    size, batch = ("4-384", 16) if tag == PUBLISHED_SIZE else ("small", 64)
    return {
        f"inference {data} trained {size} b32": (f"{TRAINED}.{tag}", 32, "inference", 7),
        f"inference {data} trained {size} b1": (f"{TRAINED}.{tag}", 1, "inference", 15),
        f"training {data} trained {size} b{batch}": (f"{TRAINED}.{tag}", batch, "training", 5),
    }


class SpikingJelly(torch.nn.Module):
    """SpikingJelly 2.0's own Spikformer with the weights of one of ours: multi-step, in torch on a CPU.

    Its neurons keep their voltages after a call, so each call resets them first. Logits are the mean over time.
    """

    def __init__(self, model: Spikformer):
        super().__init__()
        from spikingjelly.activation_based import functional
        from spikingjelly.activation_based.model import spikformer

        c = model.config
        self.reset = functional.reset_net
        self.m = spikformer.Spikformer(
            T=c.time_steps,
            in_channels=c.in_chans,
            img_size_h=c.img_size[0],
            img_size_w=c.img_size[1],
            patch_size=c.patch_size,
            num_classes=c.num_classes,
            embed_dims=c.embed_dim,
            num_heads=c.num_heads,
            mlp_ratio=c.mlp_ratio,
            depths=c.depth,
        )
        self.take_weights(model)

    def take_weights(self, model: Spikformer) -> None:
        self.m.load_state_dict(to_spikingjelly(model), strict=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.reset(self.m)
        return self.m(x).mean(0)


def prepare(name: str, batch: int, pictures: Path | None = None):
    """A model and its input: trained weights for MODEL.TAG, else calibrated random ones; noise without `pictures`."""
    torch.manual_seed(0)
    trained = "." in name
    model = timm.create_model(name, pretrained=trained)
    if not trained:
        calibrate(model, example_input(model, max(batch, 4), torch.device("cpu"), seed=1))
    x = test_pictures(model, batch, pictures) if pictures else example_input(model, batch, torch.device("cpu"))
    return model.to(memory_format=torch.channels_last), x


def test_pictures(model, batch: int, folder: Path) -> torch.Tensor:
    """The first pictures of CIFAR-10's test part, normalised as the model's checkpoint says."""
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return (load_cifar("cifar10", folder, "test").pictures[:batch].float() / 255 - mean) / std


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


def parity(model, rivals: dict, x, mode: str) -> dict:
    """Proves equal work before a clock starts; leaves the process where it is broken.

    In float64, logits and all gradients of all are equal. In float32 a sum in another order can flip a spike that sits
    on the threshold, so there each is compared with the float64 truth, on the input that is timed (`float32_errors`).
    """
    for rival in rivals.values():
        equal_in_float64(model, rival, x[: 1 if mode == "inference" else 2].double(), mode)
    result: dict = {"float64": "equal"}
    with torch.no_grad():
        truth = copy.deepcopy(model).double().train(mode == "training")(x.double())
        ours = model.train(mode == "training")(x)
        for name, rival in rivals.items():
            errors = float32_errors(truth, ours, rival.train(mode == "training")(x))
            result["float32_error_ours"], result[f"float32_error_{name}"] = errors
    return result


def equal_in_float64(model, rival, x, mode: str) -> None:
    """Gradients and logits in the row's mode, then logits in eval mode with the running statistics of that step."""
    exact, other = (copy.deepcopy(m).double().train(mode == "training") for m in (model, rival))
    if isinstance(other, SpikingJelly):  # a bias joins a running mean: in float32 that sum was rounded
        other.take_weights(exact)
    step(exact, x, "training"), step(other, x, "training")
    theirs = gradients(other, model)
    for key, p in exact.named_parameters():
        if key in theirs:
            torch.testing.assert_close(p.grad, theirs[key], rtol=1e-7, atol=1e-9, msg=key)
    with torch.no_grad():
        torch.testing.assert_close(exact(x), other(x), rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(exact.eval()(x), other.eval()(x), rtol=1e-8, atol=1e-9)


def gradients(rival, model) -> dict[str, torch.Tensor]:
    """A competitor's gradients by our names; SpikingJelly has no biases before BatchNorm."""
    found = {key: p.grad for key, p in rival.m.named_parameters()}
    if not isinstance(rival, SpikingJelly):
        return found
    ours = from_spikingjelly(rival.m.state_dict() | found, model)
    return {key: value for key, value in ours.items() if not key.endswith("conv.bias")}


def float32_errors(truth: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """Errors of our logits and a competitor's, as shares of the spread; leaves where ours are out of proportion.

    The median over samples is given: one spike that sits on its threshold and flips moves its own sample by up to a
    fifth of the spread, in either form, and leaves the others alone. Held are the median, at three times the
    competitor's and 0.03 more, and the mean, at that and 0.05; a wrong kernel moves every sample by about 1.
    """
    scale = truth.std().item() or 1.0
    mine, rival = ((logits - truth).abs().flatten(1).mean(1) / scale for logits in (ours, theirs))
    (median, mean), (rival_median, rival_mean) = ((e.median().item(), e.mean().item()) for e in (mine, rival))
    if median > 3 * rival_median + 0.03 or mean > 3 * rival_mean + 0.05:
        raise SystemExit(
            f"parity is broken: our errors {median:.4f} (median), {mean:.4f} (mean) of the logits' spread, the "
            f"competitor's {rival_median:.4f}, {rival_mean:.4f}"
        )
    return median, rival_median


def timed_row(
    name: str, model_name: str, batch: int, mode: str, rounds: int, compiled: bool, pictures: Path | None
) -> dict:
    model, x = prepare(model_name, batch, pictures)
    rivals: dict = {"plain": PlainModel(model)}
    if isinstance(model, Spikformer):
        rivals["spikingjelly"] = SpikingJelly(model)
    checked = parity(model, rivals, x, mode)
    rate = firing_rate(model, x)
    runners = {"ours": model, **rivals}
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
        "weights": "trained" if "." in model_name else "random, calibrated",
        "input": "the first pictures of CIFAR-10's test part" if pictures else "random",
        "batch": batch,
        "mode": mode,
        "rounds": rounds,
        **({"spikingjelly": version("spikingjelly")} if "spikingjelly" in rivals else {}),
        "firing_rate": rate,
        "parity": checked,
        "samples_per_second": {k: batch / m for k, m in median.items()},
        **{f"speedup_over_{r}": {k: median[r] / m for k, m in median.items() if k != r} for r in rivals},
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
    parser.add_argument("--rounds", type=int, help="instead of each row's own")
    parser.add_argument("--checkpoint", choices=[e.tag for e in shipped_weights().values() if e.model == TRAINED])
    parser.add_argument("--pictures", type=Path, help="folder of cifar-10-batches-py, with --checkpoint cifar10")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.pictures and not (args.checkpoint or "").startswith("cifar10"):
        parser.error("--pictures are CIFAR-10's: give --checkpoint cifar10 or cifar10_minutes too")
    torch.set_num_threads(args.threads)
    if args.memory:
        return activation_memory(args.memory[0], args.memory[1], int(args.memory[2]))
    from benchmarks.machine import describe_machine

    result = {**describe_machine(), "threads": args.threads, "spikingformer": spikingformer.__version__, "rows": []}
    for name, (model, batch, mode, rounds) in (trained_rows(args.checkpoint) if args.checkpoint else ROWS).items():
        if args.rows not in name:
            continue
        measured = timed_row(name, model, batch, mode, args.rounds or rounds, not args.no_compile, args.pictures)
        result["rows"].append(measured)
        parts = ["  ".join(f"{k} {v:.2f}/s" for k, v in measured["samples_per_second"].items())]
        for rival in ("plain", "spikingjelly"):
            if over := measured.get(f"speedup_over_{rival}"):
                parts.append(f"over {rival}: " + "  ".join(f"{k} {v:.2f}x" for k, v in over.items()))
        print(f"{name}: {'  |  '.join(parts)}  |  firing {measured['firing_rate']:.1%}", flush=True)
        if args.output:
            args.output.write_text(json.dumps(result, indent=1))
    if not args.rows and not args.checkpoint:
        result["activation_memory"] = memory_rows()
        for row in result["activation_memory"]:
            print(f"memory {row['model']} b{row['batch']}: {row['ratio']:.2f} of the plain composition", flush=True)
    if args.output:
        args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
