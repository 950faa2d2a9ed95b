"""How fast a state file is checksummed, written and flushed to disk: processor time and wall time of each repeat.

python -m benchmarks.state_write --output benchmarks/results/state_write.json
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.machine import describe_machine
from spikingformer.training.tensor_file import read_tensors, write_tensors


def measure(folder: Path, megabytes: int, repeats: int) -> list[dict[str, float]]:
    """MB/s of each repeat, the file new each time; the first written file is read back and compared."""
    tensors = {f"weight{i}": torch.randn(250_000) for i in range(megabytes)}  # 1 MB each
    rates = []
    for number in range(repeats):
        path = folder / f"{number}.safetensors"
        wall, processor = time.perf_counter(), time.process_time()
        write_tensors(path, tensors, {"a": "b"})
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        rates.append({"wall_mb_per_s": megabytes / wall, "processor_mb_per_s": megabytes / processor})
        if number == 0:
            assert all(torch.equal(t, tensors[name]) for name, t in read_tensors(path)[0].items())
        path.unlink()
    return rates


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        rates = measure(Path(name), args.megabytes, args.repeats)

    def spread(key: str) -> dict[str, float]:
        values = sorted(r[key] for r in rates)
        return {
            k: round(v, 1)
            for k, v in zip(("least", "median", "most"), (values[0], values[len(values) // 2], values[-1]), strict=True)
        }

    result = {
        "machine": describe_machine(),
        "load_before": round(load, 2),
        "megabytes": args.megabytes,
        "repeats": args.repeats,
        "wall_mb_per_s": spread("wall_mb_per_s"),
        "processor_mb_per_s": spread("processor_mb_per_s"),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
