"""What runs of generated text show: figures, curves, and whether they are those of the paper."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import mul
from typing import Any

from receptance.evaluation.intervals import Estimate, fitted_line
from receptance.evaluation.results import Curve, Figure
from receptance.plots.panels import Line, Panel
from receptance.reproduce.experiment import Check, Piece
from receptance.reproduce.generators import CACHE, NO_CACHE, RWKV, STATE, TORCH, TRANSFORMERS

# A cost per token is constant if it grows by less than the first share over the run, and it grows
# if that is more than the second; between them nobody can say.
_CONSTANT, _GROWS = 0.1, 0.25
# The same for the power of the number of tokens with which all seconds grow.
_LINEAR, _MORE = 1.1, 1.2
TIME, STEP, MEMORY = "cumulative seconds", "seconds of a token", "memory"
ALL_TIME, ALL_MEMORY = "seconds of all tokens", "memory at the last token"
_MARKS = dict(zip((RWKV, *TRANSFORMERS), ("ko", "C0s", "C1^", "C2v", "C4D"), strict=True))
_STROKES = {STATE: "-", TORCH: ":", NO_CACHE: "-", CACHE: "--"}


@dataclass(frozen=True)
class Run:
    """One model of one size that has generated a text in one way."""

    piece: Piece
    found: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The model, and how it remembers."""
        return f"{self.piece['model']}, {self.piece['how']}"

    @property
    def seconds(self) -> float:
        """Those of all tokens."""
        return float(self.found["seconds"][-1])

    @property
    def bytes(self) -> int:
        """The memory at the last token."""
        return int(self.found["bytes"][-1])

    def growth(self, what: str) -> float:
        """By which share a token costs more in the last part of the run than in the first."""
        first, *_, last = self.found[what]
        return float(last / first - 1)

    def power(self) -> float:
        """With which power of the tokens all seconds grow, from the middle of the run on.

        The median step of each part stands for all its steps, so that a pause of the machine does
        not count.
        """
        tokens = self.found["tokens"]
        lengths = [b - a for a, b in itertools.pairwise((0, *tokens))]
        steps = zip(lengths, self.found["step"], strict=True)
        spent = list(itertools.accumulate(count * step for count, step in steps))
        middle = (len(tokens) - 1) // 2
        return math.log(spent[-1] / spent[middle]) / math.log(tokens[-1] / tokens[middle])

    def figures(self) -> Iterator[Figure]:
        """What a token costs in the first and the last part, what comes on top, and the sum."""
        tokens = self.found["tokens"]
        ends = (("by token", tokens[0], 0), ("by token", tokens[-1], -1))
        for what, named, unit, scale in (
            ("step", "time of a token", "ms", 1e3),
            ("bytes", "memory", "kB", 1e-3),
        ):
            if what == "bytes" and self.piece["how"] == TORCH:
                continue  # It is that of RWKV already.
            for word, n, place in ends:
                yield self._figure(f"{named} {word} {n}", self.found[what][place] * scale, unit)
            slope = fitted_line(tokens, self.found[what], "parts of the run").slope
            if what == "bytes":  # They are counted, so that nothing is uncertain about them.
                slope = Estimate(slope.value, None, None, "")
            on_top = slope.map(partial(mul, 1000 * scale))
            yield self._figure(f"{named}, on top per 1,000 tokens", on_top, unit)
        yield self._figure("all tokens", self.seconds, "s")
        yield self._figure("power of the tokens with which seconds grow", self.power(), "")

    def _figure(self, name: str, found: float | Estimate, unit: str) -> Figure:
        it = found if isinstance(found, Estimate) else Estimate(found, None, None, "")
        return Figure(
            name=name,
            value=it.value,
            unit=unit,
            low=it.low,
            high=it.high,
            interval=it.interval,
            model=self.piece["model"],
            about={k: self.piece[k] for k in ("size", "how", "dtype")},
        )


def curves(runs: Sequence[Run]) -> Iterator[Curve]:
    """What is measured over the tokens of each run, and over the sizes of each model."""
    fields = {TIME: ("seconds", "s"), STEP: ("step", "s"), MEMORY: ("bytes", "bytes")}
    for what, (field, unit) in fields.items():
        for run in _measured(runs, what):
            yield Curve(
                name=what,
                x_name="generated tokens",
                x=[*map(float, run.found["tokens"])],
                y_name=unit,
                y=[*map(float, run.found[field])],
                model=run.name,
                about={k: run.piece[k] for k in ("size", "dtype")},
            )
    for what, unit in ((ALL_TIME, "s"), (ALL_MEMORY, "bytes")):
        kinds: dict[tuple[str, str], list[Run]] = {}
        for run in _measured(runs, what):
            kinds.setdefault((run.name, run.piece["dtype"]), []).append(run)
        for (name, dtype), some in kinds.items():
            yield Curve(
                name=what,
                x_name="parameters",
                x=[float(run.found["parameters"]) for run in some],
                y_name=unit,
                y=[run.seconds if what == ALL_TIME else float(run.bytes) for run in some],
                model=name,
                about={"dtype": dtype},
            )


def _measured(runs: Sequence[Run], what: str) -> list[Run]:
    """RWKV in plain torch has the memory that RWKV has already."""
    memory = what in (MEMORY, ALL_MEMORY)
    return [run for run in runs if not (memory and run.piece["how"] == TORCH)]


def panels(found: Sequence[Curve], size: str) -> Iterator[Panel]:
    """The run of one size over its tokens, and all sizes; caches are dashed."""
    several = len({curve.about["dtype"] for curve in found}) > 1
    for name in dict.fromkeys(curve.name for curve in found):
        some = [x for x in found if x.name == name and x.about.get("size", size) == size]
        over_sizes = name in (ALL_TIME, ALL_MEMORY)
        lines = []
        for curve in some:
            model, how = str(curve.model).split(", ", 1)
            more = f", {curve.about['dtype']}" if several else ""
            style = _MARKS[model] + _STROKES[how]
            lines.append(Line(f"{curve.model}{more}", curve.x, curve.y, style=style))
        yield Panel(
            title=f"{name}, all sizes" if over_sizes else f"{name}, {size}",
            x=some[0].x_name,
            y="bytes" if "memory" in name else "seconds",
            lines=lines,
            log_x=True,
            log_y=True,
        )


# ---- what the figures show ----------------------------------------------------------------------


def _of(runs: Sequence[Run], model: str, how: str) -> Run:
    return next(run for run in runs if (run.piece["model"], run.piece["how"]) == (model, how))


def checks(runs: Sequence[Run], sizes: Sequence[str]) -> Iterator[Check]:
    """Figure 7 for the last of the sizes, and figures 13 and 14 for all, of runs of one type."""
    by_size = {size: [run for run in runs if run.piece["size"] == size] for size in sizes}
    ours = _of(by_size[sizes[-1]], RWKV, STATE)
    theirs = [run for run in by_size[sizes[-1]] if run.piece["how"] == NO_CACHE]
    for what, word in (("step", "time"), ("bytes", "memory")):
        grown = ours.growth(what)
        yield Check(
            claim=f"The {word} of a token of RWKV does not depend on how many there were.",
            rule=f"from the first part of the run to the last it grows by less than "
            f"{_CONSTANT:.0%}.",
            found=f"It changes by {grown:+.1%} over {ours.found['tokens'][-1]} tokens.",
            agrees=grown < _CONSTANT or (None if grown < _GROWS else False),
        )
        least = min(run.growth(what) for run in theirs)
        yield Check(
            claim=f"The {word} of a token of a Transformer without its cache grows.",
            rule=f"from the first part of the run to the last it grows by more than "
            f"{_GROWS:.0%} in each.",
            found="; ".join(f"{x.piece['model']} {x.growth(what):+.0%}" for x in theirs) + ".",
            agrees=least > _GROWS or (None if least > _CONSTANT else False),
        )
    yield _linear(ours)
    yield _more_than_linear(theirs)
    yield _at_all_sizes(by_size)


def _linear(ours: Run) -> Check:
    power = ours.power()
    return Check(
        claim="The cumulative time of RWKV is linear in the number of tokens (figure 7).",
        rule=f"from the middle of the run to its end the seconds grow at most with the power "
        f"{_LINEAR} of the tokens, the median step of each part taken for all of it; above "
        f"{_MORE} it is refuted.",
        found=f"They grow with the power {power:.2f}.",
        agrees=power <= _LINEAR or (None if power <= _MORE else False),
    )


def _more_than_linear(theirs: Sequence[Run]) -> Check:
    powers = {run.piece["model"]: run.power() for run in theirs}
    least = min(powers.values())
    return Check(
        claim="That of a Transformer without its cache is more than linear (figure 7).",
        rule=f"the same power is at least {_MORE} in each; below {_LINEAR} in all of them it is "
        "refuted.",
        found="; ".join(f"{name} {power:.2f}" for name, power in powers.items()) + ".",
        agrees=least >= _MORE or (None if max(powers.values()) >= _LINEAR else False),
    )


def _at_all_sizes(by_size: Mapping[str, Sequence[Run]]) -> Check:
    """RWKV in plain torch, as the Transformers are: kernels would measure who wrote them."""
    said, less = [], []
    for size, runs in by_size.items():
        ours, memory = _of(runs, RWKV, TORCH), _of(runs, RWKV, STATE).bytes
        theirs = [run for run in runs if run.piece["how"] == NO_CACHE]
        time, bytes = min(run.seconds for run in theirs), min(run.bytes for run in theirs)
        less += [ours.seconds < time, memory < bytes]
        said.append(
            f"{size}: {ours.seconds:.3g} s, the fastest of them {time:.3g} s; "
            f"{memory / 1000:,.0f} kB, the smallest {bytes / 1000:,.0f} kB"
        )
    return Check(
        claim="At every size RWKV takes less time and less memory than Transformers without their "
        "cache (figures 13 and 14).",
        rule="in plain torch, as the Transformers run, its seconds for all tokens and its memory "
        "at the last are the least of all; one size alone cannot tell.",
        found=f"{'. '.join(said)}.",
        agrees=all(less) if len(by_size) > 1 or not all(less) else None,
    )


def with_caches(runs: Sequence[Run]) -> Iterator[str]:
    """What the paper does not show, of runs of one size and type: the same with caches."""
    kernels, plain = _of(runs, RWKV, STATE), _of(runs, RWKV, TORCH)
    yield (
        f"RWKV runs by {kernels.found['runs by']}, and once more by {plain.found['runs by']}, as "
        f"the Transformers do: {kernels.seconds:.3g} s and {plain.seconds:.3g} s. The difference "
        "is one of implementations, and so is a part of all others: a step of a small model is "
        "mostly what calling it costs."
    )
    for run in runs:
        if run.piece["how"] == CACHE:
            yield (
                f"With its KV cache {run.piece['model']} takes {run.seconds:.3g} s; a token costs "
                f"{run.growth('step'):+.0%} at the end, and {run.growth('bytes'):+.0%} of memory."
            )
