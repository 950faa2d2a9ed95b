"""Pictures to event recordings like those of CIFAR10-DVS: a model of a DVS before a screen on which a picture moves.

Simulated recordings are no measurement: whatever is made from them says "simulated" and is never compared with results
on real recordings.

Steps: grey picture -> bicubic to four times the sensor, 4x4 box blur to the sensor's grid; logarithm; a diamond-shaped
loop of small sub-pixel shifts (reflected at the border); first-order low-pass of the photoreceptor; ON and OFF events
at each pixel's own thresholds, times interpolated inside a step; refractory time; leak and noise events.
B recordings, H and W the sensor's rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from .arrays import SensorSize, make_events, sort_by_time

SIMULATED = "simulated by spikingformer, not recorded by a camera"
SIMULATED_FILE = "SIMULATED.txt"  # marks a folder of simulated recordings


@dataclass(frozen=True)
class SensorModel:
    """Camera and movement. Lengths in sensor pixels, times in us, thresholds in natural logarithm of intensity."""

    sensor_size: SensorSize = (128, 128)
    amplitude: float = 2.5  # pixels from the centre to a corner of the diamond
    loop_us: int = 200_000
    loops: int = 6
    step_us: int = 2_000
    low_pass_us: float = 3_000.0
    threshold: float = 0.17
    threshold_spread: float = 0.03  # standard deviation over the pixels
    threshold_floor: float = 0.05
    refractory_us: int = 1_000
    leak_hz: float = 0.1  # ON events a pixel and second in the dark
    noise_hz: float = 1.0  # events of either polarity a pixel and second
    dark: float = 0.08  # offset of the logarithm: log(dark + (1 - dark) * intensity)

    @property
    def duration_us(self) -> int:
        return self.loop_us * self.loops

    def __post_init__(self) -> None:
        if self.step_us < 1 or self.loop_us % (4 * self.step_us) or self.loops < 1:
            raise ValueError(
                f"loop_us is {self.loop_us}, step_us {self.step_us}, loops {self.loops}; expected loops of at least 1 "
                "and loop_us a multiple of four steps."
            )


def simulate(
    pictures: torch.Tensor, seeds: list[int], model: SensorModel = SensorModel(), camera_seed: int = 0
) -> list[NDArray[np.void]]:
    """One recording (structured events, sorted) a picture.

    pictures     [B, h, w] grey, 0 (black) to 1 (white), any size of at least 2x2
    seeds        B seeds of the noise: a recording depends on its picture, its seed, the model and the camera alone,
                 not on the batch it is made in
    camera_seed  seed of the pixels' thresholds: the same camera takes all recordings
    """
    if pictures.ndim != 3 or len(pictures) != len(seeds) or min(pictures.shape[1:]) < 2:
        raise ValueError(
            f"got pictures {tuple(pictures.shape)} and {len(seeds)} seeds; expected [B, h, w] and B seeds."
        )
    if pictures.numel() and not (float(pictures.min()) >= 0 and float(pictures.max()) <= 1):
        raise ValueError(f"pictures span {float(pictures.min())}..{float(pictures.max())}; expected 0 to 1.")
    if not len(pictures):
        return []
    log_intensity = torch.log(model.dark + (1 - model.dark) * _on_sensor(pictures.float(), model.sensor_size))
    thresholds = _thresholds(model, camera_seed)
    columns = _contrast_events(log_intensity, thresholds, model)
    return [_recording(columns, b, seed, model) for b, seed in enumerate(seeds)]


def _on_sensor(pictures: torch.Tensor, sensor_size: SensorSize) -> torch.Tensor:
    height, width = sensor_size
    screen = F.interpolate(pictures[:, None], (4 * height, 4 * width), mode="bicubic", align_corners=False)
    return F.avg_pool2d(screen.clamp(0, 1), 4)[:, 0]


def _thresholds(model: SensorModel, camera_seed: int) -> torch.Tensor:
    """ON and OFF threshold of every pixel, [2, H, W] (0 OFF, 1 ON)."""
    draw = np.random.default_rng([camera_seed, 1])
    values = draw.normal(model.threshold, model.threshold_spread, (2, *model.sensor_size))
    return torch.from_numpy(np.maximum(values, model.threshold_floor)).float()


def shift_at(step: int, model: SensorModel) -> tuple[float, float]:
    """(x, y) of the picture after `step` steps, pixels: right, bottom, left, top corner of a diamond and back."""
    quarter = model.loop_us / model.step_us / 4
    corner, inside = divmod(step / quarter, 1)
    corners = ((0.0, -1.0), (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0))
    (x0, y0), (x1, y1) = corners[int(corner) % 4], corners[(int(corner) + 1) % 4]
    return (
        model.amplitude * (x0 + inside * (x1 - x0)),
        model.amplitude * (y0 + inside * (y1 - y0)),
    )


def _shifted(padded: torch.Tensor, margin: int, x: float, y: float, size: SensorSize) -> torch.Tensor:
    """The picture moved by (x, y) pixels, bilinear; `padded` has `margin` more pixels on every side."""
    height, width = size
    row, column = margin - y, margin - x
    top, left = int(np.floor(row)), int(np.floor(column))
    down, right = row - top, column - left
    rows = (1 - down) * padded[:, top : top + height] + down * padded[:, top + 1 : top + 1 + height]
    return (1 - right) * rows[:, :, left : left + width] + right * rows[:, :, left + 1 : left + 1 + width]


def _contrast_events(
    log_intensity: torch.Tensor, thresholds: torch.Tensor, model: SensorModel
) -> tuple[NDArray[np.int64], ...]:
    """Columns (recording, pixel, time, polarity) of all threshold crossings, in the order of time steps."""
    size = model.sensor_size
    margin = int(np.ceil(model.amplitude)) + 1
    mode = "reflect" if margin < min(size) else "replicate"
    padded = F.pad(log_intensity[:, None], (margin,) * 4, mode=mode)[:, 0]
    keep = float(np.exp(-model.step_us / model.low_pass_us))
    seen = _shifted(padded, margin, *shift_at(0, model), size)
    reference = seen.clone()
    last_event = torch.full_like(seen, -1e9)
    off, on = thresholds
    leak = on * model.leak_hz * model.step_us * 1e-6
    found: list[tuple[torch.Tensor, ...]] = []
    for step in range(1, model.duration_us // model.step_us + 1):
        before = seen
        target = _shifted(padded, margin, *shift_at(step, model), size)
        seen = target + (before - target) * keep
        reference = reference - leak
        difference = seen - reference
        rising = difference > 0
        threshold = torch.where(rising, on, off)
        crossings = (difference.abs() / threshold).floor()
        start = (step - 1) * model.step_us
        change = seen - before
        for k in range(1, int(crossings.max()) + 1):
            hit = (crossings >= k).nonzero(as_tuple=True)
            sign = torch.where(rising[hit], 1.0, -1.0)
            level = reference[hit] + sign * k * threshold.expand_as(seen)[hit]
            share = ((level - before[hit]) / change[hit]).nan_to_num(1.0, 1.0, 1.0).clamp(0, 1)
            time = start + share * model.step_us
            free = time - last_event[hit] >= model.refractory_us
            kept = tuple(index[free] for index in hit)
            last_event[kept] = time[free]
            found.append((kept[0], kept[1] * size[1] + kept[2], time[free], rising[kept]))
        reference = reference + torch.where(rising, crossings, -crossings) * threshold
    columns = [torch.cat([event[i] for event in found]) for i in range(4)] if found else [torch.zeros(0)] * 4
    return tuple(column.long().numpy() for column in columns)


def _recording(columns: tuple[NDArray[np.int64], ...], index: int, seed: int, model: SensorModel) -> NDArray[np.void]:
    """Contrast events of recording `index`, and noise drawn from its own seed."""
    chosen = columns[0] == index
    pixel, time, polarity = (column[chosen] for column in columns[1:])
    draw = np.random.default_rng([seed, 2])
    height, width = model.sensor_size
    noise = int(draw.poisson(model.noise_hz * height * width * model.duration_us * 1e-6))
    pixel = np.concatenate([pixel, draw.integers(0, height * width, noise)])
    time = np.concatenate([time, draw.integers(0, model.duration_us, noise)])
    polarity = np.concatenate([polarity, draw.integers(0, 2, noise)])
    return sort_by_time(make_events(pixel % width, pixel // width, time, polarity))
