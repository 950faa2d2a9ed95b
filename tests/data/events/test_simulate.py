"""The simulator: physics that can be checked by hand, independence of the batch, and the embedded digits_dvs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from spikingformer.data.events import read_aedat20, write_aedat20
from spikingformer.data.events.digits_dvs import CAMERA, load_digits_dvs
from spikingformer.data.events.simulate import SensorModel, shift_at, simulate

SMALL = SensorModel(sensor_size=(24, 32), loops=1)
SILENT = SensorModel(sensor_size=(24, 32), loops=1, noise_hz=0.0, leak_hz=0.0, threshold_spread=0.0)


def bar() -> torch.Tensor:
    picture = torch.zeros(1, 24, 32)
    picture[:, :, 14:18] = 1.0
    return picture


def test_the_path_is_a_closed_diamond() -> None:
    steps = SMALL.loop_us // SMALL.step_us
    path = np.array([shift_at(i, SMALL) for i in range(steps + 1)])
    np.testing.assert_allclose(path[0], path[-1], atol=1e-12)
    np.testing.assert_allclose(np.abs(path).sum(1), SMALL.amplitude, atol=1e-12)


def test_a_bar_gives_events_at_its_edges_only() -> None:
    (events,) = simulate(bar(), [0], SILENT)
    assert len(events) > 1000
    assert events["x"].min() >= 14 - 2.5 - 2
    assert events["x"].max() <= 17 + 2.5 + 2
    # over whole loops the picture comes back: as many steps up as down
    assert abs(events["p"].mean() - 0.5) < 0.05
    assert 0 <= events["t"].min() <= events["t"].max() < SILENT.duration_us
    assert (np.diff(events["t"]) >= 0).all()


def test_an_even_picture_gives_noise_alone() -> None:
    (events,) = simulate(torch.full((1, 24, 32), 0.5), [0], SMALL)
    expected = SMALL.noise_hz * 24 * 32 * SMALL.duration_us * 1e-6
    assert abs(len(events) - expected) < 5 * expected**0.5  # Poisson
    assert len(simulate(torch.full((1, 24, 32), 0.5), [0], SILENT)[0]) == 0


def test_leak_gives_on_events_at_its_rate() -> None:
    model = SensorModel(sensor_size=(8, 8), loops=10, noise_hz=0.0, leak_hz=2.0, threshold_spread=0.0)
    (events,) = simulate(torch.full((1, 8, 8), 0.5), [0], model)
    assert (events["p"] == 1).all()
    assert abs(len(events) - 64 * 2.0 * model.duration_us * 1e-6) <= 64


def test_refractory_time_holds_for_contrast_events() -> None:
    (events,) = simulate(bar(), [0], SILENT)
    pixel = events["y"].astype(int) * 32 + events["x"]
    gaps = np.concatenate([np.diff(events["t"][pixel == p]) for p in np.unique(pixel)])
    assert gaps.min() >= SILENT.refractory_us - 1  # times are cut to whole microseconds


def test_a_recording_does_not_depend_on_its_batch() -> None:
    pictures = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    together = simulate(pictures, [5, 6, 7], SMALL)
    for i in range(3):
        (alone,) = simulate(pictures[i : i + 1], [5 + i], SMALL)
        np.testing.assert_array_equal(alone, together[i])
    (other,) = simulate(pictures[:1], [8], SMALL)
    assert len(other) != len(together[0]) or (other["t"] != together[0]["t"]).any()


def test_recordings_have_the_official_layout(tmp_path: Path) -> None:
    pictures = torch.rand(1, 32, 32, generator=torch.Generator().manual_seed(1))
    (events,) = simulate(pictures, [0], SensorModel(loops=1))
    write_aedat20(tmp_path / "a.aedat", events)
    np.testing.assert_array_equal(read_aedat20(tmp_path / "a.aedat"), events)


def test_digits_dvs_is_made_in_memory_and_called_simulated() -> None:
    parts = load_digits_dvs(4)
    assert parts.train.frame_shape == (4, 2, *CAMERA.sensor_size)
    assert parts.train.simulated
    assert "simulated" in parts.train.title
    assert len(parts.train) + len(parts.test) == 1797
    assert set(parts.test.labels.tolist()) == set(range(10))
    frames, labels = parts.train.batch([0, 1])
    again, _ = load_digits_dvs(4).train.batch([0, 1])
    assert torch.equal(frames, again)
    assert labels.shape == (2,)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: simulate(torch.full((1, 8, 8), 2.0), [0], SMALL), "expected 0 to 1"),
        (lambda: simulate(torch.zeros(2, 8, 8), [0], SMALL), "1 seeds"),
        (lambda: SensorModel(step_us=7), "multiple of four steps"),
        (lambda: load_digits_dvs(4, split="other"), "no split 'other'"),
    ],
    ids=["range", "seeds", "steps", "split"],
)
def test_simulator_errors(call, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()
