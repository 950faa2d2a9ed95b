"""How many pictures one core decodes and augments a second, on a folder of photographs.

python -m benchmarks.input_decode FOLDER --output benchmarks/results/input_decode.json
"""

import argparse
import io
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from benchmarks.machine import describe_machine
from spikingformer.data.folder import decode_picture
from spikingformer.data.per_sample import evaluation_transform, training_transform
from spikingformer.picture_statistics import IMAGENET_MEAN, IMAGENET_STD
from spikingformer.training.recipe import load_recipe


def rate(work: Callable[[bytes], object], files: list[bytes], repeats: int) -> dict:
    """Pictures per second of processor time (other processes on the machine do not count) and of the clock."""
    work(files[0])
    on_processor, on_clock = [], []
    for _ in range(repeats):
        processor, clock = time.process_time(), time.perf_counter()
        for content in files:
            work(content)
        on_processor.append(len(files) / (time.process_time() - processor))
        on_clock.append(len(files) / (time.perf_counter() - clock))
    return {
        "per_core_second": round(statistics.median(on_processor), 1),
        "range": [round(min(on_processor), 1), round(max(on_processor), 1)],
        "per_clock_second": round(statistics.median(on_clock), 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    files = [path.read_bytes() for path in sorted(args.folder.rglob("*.[jJ][pP]*[gG]"))]
    if not files:
        raise SystemExit(f"{args.folder}: no JPEG files")
    files = files[:: max(1, len(files) // args.pictures)][: args.pictures]
    recipe = load_recipe("recipes/imagenet/spikingformer_cml_8_768.yaml")
    train = training_transform(recipe.data, recipe.augment, IMAGENET_MEAN, IMAGENET_STD)
    test = evaluation_transform(224, 3, "bicubic", 1.0, IMAGENET_MEAN, IMAGENET_STD)
    full_size = []  # ImageNet's pictures are 400 x 350 pixels on average and more: the same photographs enlarged
    for content in files:
        larger, stream = (
            Image.open(io.BytesIO(content)).convert("RGB").resize((500, 375), Image.Resampling.BICUBIC),
            io.BytesIO(),
        )
        larger.save(stream, "JPEG", quality=90)
        full_size.append(stream.getvalue())

    def decode(content: bytes) -> Image.Image:
        picture = decode_picture(io.BytesIO(content), 3, "")
        assert isinstance(picture, Image.Image)
        return picture

    result: dict = {"machine": describe_machine(), "pictures": len(files), "repeats": args.repeats, "threads": 1}
    for name, contents in (("224x224", files), ("500x375", full_size)):
        result[name] = {
            "mean_bytes": round(sum(map(len, contents)) / len(contents)),
            "decode": rate(decode, contents, args.repeats),
            "decode_and_training_transform": rate(lambda c: train(decode(c)), contents, args.repeats),
            "decode_and_evaluation_transform": rate(lambda c: test(decode(c)), contents, args.repeats),
        }
    text = json.dumps(result, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
