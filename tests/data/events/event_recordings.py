"""Random recordings for the tests of this folder."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from spikingformer.data.events import make_events


def random_events(
    count: int, seed: int = 0, height: int = 128, width: int = 128, start_us: int = 0, span_us: int = 1_000_000
) -> NDArray[np.void]:
    draw = np.random.default_rng(seed)
    t = np.sort(draw.integers(start_us, start_us + span_us, count))
    x, y = draw.integers(0, width, count), draw.integers(0, height, count)
    return make_events(x, y, t, draw.integers(0, 2, count))
