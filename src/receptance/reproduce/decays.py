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
from receptance.plots import Line, Panel
from receptance.reproduce.experiment import Check, Experiment, Found, Piece, Work
from receptance.storage.checkpoint import load

NOW, BEFORE = "after training", "before training"
# What "near 1" and "near 0" are: a half-life of over 100 tokens, and of under half a token.
_LONG, _SHORT = 100.0, 0.5
# What "many" and "several" are: shares of the channels of a layer.
_MANY, _SEVERAL = 0.2, 0.05
_LEAST_LAYERS = 3


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

    model: str = "tiny-python"
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
        figures, curves = decay_figures(name, decays)
        return Found(
            checks=checks(decays[NOW]),
            models=[Subject(name=name, fingerprint=it["fingerprint"], about=it["about"])],
            figures=[*figures, _moved(name, decays)],
            curves=curves,
            caption=f"All {decays[NOW].shape[1]} channels of {len(decays[NOW])} layers",
            notes=["The paper says itself that the starting values explain a part of the figure."],
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
                        f"layer {x.about['layer'] + 1}, {x.about['when']}",
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


def checks(log_decays: Tensor) -> list[Check]:
    """The paper's two sentences about log decays [L,C] after training."""
    lives = half_lives(log_decays)
    layers = len(lives)
    last = lives[-max(1, layers // 3) :]
    long = [float((rows > _LONG).float().mean()) for rows in (lives[:1], last)]
    short = [float((rows < _SHORT).float().mean()) for rows in (lives[:1], last)]
    tellable = layers >= _LEAST_LAYERS
    return [
        Check(
            claim="Several channels of the last layers remember far, more than of the first.",
            rule=f"in the last third of the layers at least {_SEVERAL:.0%} of the channels, and "
            f"more than in the first, have half-lives above {_LONG:g} tokens.",
            found=f"It is {long[1]:.1%} of the channels there, and {long[0]:.1%} in the first "
            "layer.",
            agrees=long[1] >= _SEVERAL and long[1] > long[0] if tellable else None,
        ),
        Check(
            claim="Many channels of the first layer are local.",
            rule=f"in the first layer at least {_MANY:.0%} of the channels, and more than in the "
            f"last third, have half-lives below {_SHORT:g} tokens.",
            found=f"It is {short[0]:.1%} of the channels there, and {short[1]:.1%} in the last "
            "third.",
            agrees=short[0] >= _MANY and short[0] > short[1] if tellable else None,
        ),
    ]


def _moved(name: str, decays: Mapping[str, Tensor]) -> Figure:
    """By which factor training has changed the rates of decay, in the geometric mean."""
    rates = [(-decays[when]).clamp(min=1e-30).log() for when in (NOW, BEFORE)]
    return Figure(
        name="factor by which training changed the rate of decay",
        value=float((rates[0] - rates[1]).abs().mean().exp()),
        model=name,
    )
