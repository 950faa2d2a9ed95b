"""Classifies an event camera's recording window by window while it comes in.

A window is `steps` frames of `step_us` microseconds. If the model can step, each frame goes through it once its time
has passed, so after the window's last event only one time step is left to compute: that is the latency. A model that
takes whole inputs only (int8) gets all frames of the window when it ends: its latency is the whole computation.
"""

import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .runtime import Predictor, StepPredictor

Events = NDArray[np.void]  # structured x, y, t (us), p; see spikingformer.data.events


@dataclass(frozen=True)
class StreamSettings:
    """How a recording is cut. Raises ValueError for numbers that do not make a window."""

    step_us: int = 60_000  # microseconds per frame
    steps: int = 16  # frames per window: the T that the model was trained with
    sensor_size: tuple[int, int] = (128, 128)  # rows, columns of the camera
    frame_size: tuple[int, int] = (128, 128)  # rows, columns that the model takes
    keep_state: bool = False  # True: membranes are kept from window to window; False: each window starts at rest
    longest_gap_us: int = 60_000_000  # silence, or step back in time, after which the stream restarts

    def __post_init__(self) -> None:
        for name in ("step_us", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if any(f > s for f, s in zip(self.frame_size, self.sensor_size, strict=True)):
            raise ValueError(
                f"the model takes frames of {self.frame_size}, larger than the sensor's {self.sensor_size}: give the "
                "camera's size"
            )

    @property
    def window_us(self) -> int:
        """Microseconds per window."""
        return self.step_us * self.steps


@dataclass(frozen=True)
class Window:
    """One classified window."""

    index: int
    start_us: int  # time of the recording
    end_us: int
    events: int
    label: int | None  # None: no events came in, so there is nothing to classify
    probabilities: tuple[float, ...]  # empty without a label
    latency_s: float  # from the window's end to its class: the last time step's computation, or the whole window's
    compute_s: float  # all its time steps
    late_events: int  # dropped since the window before: older than the frame being filled

    @property
    def real_time_factor(self) -> float:
        """Length of the window over its computation: above 1 keeps up with the camera."""
        return (self.end_us - self.start_us) / 1e6 / self.compute_s


@dataclass
class FrameCutter:
    """Collects events into frames of counts (2, H, W), channel 0 OFF, 1 ON. Its size never grows."""

    settings: StreamSettings
    start_us: int | None = None  # start of the frame being filled; None before the first event
    late_events: int = 0  # events older than the frame being filled: dropped
    taken_events: int = 0  # counted into frames so far
    restarts: int = 0  # after a long silence or a step back in time
    events_in_frame: int = 0
    counts: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.counts = np.zeros(2 * self.settings.frame_size[0] * self.settings.frame_size[1], np.int64)

    def add(self, events: Events) -> Iterator[tuple[int, int, NDArray[np.float32]] | None]:
        """Yields (start, events, frame) for every frame that these events complete.

        None stands for a silence that is too long to fill with empty frames, or for a clock set back that far: the next
        frame starts at the next event. Raises ValueError for events off the sensor.
        """
        s = self.settings
        self._check_on_sensor(events)
        if (np.diff(events["t"]) < 0).any():
            events = events[np.argsort(events["t"], kind="stable")]
        t = events["t"]
        if len(t) and self.start_us is not None and int(t[-1]) < self.start_us - s.longest_gap_us:
            self._restart()
            yield None
        while len(events):
            if self.start_us is None:
                self.start_us = int(t[0])
            late = int(np.searchsorted(t, self.start_us))
            self.late_events += late
            inside = int(np.searchsorted(t, self.start_us + s.step_us))
            self._count(events[late:inside])
            events, t = events[inside:], t[inside:]
            if not len(events):
                return
            silence = int(t[0]) - (self.start_us + s.step_us)
            yield self._finish()
            if silence > s.longest_gap_us:
                self._restart()
                yield None

    def _restart(self) -> None:
        self.start_us = None
        self.counts[:] = 0
        self.events_in_frame = 0
        self.restarts += 1

    def _finish(self) -> tuple[int, int, NDArray[np.float32]]:
        assert self.start_us is not None
        frame = self.counts.reshape(2, *self.settings.frame_size).astype(np.float32)
        done = (self.start_us, self.events_in_frame, frame)
        self.counts[:] = 0
        self.events_in_frame = 0
        self.start_us += self.settings.step_us
        return done

    def _count(self, events: Events) -> None:
        (rows, columns), (height, width) = self.settings.frame_size, self.settings.sensor_size
        y = events["y"].astype(np.int64) * rows // height
        x = events["x"].astype(np.int64) * columns // width
        cell = (events["p"].astype(np.int64) * rows + y) * columns + x
        self.counts += np.bincount(cell, minlength=len(self.counts))
        self.events_in_frame += len(events)
        self.taken_events += len(events)

    def _check_on_sensor(self, events: Events) -> None:
        height, width = self.settings.sensor_size
        if not len(events):
            return
        x, y = events["x"], events["y"]
        if int(x.min()) < 0 or int(y.min()) < 0 or int(x.max()) >= width or int(y.max()) >= height:
            raise ValueError(
                f"events reach x {x.min()}..{x.max()}, y {y.min()}..{y.max()}, outside the {width}x{height} sensor: "
                "give the camera's size"
            )


def classify_stream(
    predictor: Predictor, chunks: Iterable[Events], settings: StreamSettings, cutter: FrameCutter | None = None
) -> Iterator[Window]:
    """Classifies a stream of events; yields each `Window` as soon as it is complete. An incomplete last one is dropped.

    `predictor`: of a model trained on events. `chunks`: events sorted by time, in pieces of any length. `cutter`: of
    these settings, to read the number of late events afterwards, including those after the last window.
    Memory does not grow with the recording. Raises ValueError for a predictor that takes pictures, and, if state is
    to be kept, for one that takes whole windows.
    """
    if predictor.metadata.input != "events":
        raise ValueError(f"{predictor.metadata.model} was trained on pictures: give a model trained on event frames")
    runner = (
        _StepByStep(predictor, settings) if isinstance(predictor, StepPredictor) else _WholeWindows(predictor, settings)
    )
    cutter = cutter or FrameCutter(settings)
    numbers = itertools.count()
    starts: list[int] = []
    seconds: list[float] = []
    events = reported_late = 0
    for chunk in chunks:
        for frame in cutter.add(chunk):
            if frame is None:  # a long silence: the frames so far belong to no window
                runner.restart()
                starts, seconds, events = [], [], 0
                continue
            start_us, count, picture = frame
            begin = time.perf_counter()
            probabilities = runner.feed(torch.from_numpy(picture))
            seconds.append(time.perf_counter() - begin)
            starts.append(start_us)
            events += count
            if len(starts) < settings.steps:
                continue
            assert probabilities is not None
            yield Window(
                index=next(numbers),
                start_us=starts[0],
                end_us=start_us + settings.step_us,
                events=events,
                label=int(probabilities.argmax()) if events else None,
                probabilities=tuple(probabilities.tolist()) if events else (),
                latency_s=seconds[-1],
                compute_s=sum(seconds),
                late_events=cutter.late_events - reported_late,
            )
            reported_late = cutter.late_events
            starts, seconds, events = [], [], 0
            runner.end_window()


class _StepByStep:
    def __init__(self, predictor: StepPredictor[Any], settings: StreamSettings):
        self.predictor, self.keep_state = predictor, settings.keep_state
        self.state: Any = None

    def feed(self, frame: Tensor) -> Tensor | None:
        """Probabilities so far (classes,)."""
        logits, self.state = self.predictor.step(frame[None], self.state)
        return logits[0].softmax(-1)

    def restart(self) -> None:
        self.state = None

    def end_window(self) -> None:
        self.state = self.predictor.reset_readout(self.state) if self.keep_state else None


class _WholeWindows:
    def __init__(self, predictor: Predictor, settings: StreamSettings):
        if settings.keep_state:
            raise ValueError(
                "this file takes whole windows, each from membranes at rest, so no state can be kept: give one that "
                "steps (a checkpoint, folded weights, or a file exported with --streaming)"
            )
        self.predictor = predictor
        self.frames = torch.zeros(1, settings.steps, 2, *settings.frame_size)
        self.filled = 0

    def feed(self, frame: Tensor) -> Tensor | None:
        """Probabilities (classes,) once the window is full, None before."""
        self.frames[0, self.filled] = frame
        self.filled += 1
        return self.predictor.probabilities(self.frames)[0] if self.filled == self.frames.shape[1] else None

    def restart(self) -> None:
        self.filled = 0

    def end_window(self) -> None:
        self.restart()


def settings_for(
    predictor: Predictor,
    window_seconds: float | None = None,
    sensor_size: tuple[int, int] = (128, 128),
    keep_state: bool = False,
) -> StreamSettings:
    """Settings that fit a model: T frames of its size in a window of `window_seconds`.

    Default: the length of the samples that it was trained on, or 60 ms per frame if these were whole recordings.
    """
    steps = predictor.metadata.time_steps
    if window_seconds is not None and not 0 < window_seconds <= 3600:
        raise ValueError(f"a window lasts more than 0 and at most 3600 seconds, got {window_seconds}")
    if window_seconds is None and (trained := predictor.metadata.preprocessing.framing.window_us):
        window_seconds = trained / 1e6
    step_us = StreamSettings.step_us if window_seconds is None else round(window_seconds * 1e6 / steps)
    if step_us < 1:
        raise ValueError(f"a window of {window_seconds} s has less than a microsecond for each of its {steps} frames")
    return StreamSettings(step_us, steps, sensor_size, predictor.metadata.preprocessing.size, keep_state)
