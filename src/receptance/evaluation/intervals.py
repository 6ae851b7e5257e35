"""Means and ratios over documents, with 95 % confidence intervals."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

_LEVEL = 0.975
# The normal distribution's quantile of that level.
_NORMAL = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval."""

    value: float
    low: float | None
    high: float | None
    """Both ends are None if there are fewer than two documents, which tell nothing of others."""
    interval: str
    """What the interval is, such as "95 % over 120 documents, Student's t"; empty without one."""

    def map(self, function: Callable[[float], float]) -> Estimate:
        """The estimate of a monotonic function of the number; its interval maps with it."""
        if self.low is None or self.high is None:
            return Estimate(function(self.value), None, None, self.interval)
        low, high = sorted((function(self.low), function(self.high)))
        return Estimate(function(self.value), low, high, self.interval)


def mean(values: ArrayLike, what: str = "documents") -> Estimate:
    """The mean of one value for each document [N], with Student's interval."""
    found = np.asarray(values, np.float64)
    return ratio(found, np.ones_like(found), what)


def ratio(sums: ArrayLike, sizes: ArrayLike, what: str = "documents") -> Estimate:
    """The sum of all documents' sums [N] over the sum of their sizes [N].

    Nats and bytes, for example, give nats per byte, in which a long document counts for more. The
    standard error is that of a ratio estimator: documents are drawn, and the ratio is linear in
    them near its value (the delta method); Student's quantile makes 95 % of it. ValueError without
    documents or with a total size of 0.
    """
    tops, bottoms = np.asarray(sums, np.float64), np.asarray(sizes, np.float64)
    if tops.shape != bottoms.shape or tops.ndim != 1:
        raise ValueError(
            f"{list(tops.shape)} sums for {list(bottoms.shape)} sizes; wanted [N] both"
        )
    if not bottoms.sum() > 0:
        raise ValueError("nothing to average: there are no documents with anything in them")
    count, value = len(tops), float(tops.sum() / bottoms.sum())
    if count < 2:
        return Estimate(value, None, None, "")
    spread = float(np.square(tops - value * bottoms).sum())
    error = math.sqrt(count / (count - 1) * spread) / float(bottoms.sum())
    reach = student_quantile(count - 1) * error
    return Estimate(value, value - reach, value + reach, f"95 % over {count:,} {what}, Student's t")


def share(value: float, count: int, what: str = "documents") -> Estimate:
    """The share of so many documents in which something holds, with Wilson's interval.

    The interval has a width where it holds in none or in all of them, unlike Student's (E. B.
    Wilson, JASA 22, 1927). ValueError if there are no documents, or if the value is no share.
    """
    if count < 1 or not 0 <= value <= 1:
        raise ValueError(f"{value} of {count} {what} is no share; wanted 0 to 1 of at least 1")
    spread = _NORMAL**2 / count
    middle = (value + spread / 2) / (1 + spread)
    reach = math.sqrt(spread * value * (1 - value) + spread**2 / 4) / (1 + spread)
    low, high = max(0.0, middle - reach), min(1.0, middle + reach)
    return Estimate(value, low, high, f"95 % over {count:,} {what}, Wilson's")


def resampled_error(
    metric: Callable[[Sequence[Any]], float], values: Sequence[Any], iters: int
) -> float:
    """The standard error of a metric over resamples of its values, drawn from a fixed seed.

    It has the arguments of `bootstrap_stderr` of lm-evaluation-harness.
    """
    generator = random.Random(0)
    drawn = (generator.choices(values, k=len(values)) for _ in range(max(2, iters)))
    return stdev(map(metric, drawn))


def exponential(nats: float) -> float:
    """A perplexity of a mean loss in nats, at most about 1e304: a new model may be that bad."""
    return math.exp(min(nats, 700.0))


def student_quantile(degrees: int) -> float:
    """The quantile of level 0.975 of Student's distribution, to three digits.

    It is exact for 1 and 2 degrees of freedom; for more it is the expansion of Cornish and Fisher
    around the normal distribution (Abramowitz and Stegun, 26.7.5).
    """
    if degrees < 1:
        raise ValueError(f"degrees is {degrees}; a spread needs at least two values")
    if degrees == 1:
        return math.tan(math.pi * (_LEVEL - 0.5))
    if degrees == 2:
        return (2 * _LEVEL - 1) / math.sqrt(2 * _LEVEL * (1 - _LEVEL))
    z = _NORMAL
    terms: Sequence[float] = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, start=1))


@dataclass(frozen=True)
class Line:
    """The straight line that was fitted to points by least squares."""

    slope: Estimate
    """Its interval is None for fewer than three points."""
    intercept: float
    r2: float
    """The share of the variance of y that the line explains; 1 if y does not vary."""

    def at(self, x: float) -> float:
        """The value of the line at a place."""
        return self.intercept + self.slope.value * x


def fitted_line(x: ArrayLike, y: ArrayLike, what: str = "points") -> Line:
    """The line through points x [N], y [N], with Student's interval of its slope.

    Logarithms of both give the exponent of a power law. ValueError for fewer than two places.
    """
    places, values = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if places.shape != values.shape or places.ndim != 1 or len({*places.tolist()}) < 2:
        raise ValueError(
            f"a line needs two places or more, and got {places.size} x, {values.size} y"
        )
    off, count = places - places.mean(), len(places)
    spread = float(np.square(off).sum())
    value = float((off * values).sum()) / spread
    intercept = float(values.mean() - value * places.mean())
    rest = float(np.square(values - intercept - value * places).sum())
    total = float(np.square(values - values.mean()).sum())
    r2 = 1 - rest / total if total > 0 else 1.0
    if count < 3:
        return Line(Estimate(value, None, None, ""), intercept, r2)
    reach = student_quantile(count - 2) * math.sqrt(rest / (count - 2) / spread)
    named = f"95 % of a fit over {count:,} {what}, Student's t"
    return Line(Estimate(value, value - reach, value + reach, named), intercept, r2)
