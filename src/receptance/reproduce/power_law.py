"""A power law of loss and compute: the front, a line through its lower part, and the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from receptance.evaluation.intervals import Line as Fit
from receptance.evaluation.intervals import fitted_line
from receptance.evaluation.results import Curve, Figure
from receptance.reproduce.experiment import Check

LOSS, COMPUTE = "held-out loss, nats per token", "training compute, FLOPs"
SLOPE = "exponent of compute"
FITTED, BEYOND, LINE = "optimal, in the fit", "optimal, held out of the fit", "fit"
# So many points make a line of which r² says something, and so many can confute it.
_LEAST_FITTED, _LEAST_BEYOND = 5, 2
_STRAIGHT = 0.95
# A prediction is right if it is off by at most this share, and all predictions together if their
# mean error is less than this part of what an unchanging loss would have had.
_OFF, _PART = 0.05, 0.5


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (compute, loss) with less loss than all that cost as much or less."""
    best, kept = math.inf, []
    for compute, loss in sorted(points):
        if loss < best:
            best = loss
            kept.append((compute, loss))
    return kept


class PowerLaw:
    """The line through the front's lower part, and what it says of the rest."""

    def __init__(self, points: Sequence[tuple[float, float]], factor: float) -> None:
        """points: compute and loss of all runs. Above 1/factor of the most compute is the rest."""
        optimal, self.factor = front(points), factor
        limit = max((compute for compute, _ in points), default=0.0) / factor
        self.fitted = [point for point in optimal if point[0] <= limit]
        self.beyond = [point for point in optimal if point[0] > limit]
        self.fit: Fit | None = None
        if len(self.fitted) >= 2:
            x, y = ([math.log10(n) for n in column] for column in zip(*self.fitted, strict=True))
            self.fit = fitted_line(x, y, "runs on the front")

    def predicted(self, compute: float) -> float:
        """The loss that the line says."""
        assert self.fit is not None
        return float(10 ** self.fit.at(math.log10(compute)))

    def errors(self) -> list[float]:
        """How much more loss than predicted each point of the rest has, as a share."""
        return [loss / self.predicted(compute) - 1 for compute, loss in self.beyond]

    def unchanged(self) -> list[float]:
        """The same for the prediction that more compute than that of the fit helps no more."""
        return [loss / self.fitted[-1][1] - 1 for _, loss in self.beyond]

    def checks(self) -> list[Check]:
        """The paper's two sentences."""
        return [self._straight(), self._holds()]

    def _straight(self) -> Check:
        rule = (
            f"r² of the fit to at least {_LEAST_FITTED} points is {_STRAIGHT} or more, and the "
            "95 % interval of the slope lies below 0."
        )
        claim = "On logarithmic axes the front is a line."
        fit = self.fit
        if fit is None or len(self.fitted) < _LEAST_FITTED or fit.slope.high is None:
            found = f"There are {len(self.fitted)} points to fit a line to."
            return Check(claim=claim, rule=rule, found=found, agrees=None)
        return Check(
            claim=claim,
            rule=rule,
            found=f"r² is {fit.r2:.4f} over {len(self.fitted)} points, from "
            f"{self.fitted[0][0]:.1e} to {self.fitted[-1][0]:.1e} FLOPs; the slope is "
            f"{fit.slope.value:.4f} ({fit.slope.low:.4f} to {fit.slope.high:.4f}).",
            agrees=fit.r2 >= _STRAIGHT and fit.slope.high < 0,
        )

    def _holds(self) -> Check:
        claim = f"The line holds for {self.factor:g} times the compute."
        rule = (
            f"at least {_LEAST_BEYOND} points are held out, each within {_OFF:.0%} of the "
            f"prediction, whose mean error is less than {_PART:g} of that of an unchanging loss."
        )
        if self.fit is None or len(self.beyond) < _LEAST_BEYOND:
            found = f"{len(self.beyond)} optimal points are held out of the fit."
            return Check(claim=claim, rule=rule, found=found, agrees=None)
        errors = [abs(error) for error in self.errors()]
        still = [abs(error) for error in self.unchanged()]
        said = ", ".join(f"{error:+.2%}" for error in self.errors())
        mean, other = (sum(some) / len(some) for some in (errors, still))
        return Check(
            claim=claim,
            rule=rule,
            found=f"Measured minus predicted: {said}, up to {self.beyond[-1][0]:.1e} FLOPs; the "
            f"mean error is {mean:.2%}, and {other:.2%} for an unchanging loss.",
            agrees=max(errors) <= _OFF and mean < _PART * other,
        )

    def figures(self) -> list[Figure]:
        """Slope, r² of both parts, and the error of each prediction."""
        if self.fit is None:
            return []
        slope = self.fit.slope
        made = [
            Figure(
                name=SLOPE,
                value=slope.value,
                low=slope.low,
                high=slope.high,
                interval=slope.interval,
            ),
            Figure(name="r² of the fit", value=self.fit.r2, about={"points": len(self.fitted)}),
        ]
        if len(self.beyond) > 1:
            logs = [(math.log10(c), math.log10(y)) for c, y in self.beyond]
            middle = sum(y for _, y in logs) / len(logs)
            rest = sum((y - self.fit.at(x)) ** 2 for x, y in logs)
            total = sum((y - middle) ** 2 for _, y in logs)
            made.append(
                Figure(
                    name="r² of the predictions",
                    value=1 - rest / total,
                    about={"points": len(logs)},
                )
            )
        return made + [
            Figure(
                name="error of the prediction",
                value=100 * error,
                unit="%",
                about={"FLOPs": compute, "loss": loss, "predicted": self.predicted(compute)},
            )
            for (compute, loss), error in zip(self.beyond, self.errors(), strict=True)
        ]

    def curves(self) -> list[Curve]:
        """The points of both parts, and the line through all of their range."""
        made = [curve(FITTED, self.fitted)] if self.fitted else []
        made += [curve(BEYOND, self.beyond)] if self.beyond else []
        if self.fit is not None:
            ends = [self.fitted[0][0], (self.beyond or self.fitted)[-1][0]]
            made.append(curve(LINE, [(compute, self.predicted(compute)) for compute in ends]))
        return made


def curve(name: str, points: Any, model: str | None = None, **about: Any) -> Curve:
    """Points (compute, loss) as a curve of a result."""
    x, y = zip(*points, strict=True)
    return Curve(
        name=name,
        x_name=COMPUTE,
        x=[*map(float, x)],
        y_name="nats per token",
        y=[*map(float, y)],
        model=model,
        about=about,
    )
