"""What an experiment is: options, pieces of work that are kept, and a verdict from their figures.

An experiment is a frozen dataclass whose fields are its options. `pieces` says what is to be done,
`measure` does one piece, and `conclude` makes figures, curves and checks of all that was found. A
piece that was done is kept, so an interrupted run goes on with the next one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from receptance.evaluation.drawing import Chart, is_wide, kinds
from receptance.evaluation.results import Curve, Figure, Result, Source, Subject
from receptance.plots.panels import Line, Panel

Piece = dict[str, Any]
"""What tells one piece of work from the others, as JSON."""

AGREES, DIFFERS, NOT_SHOWN = "agrees", "does not agree", "not shown at this size"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One claim beside what was measured, and the rule that decides whether they agree."""

    claim: str
    """What the paper says."""
    rule: str
    """When that counts as confirmed, in figures."""
    found: str
    """What was measured."""
    agrees: bool | None
    """Whether the rule is kept; None if the size or the noise lets nobody say."""

    @property
    def verdict(self) -> str:
        """The answer in words."""
        return NOT_SHOWN if self.agrees is None else AGREES if self.agrees else DIFFERS


def verdict(checks: Sequence[Check]) -> str:
    """The answer of several checks together: one that fails decides, then one that cannot tell."""
    found = {check.verdict for check in checks}
    return next((x for x in (DIFFERS, NOT_SHOWN, AGREES) if x in found), NOT_SHOWN)


@dataclass(kw_only=True)
class Found:
    """What an experiment has found."""

    checks: Sequence[Check]
    models: Sequence[Subject] = ()
    """The models with their exact parameters, as `about["parameters"]`."""
    data: Sequence[Source] = ()
    figures: Sequence[Figure] = ()
    curves: Sequence[Curve] = ()
    notes: Sequence[str] = ()
    headline: str = ""
    """What is found, where the verdict alone would mislead: no capital, no full stop."""
    caption: str = ""
    """What stands below the picture besides models and machine: tokens, precision, seeds."""
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """What a piece of work is given."""

    folder: Path
    """Where models and the like may be kept between pieces and runs."""
    note: Callable[[str, float], object] = lambda what, share: None
    """Told from time to time what is being done, and which share of the piece is done."""
    device: str = "cpu"
    """Where to compute, if the experiment has an option `device`."""


@dataclass(frozen=True, kw_only=True)
class Experiment(ABC):
    """One experiment of the paper; the fields of a subclass are its options."""

    NAME: ClassVar[str]
    """What the command calls it."""
    SHOWS: ClassVar[str]
    """Where it stands in the paper, such as "Figure 10"."""
    CLAIM: ClassVar[str]
    """What the paper says, in a sentence."""
    DOES: ClassVar[str]
    """What the command does, in a sentence."""
    NEEDS: ClassVar[str] = "nothing"
    """What has to be there besides this package."""
    TAKES: ClassVar[tuple[str, str]]
    """About how long the quick and the full form take on two processor cores."""
    PACKAGES: ClassVar[tuple[str, ...]] = ()
    """Packages that have to be installed, and whose versions decide the result."""
    PARALLEL: ClassVar[bool] = False
    """Whether pieces may run side by side; where time is measured they may not."""
    READY: ClassVar[bool] = True
    """Whether it runs without anything that the user has to give."""

    @classmethod
    def quick(cls) -> Self:
        """The options of a run that takes at most two minutes on two processor cores."""
        return cls()

    def identity(self) -> dict[str, Any]:
        """What decides the findings besides the options, such as the fingerprint of a model."""
        return {}

    @abstractmethod
    def pieces(self) -> Sequence[Piece]:
        """All pieces of work, in the order in which they are done."""

    def cost(self, piece: Piece) -> float:
        """How much longer a piece takes than others, for the remaining time that is shown."""
        return 1.0

    def prepare(self, work: Work) -> None:  # noqa: B027 Most experiments need nothing.
        """Make what several pieces need, once and before the first of them."""

    @abstractmethod
    def measure(self, piece: Piece, work: Work) -> dict[str, Any]:
        """Do one piece, and return what was found as JSON."""

    @abstractmethod
    def conclude(self, found: Sequence[tuple[Piece, Mapping[str, Any]]]) -> Found:
        """What all pieces together show."""

    def panels(self, result: Result) -> list[Panel]:
        """The parts of the picture, made from the result alone: by default one for each kind."""
        return [panel(chart) for chart in kinds(result)]

    def result(
        self, found: Sequence[tuple[Piece, Mapping[str, Any]]], seconds: float, **about: Any
    ) -> Result:
        """The result of the experiment in the form that all results have."""
        it = self.conclude(found)
        said = [f"{self.SHOWS} of arXiv 2305.13048v2. {self.CLAIM}"]
        said += [f"{x.verdict}: {x.claim} {x.found} Rule: {x.rule}" for x in it.checks]
        headline = verdict(it.checks) + (f": {it.headline}" if it.headline else "")
        return Result(
            kind="reproduce",
            what=f"{self.NAME}: {self.SHOWS} of the paper, {headline}",
            models=it.models,
            data=it.data,
            figures=it.figures,
            curves=it.curves,
            options=asdict(self),
            seed=getattr(self, "seed", None),
            seconds=seconds,
            # The first of them say again what details has, for whoever knows no experiments.
            notes=[*said, *it.notes],
            details={
                "experiment": self.NAME,
                "identity": self.identity(),
                "verdict": verdict(it.checks),
                "headline": headline,
                "checks": [asdict(x) | {"verdict": x.verdict} for x in it.checks],
                "caption": it.caption,
                **it.details,
            },
            **about,
        )


def panel(chart: Chart) -> Panel:
    """A chart of a result as a part of a picture."""
    first = chart.curves[0]
    lines = [
        Line(label, curve.x, curve.y, curve.low, curve.high)
        for label, curve in zip(chart.labels, chart.curves, strict=True)
    ]
    across, up = is_wide(chart)
    return Panel(
        title=chart.title, x=first.x_name, y=first.y_name, lines=lines, log_x=across, log_y=up
    )


def headline(result: Result) -> str:
    """The verdict, and what is found where that would mislead."""
    return str(result.details.get("headline", result.details["verdict"]))


def remarks(result: Result) -> Sequence[str]:
    """The notes of a result without those that repeat its claim and its checks."""
    return result.notes[1 + len(result.details["checks"]) :]


def caption(result: Result) -> str:
    """What stands below a picture: models with their parameters, what was run, the machine."""
    models = [
        f"{x.name} ({x.about['parameters']:,} parameters)" if "parameters" in x.about else x.name
        for x in result.models
    ]
    hardware = result.machine.get("gpu") or result.machine.get("cpu", "")
    count, cores = result.machine.get("threads"), result.machine.get("cores")
    of = "" if cores is None else f" of {cores} cores" if cores > 1 else " of 1 core"
    threads = f"{count} thread{'s' * (count != 1)}{of}, torch {result.versions.get('torch')}"
    parts = [", ".join(models), result.details.get("caption", ""), f"{hardware}, {threads}"]
    return ". ".join(part for part in parts if part) + "."
