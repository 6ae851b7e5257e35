"""Curves of what was found: against difficulty, beyond the trained length, against the state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from receptance.evaluation.results import Curve, Figure

_TRAINED = "trained length"
# What figures tell about a run rather than about the difficulty of its task.
_OF_THE_RUN = (_TRAINED, "learning rate", "parameters", "state", "seconds", "mean absolute error")


def curves_of(figures: Sequence[Figure]) -> list[Curve]:
    """The curves that the figures of a task make, each of at least two points."""
    measured = [figure for figure in figures if "state" in figure.about]
    at_home = [f for f in measured if f.about.get("length") == f.about[_TRAINED]]
    varied = _varied(at_home)
    curves = []
    for key in varied:
        others = [name for name in varied if name != key]
        exact = _curves(at_home, key, f"{{}} by {key}", others)
        # Where pairs and length grow together there is one curve of both.
        curves += exact or _curves(at_home, key, f"{{}} by {key}", ())
    others = [_TRAINED, *(key for key in varied if key != "length")]
    curves += _curves(measured, "length", "{} beyond the trained length", others)
    title = "{} by numbers in the state"
    return curves + _curves(at_home, "state", title, varied, whole_name=False)


def _curves(
    figures: Iterable[Figure],
    key: str,
    title: str,
    others: Iterable[str],
    *,
    whole_name: bool = True,
) -> list[Curve]:
    """The curves against a number, one for each model and each value of the others.

    Without whole_name one curve is made of all widths of an architecture. Places with several
    figures make no curve.
    """
    others = tuple(others)
    groups: dict[str, list[Figure]] = {}
    for figure in (figure for figure in figures if key in figure.about):
        groups.setdefault(_label(figure, others, whole_name), []).append(figure)
    curves = []
    for name, group in groups.items():
        group = sorted(group, key=lambda f: f.about[key])
        x = [float(f.about[key]) for f in group]
        if len(x) < 2 or len(set(x)) < len(x):
            continue
        intervals = {f.interval for f in group}
        known = all(f.low is not None and f.high is not None for f in group)
        curves.append(
            Curve(
                name=title.format(group[0].name),
                x_name="state, numbers" if key == "state" else key,
                x=x,
                y_name=group[0].name,
                y=[f.value for f in group],
                model=name,
                low=[float(f.low or 0) for f in group] if known else None,
                high=[float(f.high or 0) for f in group] if known else None,
                interval=intervals.pop() if len(intervals) == 1 else "",
            )
        )
    return curves


def _varied(figures: Sequence[Figure]) -> list[str]:
    """The numbers of the difficulty that differ between figures."""
    found: dict[str, set[Any]] = {}
    for figure in figures:
        for name, value in figure.about.items():
            if name not in _OF_THE_RUN and type(value) in (int, float):
                found.setdefault(name, set()).add(value)
    return [name for name, values in found.items() if len(values) > 1]


def _label(figure: Figure, keys: Iterable[str], whole_name: bool) -> str:
    model = str(figure.model)
    model = model if whole_name else model.partition(" width ")[0]
    return ", ".join([model, *(f"{key} {figure.about[key]}" for key in keys)])
