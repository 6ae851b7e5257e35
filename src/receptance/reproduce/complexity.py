"""Table 1: how time and space of each mechanism grow with the length T and the width d."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from receptance.evaluation.intervals import Line, fitted_line
from receptance.evaluation.results import Curve, Figure
from receptance.inference.measure import seconds
from receptance.reproduce.experiment import Check, Experiment, Found, Piece, Work
from receptance.reproduce.mechanisms import MECHANISMS, Mechanism, counted, drawn

# A slope agrees if it is as near as this to that of the paper's expression at the same places:
# terms of lower order bend it.
_NEAR = 0.1
_REPEATS = 5
# Slopes of time: RWKV's lies below the first, a Transformer's above the second.
_MOST, _MORE = 1.25, 1.25
COUNTED, TIMED = "counted", "timed"
# What each way of measuring finds, and its unit.
_FOUND = {
    COUNTED: {"operations": "operations", "bytes": "bytes"},
    TIMED: {"seconds": "seconds"},
}


@dataclass(frozen=True, kw_only=True)
class Complexity(Experiment):
    """Slopes of time and space over T and over d, of five rows of Table 1."""

    NAME: ClassVar[str] = "complexity"
    SHOWS: ClassVar[str] = "Table 1"
    CLAIM: ClassVar[str] = (
        "Time and space of inference: O(Td) and O(d) for RWKV, O(T²d) and O(T² + Td) for a "
        "Transformer, with linear attention and AFT in between."
    )
    DOES: ClassVar[str] = (
        "counts operations and bytes of one head of five mechanisms at several T and d, times "
        "those that have a fast form, and fits slopes on logarithmic axes"
    )
    TAKES: ClassVar[tuple[str, str]] = ("1 minute", "3 minutes")

    lengths: tuple[int, ...] = (256, 512, 1024, 2048)
    """T at which operations and bytes are counted."""
    widths: tuple[int, ...] = (32, 64, 128, 256)
    """d at which they are counted."""
    timed_lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    """T at which time is taken; multiples of 64."""
    timed_width: int = 256
    """d while time is taken."""
    length: int = 512
    """T while d changes."""
    width: int = 64
    """d while T changes."""

    def __post_init__(self) -> None:
        for name in ("lengths", "widths", "timed_lengths"):
            if len({*getattr(self, name)}) < 3 or min(getattr(self, name)) < 2:
                raise ValueError(f"{name} are {getattr(self, name)}; give three or more, above 1")
        if odd := [t for t in self.timed_lengths if t % 64]:
            raise ValueError(f"timed_lengths has {odd[0]}; wanted multiples of 64")

    @classmethod
    def quick(cls) -> Complexity:
        """Shorter texts."""
        return cls(lengths=(128, 256, 512, 1024), timed_lengths=(256, 512, 1024, 2048), length=256)

    def pieces(self) -> list[Piece]:
        """Every mechanism at every T and every d."""
        places = {(t, self.width, "T") for t in self.lengths}
        places |= {(self.length, d, "d") for d in self.widths}
        made = [
            {"how": COUNTED, "model": name, "T": t, "d": d, "over": over}
            for name in MECHANISMS
            for t, d, over in sorted(places)
        ]
        return made + [
            {"how": TIMED, "model": name, "T": t, "d": self.timed_width, "over": "T"}
            for name, row in MECHANISMS.items()
            for t in sorted({*self.timed_lengths})
            if row.fast is not None
        ]

    def measure(self, piece: Piece, work: Work) -> dict[str, Any]:
        """Count or time one call; the least of several times is taken."""
        row = MECHANISMS[piece["model"]]
        if piece["how"] == COUNTED:
            return dict(counted(row.read, piece["T"], piece["d"]))
        assert row.fast is not None
        given, fast = drawn(piece["T"], piece["d"]), row.fast
        return {"seconds": min(seconds(lambda: fast(*given)) for _ in range(_REPEATS))}

    def conclude(self, found: Sequence[tuple[Piece, Mapping[str, Any]]]) -> Found:
        """Fit all slopes, and compare those that were counted with the table."""
        curves = _curves(found)
        slopes = {_name(curve): _slope(curve) for curve in curves}
        return Found(
            checks=[*map(_check, *zip(*_rows(slopes), strict=True)), _in_seconds(slopes)],
            figures=[_figure(curve, slopes[_name(curve)]) for curve in curves],
            curves=curves,
            caption=f"One head, float32, d = {self.width} over T and T = {self.length} over d; "
            f"time is taken at d = {self.timed_width}; bytes are those beyond inputs and output",
            notes=[
                "Reformer, AFT-local and MEGA of Table 1 are not measured.",
                "Bytes are the most that a mechanism holds at once besides its inputs and its "
                "output, which are 4Td numbers for all of them. Table 1 counts these as Td for "
                "linear attention and the Performer and not for RWKV; computed as recurrences, "
                "they too keep a state that does not grow with T: d² and d² log d.",
                "Table 1 is about the recurrence alone. With its matrices a layer of RWKV takes "
                "O(Td²), as section 3.2 says, and so does a layer of each of the others on top.",
            ],
        )


_Name = tuple[str, str, str]
"""A curve: the model, what was measured, and over what."""


def _curves(found: Sequence[tuple[Piece, Mapping[str, Any]]]) -> list[Curve]:
    """A curve for each model and each thing that was measured, over T and over d."""
    made = []
    groups = dict.fromkeys((p["how"], p["over"], p["model"]) for p, _ in found)
    for how, over, model in groups:
        some = [
            (p, it) for p, it in found if (p["how"], p["over"], p["model"]) == (how, over, model)
        ]
        for what, unit in _FOUND[how].items():
            made.append(
                Curve(
                    name=f"{what} over {over}",
                    x_name=over,
                    x=[float(p[over]) for p, _ in some],
                    y_name=unit,
                    y=[float(it[what]) for _, it in some],
                    model=model,
                    about={"places": [[p["T"], p["d"]] for p, _ in some]},
                )
            )
    return sorted(made, key=lambda curve: curve.name)


def _name(curve: Curve) -> _Name:
    return str(curve.model), curve.name.split()[0], curve.x_name


def _slope(curve: Curve) -> tuple[Line, float | None]:
    """The slope that was found, and that of the paper's expression at the same places."""
    row = MECHANISMS[str(curve.model)]
    growth = {"operations": row.steps, "bytes": row.kept}.get(_name(curve)[1])
    x = np.log(curve.x)
    found = fitted_line(x, np.log(curve.y), "places")
    if growth is None:
        return found, None
    expected = [growth(t, d) for t, d in curve.about["places"]]
    return found, fitted_line(x, np.log(expected)).slope.value


def _rows(
    slopes: Mapping[_Name, tuple[Line, float | None]],
) -> list[tuple[Mechanism, list[tuple[_Name, float, float]]]]:
    """Each mechanism with its counted slopes: name, found, expected."""
    return [
        (
            row,
            [
                (name, line.slope.value, wanted)
                for name, (line, wanted) in slopes.items()
                if name[0] == model and wanted is not None
            ],
        )
        for model, row in MECHANISMS.items()
    ]


def _check(row: Mechanism, slopes: Sequence[tuple[_Name, float, float]]) -> Check:
    model = slopes[0][0][0]
    said = "; ".join(
        f"{what} grow with {over} to the power {value:z.2f} (expression: {wanted:z.2f})"
        for (_, what, over), value, wanted in slopes
    )
    inputs = f", of which {row.dropped} counts inputs and is left out here" if row.dropped else ""
    return Check(
        claim=f"{model}: time {row.time}, space {row.space}{inputs}.",
        rule=f"the slopes of counted operations and bytes on logarithmic axes differ by at most "
        f"{_NEAR} from those of the expressions at the same places.",
        found=f"{said}.",
        agrees=all(abs(value - wanted) <= _NEAR for _, value, wanted in slopes),
    )


def _in_seconds(slopes: Mapping[_Name, tuple[Line, float | None]]) -> Check:
    """Whether the clock tells the same of RWKV and the Transformer."""
    ours, theirs = (slopes[name, "seconds", "T"][0].slope for name in ("RWKV", "Transformer"))
    assert ours.low is not None and theirs.low is not None
    assert ours.high is not None and theirs.high is not None
    agrees = ours.high < _MOST and theirs.low > _MORE
    refuted = ours.low > _MOST or theirs.high < _MORE
    return Check(
        claim="In seconds RWKV grows at most linearly with T, and a Transformer faster.",
        rule=f"the 95 % interval of RWKV's slope is below {_MOST}, and that of the Transformer's "
        f"above {_MORE}; either one on the other side refutes it.",
        found=f"The slopes are {ours.value:.2f} ({ours.low:.2f} to {ours.high:.2f}) and "
        f"{theirs.value:.2f} ({theirs.low:.2f} to {theirs.high:.2f}).",
        agrees=True if agrees else False if refuted else None,
    )


def _figure(curve: Curve, slope: tuple[Line, float | None]) -> Figure:
    """The slope of a curve with its interval."""
    found, wanted = slope
    model, what, over = _name(curve)
    # What is counted is exact, so that an interval would be that of the form alone.
    exact = wanted is not None
    return Figure(
        name=f"slope of {what}",
        value=round(found.slope.value, 6) + 0.0,
        model=model,
        low=None if exact else found.slope.low,
        high=None if exact else found.slope.high,
        interval="" if exact else found.slope.interval,
        about={"over": over},
    )
