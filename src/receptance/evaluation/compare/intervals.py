"""Means of few numbers, with their intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# The 97.5 % points of Student's t distribution with 1, 2, 3 ... degrees of freedom, and of the
# normal distribution, which takes over after the last.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_NORMAL = 1.960

Interval = tuple[float, float]


def half_width(values: Sequence[float]) -> float:
    """Half the 95 % interval of the mean of numbers [N], N ≥ 2, by Student's t distribution."""
    freedom = len(values) - 1
    factor = _T[freedom - 1] if freedom <= len(_T) else _NORMAL
    return factor * statistics.stdev(values) / math.sqrt(len(values))


def mean_interval(values: Sequence[float]) -> tuple[float, Interval | None]:
    """The mean and its 95 % interval; None for the interval of a single number."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    half = half_width(values)
    return mean, (mean - half, mean + half)


def ratio_interval(parts: Sequence[float], sizes: Sequence[float]) -> tuple[float, Interval | None]:
    """sum(parts) / sum(sizes) and its 95 % interval over the pieces of a text [N].

    The interval is that of a ratio estimator (Cochran, Sampling Techniques, 1977, equation 6.13):
    what counts is how far each part is from ratio times its size.
    """
    ratio = sum(parts) / sum(sizes)
    if len(parts) < 2:
        return ratio, None
    errors = [part - ratio * size for part, size in zip(parts, sizes, strict=True)]
    half = half_width(errors) / statistics.fmean(sizes)
    return ratio, (ratio - half, ratio + half)
