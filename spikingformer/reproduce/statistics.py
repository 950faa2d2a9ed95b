"""Means with their uncertainty, for a handful of runs."""

import math
import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """An estimate and the half-width of its 95 % confidence interval (None: a single run has none)."""

    value: float
    half_width: float | None
    n: int


def standard_deviation(values: list[float]) -> float | None:
    """Of the sample (n - 1); None for a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def mean_interval(values: list[float], confidence: float = 0.95) -> Interval:
    """Mean of independent runs with Student's t interval. Raises ValueError for no values."""
    if not values:
        raise ValueError("no runs to average")
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return Interval(mean, None, 1)
    return Interval(mean, _t((1 + confidence) / 2, n - 1) * statistics.stdev(values) / math.sqrt(n), n)


def difference_interval(a: list[float], b: list[float], confidence: float = 0.95) -> Interval:
    """Mean of a minus mean of b with Welch's interval (unequal variances). Raises ValueError below two runs each."""
    if len(a) < 2 or len(b) < 2:
        raise ValueError(f"a difference needs at least two runs on each side, got {len(a)} and {len(b)}")
    va, vb = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    gap = statistics.fmean(a) - statistics.fmean(b)
    if va + vb == 0:
        return Interval(gap, 0.0, min(len(a), len(b)))
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    return Interval(gap, _t((1 + confidence) / 2, freedom) * math.sqrt(va + vb), min(len(a), len(b)))


def _t(probability: float, freedom: float) -> float:
    from scipy.stats import t

    return float(t.ppf(probability, freedom))
