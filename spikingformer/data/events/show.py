"""Pictures of a recording: a strip of frames with the event rate below (PNG), and an animation (GIF).

ON events are drawn red, OFF events blue, on white; a pixel with more events is darker.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .arrays import SensorSize
from .frames import SplitBy, events_to_frames, slice_index

ON_COLOUR, OFF_COLOUR = (205, 40, 40), (35, 90, 190)
_MAX_GIF_FRAMES = 400


def colour_frames(frames: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Counts [T, 2, H, W] -> pictures [T, H, W, 3]: white where nothing happened, full colour from the 98th percentile.

    The scale is shared by all frames, so that busy and quiet ones can be compared.
    """
    active = frames[frames > 0]
    full = max(1.0, float(np.percentile(active, 98))) if active.size else 1.0
    off, on = (np.clip(frames[:, i] / full, 0, 1)[..., None] ** 0.6 for i in (0, 1))
    ink = on * (255 - np.array(ON_COLOUR)) + off * (255 - np.array(OFF_COLOUR))
    strongest = np.maximum(1.0, on + off)  # where both fire the colours mix instead of adding up to black
    return (255 - ink / strongest).astype(np.uint8)


def save_strip(
    events: NDArray[np.void],
    sensor_size: SensorSize,
    path: Path,
    time_steps: int = 8,
    split_by: SplitBy = "time",
    title: str = "",
) -> None:
    """T frames side by side (at most eight a row), each with its time, and the rate of ON and OFF events below."""
    from matplotlib.figure import Figure

    pictures = colour_frames(events_to_frames(events, time_steps, split_by, sensor_size))
    index = slice_index(events["t"], time_steps, split_by)
    ms = (events["t"] - events["t"][0]) / 1e3
    columns = min(8, time_steps)
    rows = -(-time_steps // columns)
    aspect = sensor_size[0] / sensor_size[1]
    tall = 1.5 * aspect * rows + 0.28 * rows
    figure = Figure(figsize=(1.5 * columns + 0.9, tall + 2.3), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=10)
    top, bottom = np.asarray(figure.subfigures(2, 1, height_ratios=[tall, 2.0]))
    for i, axes in enumerate(np.atleast_1d(np.asarray(top.subplots(rows, columns))).flat):
        axes.set_axis_off()
        if i < time_steps:
            axes.imshow(pictures[i], interpolation="nearest")
            axes.add_patch(_frame(sensor_size))
            times = ms[index == i]
            label = f"{times[0]:.0f}–{times[-1]:.0f} ms" if len(times) else "no events"
            axes.set_title(label, fontsize=7, pad=3)
    _plot_rate(bottom.subplots(), ms, events["p"])
    figure.savefig(path)


def _frame(sensor_size: SensorSize):  # type: ignore[no-untyped-def]  # a matplotlib patch, imported late
    from matplotlib.patches import Rectangle

    height, width = sensor_size
    return Rectangle((-0.5, -0.5), width, height, fill=False, edgecolor="0.75", linewidth=0.8)


def _plot_rate(axes, ms: NDArray[np.float64], polarity: NDArray[np.uint8]) -> None:  # type: ignore[no-untyped-def]
    bins = int(np.clip(len(ms) / 200, 10, 200))
    edges = np.linspace(0, max(float(ms[-1]), 1e-3), bins + 1)
    width = edges[1] - edges[0]
    for name, value, colour in (("ON", 1, ON_COLOUR), ("OFF", 0, OFF_COLOUR)):
        counts, _ = np.histogram(ms[polarity == value], edges)
        axes.stairs(counts / width, edges, color=np.array(colour) / 255, label=name, linewidth=1.1)
    axes.set_xlim(0, edges[-1])
    axes.set_ylim(0, 1.2 * axes.dataLim.y1)  # room for the legend
    axes.set_xlabel("time, ms", fontsize=8)
    axes.set_ylabel("events, thousands/s", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False, ncols=2, loc="upper right")


def save_gif(
    events: NDArray[np.void], sensor_size: SensorSize, path: Path, frame_ms: float = 40.0, side: int = 384
) -> int:
    """An animation in real time, one picture every `frame_ms`, scaled up to about `side` pixels; number of pictures."""
    span_ms = max(1.0, float(events["t"][-1] - events["t"][0]) / 1e3)
    count = int(np.clip(round(span_ms / frame_ms), 2, _MAX_GIF_FRAMES))
    pictures = colour_frames(events_to_frames(events, count, "time", sensor_size))
    scale = max(1, side // max(sensor_size))
    images = [
        Image.fromarray(p).resize((p.shape[1] * scale, p.shape[0] * scale), Image.Resampling.NEAREST) for p in pictures
    ]
    duration = max(20, round(span_ms / count))
    images[0].save(path, save_all=True, append_images=images[1:], duration=duration, loop=0)
    return count
