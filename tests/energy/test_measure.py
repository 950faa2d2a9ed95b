"""Measured energy, against meters that are known."""

import time
from pathlib import Path

import pytest
import torch
from torch import nn

from spikingformer.energy.measure import Meter, RaplMeter, find_meter, measure, measure_model


class Known(Meter):
    """50 W at rest, and 0.25 J a sample."""

    name = "known"

    def __init__(self) -> None:
        self.samples = 0

    def joules(self) -> float:
        return 50 * time.perf_counter() + 0.25 * self.samples


def test_idle_power_is_subtracted() -> None:
    meter = Known()

    def run() -> int:
        time.sleep(0.005)
        meter.samples += 2
        return 2

    result = measure(run, meter, window=0.05)
    assert result.idle_watts == pytest.approx(50, rel=0.02)
    assert result.joules_per_sample == pytest.approx(0.25, rel=0.1)
    assert len(result.joules) == 5
    assert "not estimated" in result.text()


def test_a_batch_that_is_no_tensor_is_named() -> None:
    with pytest.raises(ValueError, match="expected a tensor of inputs, got dict"):
        measure_model(nn.Linear(2, 2), {"image": torch.zeros(1, 2)}, "cpu")  # type: ignore[arg-type]


def test_rapl_counters_wrap(tmp_path: Path) -> None:
    package = tmp_path / "intel-rapl:0"
    package.mkdir()
    (package / "max_energy_range_uj").write_text("1000000\n")
    (package / "energy_uj").write_text("900000\n")
    meter = RaplMeter(tmp_path)
    (package / "energy_uj").write_text("400000\n")
    assert meter.joules() == pytest.approx(0.5)
    with pytest.raises(OSError, match="no RAPL"):
        RaplMeter(tmp_path / "none")


def test_without_a_counter_it_says_why() -> None:
    if torch.cuda.is_available():
        pytest.skip("has a CUDA device")
    result = measure_model(nn.Linear(2, 2), torch.rand(1, 2), "cuda")
    assert (result.available, result.reason) == (False, "no CUDA device")
    meter, reason = find_meter("cpu")
    assert (meter is None) == bool(reason)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nvml_counts_up() -> None:
    meter, reason = find_meter("cuda")
    assert meter is not None, reason
    before = meter.joules()
    time.sleep(0.5)
    assert meter.joules() > before
