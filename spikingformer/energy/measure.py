"""Energy measured by the machine's own counters. It is another quantity than an estimate and is never added to one.

NVIDIA: NVML's total energy counter (mJ since the driver was loaded; Volta and later). CPU: Linux RAPL's package
counters. Idle power is measured first and subtracted; windows last at least 10 s because the counters are coarse.
"""

import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WINDOW_SECONDS = 10.0
REPEATS = 5
_T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # Student, 95 %


class Meter(ABC):
    """A counter of energy used so far."""

    name: str

    @abstractmethod
    def joules(self) -> float:
        """Energy since some fixed moment."""


class NvmlMeter(Meter):
    """One NVIDIA card."""

    def __init__(self, index: int):
        import pynvml

        pynvml.nvmlInit()
        self._read = pynvml.nvmlDeviceGetTotalEnergyConsumption
        self._handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        name = pynvml.nvmlDeviceGetName(self._handle)
        self.name = f"NVML total energy of {name.decode() if isinstance(name, bytes) else name}"
        self._read(self._handle)

    def joules(self) -> float:
        return self._read(self._handle) / 1000


class RaplMeter(Meter):
    """All CPU packages. Wrap-around of the counters is corrected."""

    def __init__(self, root: Path = Path("/sys/class/powercap")):
        self._files = sorted(p / "energy_uj" for p in root.glob("intel-rapl:?"))
        if not self._files:
            raise OSError(f"no RAPL counters in {root} (a virtual machine, or a CPU without them)")
        self._ranges = [int((f.parent / "max_energy_range_uj").read_text()) for f in self._files]
        self._last = [int(f.read_text()) for f in self._files]
        self._sum = 0
        self.name = f"RAPL energy of {len(self._files)} CPU package(s)"

    def joules(self) -> float:
        for i, file in enumerate(self._files):
            now = int(file.read_text())
            self._sum += now - self._last[i] if now >= self._last[i] else now + self._ranges[i] - self._last[i]
            self._last[i] = now
        return self._sum / 1e6


@dataclass
class Measurement:
    """Energy per sample above idle, with its spread, or the reason why there is none."""

    available: bool
    reason: str = ""
    meter: str = ""
    batch_size: int = 0
    idle_watts: float = 0.0
    joules_per_sample: float = 0.0
    confidence_95: float = 0.0  # half-width, Student's t over the repeats
    window_seconds: float = 0.0
    samples: list[int] = field(default_factory=list)  # of each repeat
    joules: list[float] = field(default_factory=list)  # per sample, of each repeat

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"schema": "spikingformer-measured-energy/1", **asdict(self)}

    def text(self) -> str:
        """One line for display."""
        if not self.available:
            return f"energy cannot be measured here: {self.reason}"
        return (
            f"measured (not estimated), {self.meter}: {self.joules_per_sample * 1e3:.4g} mJ per sample above idle "
            f"+- {self.confidence_95 * 1e3:.2g} (95 %, {len(self.joules)} windows of {self.window_seconds:g} s, "
            f"batch {self.batch_size}); idle {self.idle_watts:.4g} W"
        )


def find_meter(device: str) -> tuple[Meter | None, str]:
    """(the meter of a device "cpu", "cuda" or "cuda:N", "") or (None, why not)."""
    if device.startswith("cuda"):
        try:
            return NvmlMeter(torch.device(device).index or 0), ""
        except ImportError:
            return None, "NVML needs the package nvidia-ml-py: pip install 'spikingformer[measure]'"
        except Exception as error:  # pynvml raises classes of its own
            return None, f"NVML gives no energy counter ({error}); cards before Volta have none"
    try:
        return RaplMeter(), ""
    except PermissionError as error:
        return None, f"RAPL's counter {error.filename} can only be read by root: sudo chmod o+r {error.filename}"
    except OSError as error:
        return None, str(error)


def measure(
    run: Callable[[], int], meter: Meter, window: float = WINDOW_SECONDS, repeats: int = REPEATS
) -> Measurement:
    """Measures `run`, which finishes some work and returns the number of samples.

    One idle window, one warm-up, then `repeats` windows of at least `window` seconds.
    """
    if repeats not in _T_95:
        raise ValueError(f"repeats must lie in [2, 10], got {repeats}")
    start, before = time.perf_counter(), meter.joules()
    time.sleep(window)
    idle = (meter.joules() - before) / (time.perf_counter() - start)
    run()
    joules, samples = [], []
    for _ in range(repeats):
        done, start, before = 0, time.perf_counter(), meter.joules()
        while time.perf_counter() - start < window:
            done += run()
        used, seconds = meter.joules() - before, time.perf_counter() - start
        joules.append((used - idle * seconds) / done)
        samples.append(done)
    half = _T_95[repeats] * statistics.stdev(joules) / math.sqrt(repeats)
    return Measurement(True, "", meter.name, 0, idle, statistics.mean(joules), half, window, samples, joules)


def measure_model(model: nn.Module, x: Tensor, device: str = "auto", window: float = WINDOW_SECONDS) -> Measurement:
    """Energy per sample of inference on a batch x, or why it cannot be measured. Raises ValueError unless x is a
    tensor."""
    if not isinstance(x, Tensor):
        raise ValueError(f"expected a tensor of inputs, got {type(x).__name__}: convert it first")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        return Measurement(False, "no CUDA device")
    meter, reason = find_meter(device)
    if meter is None:
        return Measurement(False, reason)
    model, x = model.to(device).eval(), x.to(device)

    @torch.inference_mode()
    def run() -> int:
        for _ in range(10):
            model(x)
        if x.is_cuda:
            torch.cuda.synchronize()
        return 10 * len(x)

    result = measure(run, meter, window)
    result.batch_size = len(x)
    return result
