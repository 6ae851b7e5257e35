"""Figure 10: how fast each channel forgets, before and after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from receptance.analysis.decays import (
    decay_figures,
    half_lives,
    log_decays,
    starting_log_decays,
)
from receptance.evaluation.results import Figure, Result, Subject
from receptance.plots.panels import Line, Panel
from receptance.reproduce.experiment import (
    AGREES,
    Check,
    Experiment,
    Found,
    Piece,
    Work,
    verdict,
)
from receptance.storage.checkpoint import load

NOW, BEFORE = "after training", "before training"
# What "near 1" and "near 0" are: a half-life of over 100 tokens, and of under half a token.
_LONG, _SHORT = 100.0, 0.5
# What "many" and "several" are: shares of the channels of a layer.
_MANY, _SEVERAL = 0.2, 0.05
_LEAST_LAYERS = 3
_BOX = "tiny-python"
_BOXED = "This model of the package has read the modules of Python's standard library"


@dataclass(frozen=True, kw_only=True)
class Decays(Experiment):
    """The time decays of a model: sorted shares kept per token, and half-lives, in every layer."""

    NAME: ClassVar[str] = "decays"
    SHOWS: ClassVar[str] = "Figure 10"
    CLAIM: ClassVar[str] = (
        "In the last layers several channels keep nearly all from a token to the next and carry "
        "information far; in the first layer many keep nearly nothing and are local."
    )
    DOES: ClassVar[str] = "sorts exp(-w) in each layer of a model, before and after training"
    NEEDS: ClassVar[str] = "nothing; takes any model of any version"
    TAKES: ClassVar[tuple[str, str]] = ("seconds", "seconds")

    model: str = _BOX
    """The model, as for `receptance generate`; the default comes with the package."""

    def pieces(self) -> list[Piece]:
        """The model."""
        return [{"model": self.model}]

    def measure(self, piece: Piece, work: Work) -> dict[str, Any]:
        """Read the decays, and make those before training."""
        model, _ = load(piece["model"])
        return {
            NOW: log_decays(model).tolist(),
            BEFORE: starting_log_decays(model.config).tolist(),
            "fingerprint": model.fingerprint(),
            "about": {**model.config.to_dict(), "parameters": model.config.num_parameters},
        }

    def conclude(self, found: Sequence[tuple[Piece, Mapping[str, Any]]]) -> Found:
        """Look for long memories in the last layers and short ones in the first."""
        ((_, it),) = found
        name = Path(self.model).name
        decays = {when: torch.tensor(it[when]) for when in (NOW, BEFORE)}
        figures, curves = decay_figures(name, decays, first=1)
        return Found(
            checks=checks(decays[NOW], decays[BEFORE]),
            headline="the starting values alone have this form, and training keeps it"
            if verdict(checks(decays[NOW])) == verdict(checks(decays[BEFORE])) == AGREES
            else "",
            models=[Subject(name=name, fingerprint=it["fingerprint"], about=it["about"])],
            figures=[*figures, *_moved(name, decays)],
            curves=curves,
            caption=f"All {decays[NOW].shape[1]} channels of {len(decays[NOW])} layers; dotted is "
            "before training, by the formula of the starting values"
            + (f". {_BOXED}" if self.model == _BOX else ""),
            notes=[
                "The paper says itself that the starting values explain a part of the figure: what "
                "they have alone stands beside what training made of them.",
                "A layer's rate of decay is w in exp(-w); a factor above 1 forgets faster.",
            ],
        )

    def panels(self, result: Result) -> list[Panel]:
        """Shares and half-lives of each layer; those before training are dashed."""
        names = dict.fromkeys((curve.name, curve.y_name) for curve in result.curves)
        return [
            Panel(
                title=name,
                x=result.curves[0].x_name,
                y=unit,
                log_y=unit == "tokens",
                lines=[
                    Line(
                        f"layer {x.about['layer']}, {x.about['when']}",
                        x.x,
                        x.y,
                        style=f"C{x.about['layer'] % 10}{'-' if x.about['when'] == NOW else ':'}",
                    )
                    for x in result.curves
                    if x.name == name
                ],
            )
            for name, unit in names
        ]


def checks(log_decays: Tensor, before: Tensor | None = None) -> list[Check]:
    """The paper's two sentences about log decays [L,C] after training, and before it."""
    long, short = _shares(log_decays)
    tellable = len(log_decays) >= _LEAST_LAYERS
    then = ["", ""]
    if before is not None:
        then = [
            f" Before training it was {last:.1%} there, and {first:.1%} in the first."
            for first, last in _shares(before)
        ]
    return [
        Check(
            claim="Several channels of the last layers remember far, more than of the first.",
            rule=f"in the last third of the layers at least {_SEVERAL:.0%} of the channels, and "
            f"more than in the first, have half-lives above {_LONG:g} tokens.",
            found=f"After training it is {long[1]:.1%} of the channels there, and {long[0]:.1%} in "
            f"the first layer.{then[0]}",
            agrees=long[1] >= _SEVERAL and long[1] > long[0] if tellable else None,
        ),
        Check(
            claim="Many channels of the first layer are local.",
            rule=f"in the first layer at least {_MANY:.0%} of the channels, and more than in the "
            f"last third, have half-lives below {_SHORT:g} tokens.",
            found=f"After training it is {short[1]:.1%} of the channels in the last third, and "
            f"{short[0]:.1%} in the first layer.{then[1]}",
            agrees=short[0] >= _MANY and short[0] > short[1] if tellable else None,
        ),
    ]


def _shares(log_decays: Tensor) -> tuple[tuple[float, float], tuple[float, float]]:
    """The shares of channels with long and with short memories: of the first layer, of the last."""
    lives = half_lives(log_decays)
    parts = lives[:1], lives[-max(1, len(lives) // 3) :]
    long = [float((rows > _LONG).float().mean()) for rows in parts]
    short = [float((rows < _SHORT).float().mean()) for rows in parts]
    return (long[0], long[1]), (short[0], short[1])


def _moved(name: str, decays: Mapping[str, Tensor]) -> list[Figure]:
    """The factor from the rate before training to that after it, as a geometric mean."""
    rates = [(-decays[when]).clamp(min=1e-30).log() for when in (NOW, BEFORE)]
    return [
        Figure(
            name="rate of decay after training over that before",
            value=float(row.mean().exp()),
            model=name,
            about={"layer": layer},
        )
        for layer, row in enumerate(rates[0] - rates[1], start=1)
    ]
