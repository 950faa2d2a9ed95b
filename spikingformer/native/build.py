"""Compiles the C++ kernels into one shared library inside the package: `python -m spikingformer.native.build`.

Every kernel file is compiled once per instruction set; the loader picks one at run time. Needs only the standard
library, because `setup.py` runs it before the package's dependencies are there.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PACKAGE_DIR = Path(__file__).resolve().parent
LIBRARY_NAME = "libspikingformer_native.so"
RECORD_NAME = "build.json"  # what was built and with what, or why it was not
COMMON_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
]  # fmt: skip  (no contraction: the neuron must agree with the plain form to the bit)
X86_FLAGS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512", "-mavx2", "-mfma",
               "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt", "-mlzcnt"],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt", "-mlzcnt"],
    "portable": [],
}  # fmt: skip
VECTOR_BYTES = {"avx512": 64, "avx2": 32, "portable": 16, "neon": 16}


class BuildError(RuntimeError):
    """The kernels could not be compiled; the text says why."""


def instruction_sets(machine: str | None = None) -> dict[str, list[str]]:
    """Instruction sets to compile for on `machine` (default: this one), best first, with their compiler flags."""
    machine = (machine or platform.machine()).lower()
    if machine in ("x86_64", "amd64"):
        return dict(X86_FLAGS)
    return {"neon": []} if machine in ("aarch64", "arm64") else {"portable": []}


def source_digest(source_dir: Path = PACKAGE_DIR / "src") -> str:
    """SHA-256 of what a library is built from: the kernels' sources, and this file with the compiler's flags."""
    digest = hashlib.sha256()
    for path in (*sorted(p for p in source_dir.iterdir() if p.suffix in (".cpp", ".h")), Path(__file__)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def is_current(output_dir: Path = PACKAGE_DIR, source_dir: Path = PACKAGE_DIR / "src") -> bool:
    """Whether the library in `output_dir` was built from the sources as they are now."""
    record = output_dir / RECORD_NAME
    built = (output_dir / LIBRARY_NAME).exists() and record.exists()
    return built and json.loads(record.read_text()).get("sources") == source_digest(source_dir)


def find_compiler() -> str:
    """The C++ compiler: $CXX, else c++, g++ or clang++. Raises BuildError where there is none."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise BuildError("no C++ compiler found (looked for $CXX, c++, g++, clang++)")


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise BuildError(f"{' '.join(command)} failed:\n{result.stderr.strip()[:2000]}")


def _openmp_flags(compiler: str, folder: Path) -> list[str]:
    source = folder / "openmp_probe.cpp"
    source.write_text("#include <omp.h>\nint probe() { return omp_get_max_threads(); }\n")
    try:
        _run([compiler, "-fopenmp", "-fPIC", "-shared", str(source), "-o", str(folder / "openmp_probe.so")])
    except BuildError:
        return []  # the kernels then run on one thread
    return ["-fopenmp"]


def build(output_dir: Path = PACKAGE_DIR, source_dir: Path = PACKAGE_DIR / "src") -> Path:
    """Compiles the kernels into `output_dir` and returns the library's path. Raises BuildError."""
    compiler = find_compiler()
    sets = instruction_sets()
    sources = source_digest(source_dir)  # before they are read: a change from here on makes the library stale
    with tempfile.TemporaryDirectory(prefix="spikingformer_build_") as name:
        folder = Path(name)
        openmp = _openmp_flags(compiler, folder)
        jobs: list[tuple[list[str], Path, Path]] = [([], source_dir / "cpu.cpp", folder / "cpu.o")]
        for isa, flags in sets.items():
            defines = [f"-DSPK_ISA={isa}", f"-DSPK_VECTOR_BYTES={VECTOR_BYTES[isa]}"]
            for source in sorted(source_dir.glob("*.cpp")):
                if source.stem != "cpu":
                    jobs.append((flags + defines, source, folder / f"{source.stem}_{isa}.o"))
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(
                pool.map(
                    lambda j: _run([compiler, *COMMON_FLAGS, *openmp, *j[0], "-c", str(j[1]), "-o", str(j[2])]), jobs
                )
            )
        linked = folder / LIBRARY_NAME
        _run([compiler, "-shared", *openmp, *(str(o) for _, _, o in jobs), "-o", str(linked)])
        output_dir.mkdir(parents=True, exist_ok=True)
        target = output_dir / LIBRARY_NAME
        # A new file under the old name: a process that has the old library mapped keeps it.
        staged = output_dir / f".{LIBRARY_NAME}.{os.getpid()}"
        shutil.copy2(linked, staged)
        os.replace(staged, target)
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.splitlines()
    record = {
        "compiler": version[0] if version else compiler,
        "isas": list(sets),
        "openmp": bool(openmp),
        "sources": sources,
    }
    (output_dir / RECORD_NAME).write_text(json.dumps(record) + "\n")
    return target


def build_or_explain(output_dir: Path) -> str | None:
    """Builds for an installation, which must not fail: returns None, or the reason after recording it."""
    try:
        build(output_dir)
    except (BuildError, OSError) as error:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / RECORD_NAME).write_text(json.dumps({"error": str(error)}) + "\n")
        return str(error)
    return None


def main() -> int:
    try:
        print(f"built {build()}")
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
