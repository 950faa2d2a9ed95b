"""`spikingformer doctor`: shows what this machine can do and what is missing."""

import argparse
import json
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

OPTIONAL = {  # package: (what it is for, how to get it)
    "onnx": ("export to ONNX", 'pip install "spikingformer[export]"'),
    "onnxruntime": ("running exported ONNX files", 'pip install "spikingformer[export]"'),
    "nir": ("export to NIR", 'pip install "spikingformer[export]"'),
    "nvidia-ml-py": ("measured GPU energy", 'pip install "spikingformer[measure]"'),
    "triton": ("fused GPU kernels", "comes with torch's CUDA builds on Linux"),
}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="show what this machine can do and what is missing",
        description="Checks versions, processor, GPU, compiled kernels and optional packages.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _findings() -> list[dict[str, str | bool]]:
    """Rows of (what, ok, detail); ok is False if something is missing that can be added."""
    import torch

    from spikingformer.neurons.backend import unavailable

    rows: list[dict[str, str | bool]] = []

    def row(what: str, ok: bool, detail: str) -> None:
        rows.append({"what": what, "ok": ok, "detail": detail})

    row("python", True, platform.python_version())
    for package in ("spikingformer", "torch", "torchvision", "timm", "safetensors"):
        found = _version(package)
        row(package, found is not None, found or "not installed")
    row("processor", True, f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}")  # fmt: skip
    reason = unavailable("native")
    if reason is None:
        from spikingformer.native import available_isas

        row("C++ kernels", True, "built; instruction sets: " + ", ".join(available_isas()))
    else:
        row("C++ kernels", False, f"{reason}; plain PyTorch is used instead. Install a C++ compiler, then: "
            "python -m spikingformer.native.build")  # fmt: skip
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            memory = torch.cuda.get_device_properties(i).total_memory / 2**30
            row(f"GPU {i}", True, f"{torch.cuda.get_device_name(i)}, {memory:.0f} GiB")
        reason = unavailable("triton")
        row("Triton kernels", reason is None, reason or "available")
    else:
        row("GPU", True, "none: everything runs on the CPU")
    for package, (purpose, remedy) in OPTIONAL.items():
        found = _version(package)
        row(package, found is not None, found or f"not installed; needed for {purpose}: {remedy}")
    free = shutil.disk_usage(".").free / 2**30
    row("disk", free > 2, f"{free:.1f} GiB free here")
    return rows


def run(args: argparse.Namespace) -> int:
    rows = _findings()
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    width = max(len(str(r["what"])) for r in rows)
    for r in rows:
        print(f"{'ok     ' if r['ok'] else 'missing'}  {r['what']:<{width}}  {r['detail']}")
    return 0
