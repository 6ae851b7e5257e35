"""A power law of loss and compute: the front, a line through its lower part, and the rest."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from receptance.evaluation.intervals import Line as Fit
from receptance.evaluation.intervals import fitted_line
from receptance.evaluation.results import Curve, Figure
from receptance.reproduce.experiment import Check

LOSS, COMPUTE = "held-out loss, nats per token", "training compute, FLOPs"
SLOPE = "exponent of compute"
FITTED, BEYOND, LINE = "optimal, in the fit", "optimal, held out of the fit", "fit"
EDGE = "optimal, at the edge of the grid"
# So many points make a line of which r² says something, and so many can confute it.
_LEAST_FITTED, _LEAST_BEYOND = 5, 2
# Above the first r² they lie on a line, below the second they do not.
_STRAIGHT, _BENT = 0.95, 0.9
# The paper's r² of the fit and of the predictions.
_PAPER_FIT, _PAPER_REST = 0.994, 0.875
# A prediction is right if it is off by at most this share, and all predictions together if their
# mean error is less than this part of what an unchanging loss would have had. They have the form of
# the points if their r² is at least this.
_OFF, _PART, _FORETOLD = 0.05, 0.5, 0.75


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (compute, loss) with less loss than all that cost as much or less."""
    best, kept = math.inf, []
    for compute, loss in sorted(points):
        if loss < best:
            best = loss
            kept.append((compute, loss))
    return kept


def edge(runs: Mapping[str, Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The points that cost more than all runs of the next smaller size, of sizes in their order.

    Such a point may be on the front only because that size was not trained for longer.
    """
    sizes, found = list(runs.values()), []
    for smaller, size in itertools.pairwise(sizes):
        reach = max(compute for compute, _ in smaller)
        found += [point for point in size if point[0] > reach]
    return found


class PowerLaw:
    """The line through the front's lower part, and what it says of the rest.

    Points at the edge of the grid belong to neither, as nobody knows whether they are optimal.
    """

    def __init__(
        self,
        points: Sequence[tuple[float, float]],
        factor: float,
        edge: Collection[tuple[float, float]] = (),
    ) -> None:
        """points: compute and loss of all runs. Above 1/factor of the most compute is the rest."""
        optimal, self.factor = front(points), factor
        limit = max((compute for compute, _ in points), default=0.0) / factor
        self.edge = [point for point in optimal if point in edge]
        self.fitted = [x for x in optimal if x[0] <= limit and x not in edge]
        self.beyond = [x for x in optimal if x[0] > limit and x not in edge]
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
        return self._errors(self.beyond)

    def _errors(self, points: Sequence[tuple[float, float]]) -> list[float]:
        return [loss / self.predicted(compute) - 1 for compute, loss in points]

    def unchanged(self) -> list[float]:
        """The same for the prediction that more compute than that of the fit helps no more."""
        return [loss / self.fitted[-1][1] - 1 for _, loss in self.beyond]

    def checks(self) -> list[Check]:
        """The paper's two sentences."""
        return [self._straight(), self._holds()]

    def _straight(self) -> Check:
        rule = (
            f"r² of the fit to at least {_LEAST_FITTED} points is {_STRAIGHT} or more, and the "
            f"95 % interval of the slope lies below 0; r² below {_BENT} refutes it."
        )
        claim = f"On logarithmic axes the front is a line (r² = {_PAPER_FIT})."
        fit = self.fit
        if fit is None or len(self.fitted) < _LEAST_FITTED or fit.slope.high is None:
            found = f"There are {len(self.fitted)} points to fit a line to{self._left_out()}."
            return Check(claim=claim, rule=rule, found=found, agrees=None)
        falls = fit.slope.high < 0
        return Check(
            claim=claim,
            rule=rule,
            found=f"r² is {fit.r2:.3f} over {len(self.fitted)} points, from "
            f"{self.fitted[0][0]:.1e} to {self.fitted[-1][0]:.1e} FLOPs; the slope is "
            f"{fit.slope.value:.4f} ({fit.slope.low:.4f} to {fit.slope.high:.4f}).",
            agrees=False if fit.r2 < _BENT else True if fit.r2 >= _STRAIGHT and falls else None,
        )

    def _holds(self) -> Check:
        claim = f"The line holds for {self.factor:g} times the compute (r² = {_PAPER_REST})."
        rule = (
            f"at least {_LEAST_BEYOND} points are held out, each within {_OFF:.0%} of the "
            f"prediction, and the mean error is less than {_PART:g} of that of a guess which says "
            "that more compute than that of the fit helps no more. If r² of the predictions is "
            f"then below {_FORETOLD}, nobody can say."
        )
        if self.fit is None or len(self.beyond) < _LEAST_BEYOND:
            found = f"{len(self.beyond)} optimal points are held out of the fit{self._left_out()}."
            return Check(claim=claim, rule=rule, found=found, agrees=None)
        errors, r2 = [abs(error) for error in self.errors()], self.predicted_r2()
        still = [abs(error) for error in self.unchanged()]
        said = ", ".join(f"{error:+.1%}" for error in self.errors())
        mean, other = (sum(some) / len(some) for some in (errors, still))
        near = max(errors) <= _OFF and mean < _PART * other
        return Check(
            claim=claim,
            rule=rule,
            found=f"Measured minus predicted: {said}, up to {self.beyond[-1][0]:.1e} FLOPs (r² = "
            f"{r2:.3f}); the mean error is {mean:.1%}, and {other:.1%} for that "
            f"guess{self._left_out()}.",
            agrees=False if not near else True if r2 >= _FORETOLD else None,
        )

    def _left_out(self) -> str:
        if not self.edge:
            return ""
        said = ""
        if self.fit is not None:
            said = f" ({', '.join(f'{error:+.1%}' for error in self._errors(self.edge))})"
        return (
            f"; {len(self.edge)} at the edge of the grid decide nothing{said}: they cost more than "
            "all runs of the next smaller size, which with more tokens might be better"
        )

    def predicted_r2(self) -> float:
        """r² of what the line says of the rest; it needs two points there."""
        assert self.fit is not None
        logs = [(math.log10(compute), math.log10(loss)) for compute, loss in self.beyond]
        middle = sum(y for _, y in logs) / len(logs)
        rest = sum((y - self.fit.at(x)) ** 2 for x, y in logs)
        return 1 - rest / sum((y - middle) ** 2 for _, y in logs)

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
            about = {"points": len(self.beyond)}
            made.append(
                Figure(name="r² of the predictions", value=self.predicted_r2(), about=about)
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
        made += [curve(EDGE, self.edge)] if self.edge else []
        if self.fit is not None:
            ends = [self.fitted[0][0], max(x for x, _ in (*self.fitted, *self.beyond, *self.edge))]
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
