"""Pictures a second against the firing rate: both engines and the published composition in plain PyTorch.

    python -m benchmarks.engine_rates [--model NAME] [--batch N] [--rounds N] [--output FILE]

One calibrated model with random weights; adding a number to every BatchNorm's bias moves its firing rate. For each
rate parity comes first: the float32 engine may be no further from the model in float64 than three times what the plain
composition is (a current at the threshold flips a spike in either), the int8 engine equals its integer definition. Then
all three take turns in one process and medians are compared.
"""

import argparse
import copy
import json
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.cpu_kernels import interleaved
from benchmarks.cpu_models import float32_errors, prepare, step
from benchmarks.machine import describe_machine
from benchmarks.plain import PlainModel
from spikingformer.benchmarks import firing_rate
from spikingformer.engine import Engine, build_program, int8_reference

SHIFTS = (-1.0, -0.6, -0.3, 0.0, 0.4, 0.8)


def measure(model: nn.Module, x: torch.Tensor, rounds: int) -> dict:
    program = build_program(model)
    engines = {form: Engine(program, form) for form in ("float32", "int8")}
    plain = PlainModel(model).eval()
    with torch.inference_mode():
        float32_errors(copy.deepcopy(model).double()(x.double()), engines["float32"](x), plain(x))
    assert torch.equal(engines["int8"](x[:1]), int8_reference.run(program, x[:1])[-1].float())
    runners = {"plain": plain, **engines}
    times = interleaved([partial(step, runner, x, "inference") for runner in runners.values()], rounds)
    per_second = {name: 1e3 * len(x) / ms for name, ms in zip(runners, times, strict=True)}
    return {
        "firing_rate": firing_rate(model, x),
        "pictures_per_second": per_second,
        "int8_over_plain": per_second["int8"] / per_second["plain"],
        "float32_over_plain": per_second["float32"] / per_second["plain"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="spikingformer_cml_4_384")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(2)
    base, x = prepare(args.model, args.batch)
    result = {**describe_machine(), "threads": 2, "model": args.model, "batch": args.batch, "rows": []}
    for shift in SHIFTS:
        model = copy.deepcopy(base).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.data += shift
        row = measure(model, x, args.rounds)
        result["rows"].append(row)
        speeds = ", ".join(f"{k} {v:.1f}/s" for k, v in row["pictures_per_second"].items())
        over = f"int8 {row['int8_over_plain']:.2f}x, float32 {row['float32_over_plain']:.2f}x"
        print(f"firing {row['firing_rate']:.1%}: {speeds}; {over}", flush=True)
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
