"""Puts trained weights into the package: file, row of the table, model card.

python -m spikingformer.reproduce.ship runs/small/digits/seed-0/best.safetensors digits --recipe RECIPE --result FILE
"""

import argparse
import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch

import spikingformer.weights
from spikingformer.files import write_atomic
from spikingformer.training.checkpoint import ModelInfo, read_model_file, save_model
from spikingformer.weights import TABLE_FILE, Shipped, read_table

WEIGHTS_FOLDER = Path(spikingformer.weights.__file__).resolve().parent


def ship(
    checkpoint: Path, tag: str, recipe: str, result: str, folder: Path, dtype: torch.dtype | None = None
) -> Shipped:
    """Copies a model file into a weights folder and describes it there. An earlier one of the same name is replaced.

    Args:
        tag: timm's tag, usually the data set: the weights are then MODEL.TAG.
        recipe: the recipe it was trained by. result: the results file of that training.
        dtype: of the floating-point weights in the file (bfloat16 halves it); None: as they are.

    Raises:
        ValueError: not a model file of ours, or it does not state its accuracy.
    """
    weights, info = read_model_file(checkpoint)
    if "top1" not in info.metrics:
        raise ValueError(f"{checkpoint}: it does not state its accuracy; ship what `spikingformer train` wrote")
    if dtype is not None:
        weights = {k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()}
    name = f"{info.name}.{tag}"
    path = folder / f"{name}.safetensors"
    save_model(path, weights, _public(info))
    entry = Shipped(
        model=info.name,
        tag=tag,
        file=path.name,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        kwargs={k: v for k, v in info.kwargs.items() if k != "drop_path_rate"},
        class_names=info.class_names,
        mean=info.mean,
        std=info.std,
        interpolation=info.interpolation,
        crop_fraction=info.crop_fraction,
        top1=info.metrics["top1"],
        recipe=recipe,
        result=result,
        part=info.evaluated_on,
    )
    table = {**read_table(folder), name: entry}
    rows = [asdict(table[key]) for key in sorted(table)]
    write_atomic(folder / TABLE_FILE, (json.dumps(rows, indent=1) + "\n").encode())
    card = _card(entry, info, weights, path.stat().st_size / 1e6)
    if dtype is not None:
        card += (
            f"\nThe accuracy is that of the weights before they were rounded to {str(dtype).removeprefix('torch.')}.\n"
        )
    write_atomic(folder / f"{name}.md", card.encode())
    return entry


def _public(info: ModelInfo) -> ModelInfo:
    """The same without where the data lay."""
    if info.recipe is None:
        return info
    return replace(info, recipe={**info.recipe, "data": {**info.recipe["data"], "root": "data", "cache": None}})


def _card(entry: Shipped, info: ModelInfo, weights: dict[str, torch.Tensor], size: float) -> str:
    recipe = info.recipe or {}
    parameters = sum(v.numel() for k, v in weights.items() if "running_" not in k and "num_batches" not in k)
    return f"""# {entry.name}

```python
import spikingformer, timm

model = timm.create_model("{entry.name}", pretrained=True).eval()
```

| | |
|---|---|
| parameters | {parameters:,} |
| file | `{entry.file}`, {size:.2f} MB, sha256 `{entry.sha256}` |
| arguments | {", ".join(f"{k}={v}" for k, v in entry.kwargs.items())} |
| input | {_input(entry, info)} |
| classes | {", ".join(entry.class_names[:20])}{", ..." if len(entry.class_names) > 20 else ""} |
| data | {recipe.get("data", {}).get("name", "not recorded")}{", simulated recordings" if _simulated(info) else ""} |
| recipe | `{entry.recipe}`, seed {recipe.get("seed", "not recorded")} |
| top-1 | {entry.top1:.2f} % on the {entry.part}, epoch {info.epoch} (from 0), chosen on the same |
| training log | `{entry.result}` |
| versions | {", ".join(f"{k} {v}" for k, v in info.versions.items())} |

Use: to try the commands, and to compare speed and energy on weights that fire like a trained network. Not meant for
anything outside its data set; one training run, no tuning of the seed. Licence: Apache-2.0.
{_SIMULATED_NOTE if _simulated(info) else ""}"""


_SIMULATED_SETS = ("digits_dvs",)
_SIMULATED_NOTE = """
No camera took the recordings: they are simulated from pictures, so the figure compares with nothing that was measured
on a camera's.
"""


def _simulated(info: ModelInfo) -> bool:
    return (info.recipe or {}).get("data", {}).get("name") in _SIMULATED_SETS


def _input(entry: Shipped, info: ModelInfo) -> str:
    if info.kind == "events":
        rows, columns = info.image_size
        return f"event counts (B, {info.kwargs['time_steps']}, {info.channels}, {rows}, {columns}), channel 0 OFF, 1 ON"
    return f"mean {list(entry.mean)}, standard deviation {list(entry.std)}, of pictures scaled to [0, 1]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="best.safetensors of a run")
    parser.add_argument("tag", help="timm's tag, usually the data set")
    parser.add_argument("--recipe", required=True, help="recipe it was trained by, e.g. recipes/digits/x.yaml")
    parser.add_argument(
        "--result", required=True, help="its results file, e.g. benchmarks/results/rows/small/digits.json"
    )
    parser.add_argument("--bf16", action="store_true", help="keep the weights in bfloat16")
    parser.add_argument("--folder", type=Path, default=WEIGHTS_FOLDER, help="default: the package's")
    args = parser.parse_args()
    entry = ship(
        args.checkpoint, args.tag, args.recipe, args.result, args.folder, torch.bfloat16 if args.bf16 else None
    )
    print(f"{entry.name}: {args.folder / entry.file}")


if __name__ == "__main__":
    main()
