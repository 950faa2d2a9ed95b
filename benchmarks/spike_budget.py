"""What a model trained with a spike budget gains: accuracy, firing rate, energy and pictures a second, side by side.

    python -m benchmarks.spike_budget --data FOLDER [--output FILE] CHECKPOINT ...

CHECKPOINT: models of one size trained on CIFAR-10, for example fine-tuned with `sparsity=...` (a recipe field: weight
in the loss of the synaptic operations). Accuracy is that of both engines on all 10,000 test pictures; the int8 engine
equals its integer definition on some of them before a clock starts. Times are of real test pictures, interleaved.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch

from benchmarks.machine import describe_machine
from benchmarks.plain import PlainModel
from spikingformer.benchmarks import firing_rate
from spikingformer.data.cifar import load_cifar
from spikingformer.engine import Engine, int8_reference
from spikingformer.training.checkpoint import load_model


def test_part(folder: Path, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised pictures (N, 3, 32, 32) and labels (N,)."""
    part = load_cifar("cifar10", folder, "test")
    shape = (1, 3, 1, 1)
    pictures = (part.pictures.float() / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    return pictures, part.labels


def top1(runner, pictures: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.inference_mode():
        hits = sum(
            (runner(x).argmax(1) == y).sum().item() for x, y in zip(pictures.split(250), labels.split(250), strict=True)
        )
    return 100 * hits / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, runners = [], {}
    for name in args.checkpoints:
        model, info = load_model(name)
        model.eval()
        pictures, labels = test_part(args.data, info.mean, info.std)
        engines = {form: Engine(copy.deepcopy(model), form) for form in ("float32", "int8")}
        assert torch.equal(
            engines["int8"](pictures[:8]), int8_reference.run(engines["int8"].program, pictures[:8])[-1].float()
        )
        row = {"checkpoint": name, "firing_rate": firing_rate(model, pictures[:512])}
        row |= {f"top1_{form}": top1(engine, pictures, labels) for form, engine in engines.items()}
        rows.append(row)
        runners |= {
            (len(rows) - 1, form): runner for form, runner in {"plain": PlainModel(model).eval(), **engines}.items()
        }
    x = pictures[: args.batch]
    seconds: dict = {key: [] for key in runners}
    with torch.inference_mode():
        for round_ in range(args.rounds + 1):  # the first one warms up
            for key, runner in runners.items():
                start = time.perf_counter()
                runner(x)
                if round_:
                    seconds[key].append(time.perf_counter() - start)
    for (i, form), times in seconds.items():
        rows[i].setdefault("pictures_per_second", {})[form] = args.batch / statistics.median(times)
    for row in rows:
        speeds = ", ".join(f"{k} {v:.0f}/s" for k, v in row["pictures_per_second"].items())
        print(
            f"{row['checkpoint']}: firing {row['firing_rate']:.1%}, top-1 float32 {row['top1_float32']:.2f} %, int8 "
            f"{row['top1_int8']:.2f} %; {speeds}",
            flush=True,
        )
    if args.output:
        result = {**describe_machine(), "threads": args.threads, "batch": args.batch, "rows": rows}
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
