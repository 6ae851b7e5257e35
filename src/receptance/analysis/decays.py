"""How fast each channel forgets: the decays of a model's parameters (figure 10 of the paper)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from receptance.evaluation.results import Curve, Figure, Result, Subject
from receptance.model import Model
from receptance.model.config import ModelConfig

_LONGEST = 1e12  # A decay that rounds to nothing has this half-life, since JSON has no infinity.


def log_decays(model: Model) -> Tensor:
    """The logarithm of what each channel keeps from a token to the next, [L,C], never positive.

    In versions whose decay depends on the text, it is that of the parameter around which it varies.
    ValueError for a version without such a parameter.
    """
    architecture = model.config.architecture
    parameters = model.named_parameters()
    found = [x.detach() for name, x in parameters if architecture.is_decay(name)]
    if not found:
        raise ValueError(f"RWKV-{model.config.version} has no parameter of a decay")
    return torch.stack([architecture.log_decay(x.float()).flatten() for x in found])


def half_lives(log_decays: Tensor) -> Tensor:
    """The tokens after which half is left, of log decays in any shape."""
    return (math.log(2) / log_decays.abs()).clamp(max=_LONGEST)


def retentions(log_decays: Tensor) -> dict[int, list[float]]:
    """The share that each channel keeps, by layer and in descending order, as plots draws them."""
    shares = log_decays.exp().sort(dim=-1, descending=True).values
    return dict(enumerate(shares.tolist()))


def starting_log_decays(config: ModelConfig) -> Tensor:
    """The `log_decays` of a model before training, [L,C]."""
    # They depend on width and depth alone, and a large head takes long to draw.
    return log_decays(Model(dataclasses.replace(config, vocab_size=1, ffn_width=1)))


def decay_figures(
    name: str, decays: Mapping[str, Tensor], first: int = 0
) -> tuple[list[Figure], list[Curve]]:
    """Median half-lives, shares and half-lives of log decays [L,C] by when they were there.

    first is the number of the first layer.
    """
    figures, curves = [], []
    for when, found in decays.items():
        for layer, row in enumerate(found, start=first):
            row = row.sort(descending=True).values
            about = {"layer": layer, "when": when}
            lives = half_lives(row)
            figures.append(
                Figure(
                    name="median half-life",
                    value=float(lives.median()),
                    unit="tokens",
                    model=name,
                    about=about,
                )
            )
            channels = [float(i) for i in range(1, len(row) + 1)]
            for what, values in (("share kept per token", row.exp()), ("half-life", lives)):
                curves.append(
                    Curve(
                        name=what,
                        x_name="channel, in descending order",
                        x=channels,
                        y_name="tokens" if what == "half-life" else "share",
                        y=values.tolist(),
                        model=name,
                        about=about,
                    )
                )
    return figures, curves


def decay_result(model: Model, name: str) -> Result:
    """The decays of every layer before and after training, as shares and half-lives."""
    now, before = log_decays(model), starting_log_decays(model.config)
    figures, curves = decay_figures(name, {"now": now, "before training": before})
    return Result(
        kind="decays",
        what="how fast each channel forgets, before and after training",
        models=[Subject(name=name, fingerprint=model.fingerprint(), about=model.config.to_dict())],
        figures=figures,
        curves=curves,
        notes=["Figure 10 of arXiv 2305.13048v2 shows the shares of RWKV-4 169M after training."],
    )
