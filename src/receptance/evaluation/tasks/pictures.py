"""Pictures of curves, drawn with matplotlib: curves of one name share a panel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from receptance.atomic import written
from receptance.evaluation.results import Curve
from receptance.plots.pictures import check_picture

_PANEL = (5.2, 3.8)  # the size of a panel in inches
_STYLES = ("o-", "s--", "^:", "d-.")


def draw_curves(curves: Sequence[Curve], stem: Path, *, chance: float | None = None) -> list[Path]:
    """Draw curves as STEM.png and STEM.svg, one panel for each name; return the paths.

    Intervals are shaded; the level of guessing is a dotted line. ValueError if matplotlib is not
    installed, or if something else than a PNG is at STEM.png.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("no picture without matplotlib: pip install matplotlib") from None
    names = list(dict.fromkeys(curve.name for curve in curves))
    models = list(dict.fromkeys(curve.model or "" for curve in curves))
    figure = Figure(figsize=(_PANEL[0] * len(names), _PANEL[1]), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for curve in (curve for curve in curves if curve.name == name):
            number = models.index(curve.model or "")
            style, color = _STYLES[number % len(_STYLES)], f"C{number % 10}"
            axes.plot(curve.x, curve.y, style, color=color, markersize=4, label=curve.model)
            if curve.low is not None and curve.high is not None:
                axes.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.15)
            axes.set_xlabel(curve.x_name)
            axes.set_ylabel(curve.y_name)
        if chance is not None:
            axes.axhline(chance, color="gray", linestyle=":", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_title(name, fontsize="small")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "svg")]
    check_picture(paths[0])
    for path in paths:
        with written(path) as file:
            # Without a date equal curves are equal files.
            about = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(file, format=path.suffix[1:], dpi=120, metadata=about)
    return paths
