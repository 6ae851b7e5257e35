"""The names of everything that can be read and written inside a model, and where each is found."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from receptance.model import Model
from receptance.model.architecture import Place

# The sums and norms of a block, which all versions have.
_BLOCK = {
    "resid_pre": Place("mix_time", "argument"),
    "ln1": Place("ln1"),
    "att": Place("att"),
    "resid_mid": Place("mix_channels", "argument"),
    "ln2": Place("ln2"),
    "ffn": Place("ffn"),
    "resid_post": Place("mix_channels"),
}
_STATE = Place("mix_channels", "result", 1)
_MODEL = ("emb", "ln_out", "head")


class Spot(NamedTuple):
    """Where the tensor of a name is found in one model."""

    name: str
    owner: nn.Module
    """The module that makes the call."""
    attribute: str
    """The attribute of the owner that it calls."""
    place: Place
    field: str | None = None
    """The field of a layer's state, if the place holds such a state."""
    block: nn.Module | None = None
    """The block that is run token by token, so that the state after each token exists."""


def names(model: Model) -> list[str]:
    """All names that `record` and `patch` know in this model.

    - `emb`, `ln_out` and `head` (the logits) are results of the modules outside the blocks.
    - `blocks.0.resid_pre`, `.resid_mid` and `.resid_post` are the residual stream before, between
      and after the two additions of a block.
    - `blocks.0.ln1` and `.ln2` are the norms, `.att` and `.ffn` what is added to the stream.
    - `blocks.0.att.wkv` and others, which each version names in the `intermediates` of its
      Architecture, lie inside time mixing and channel mixing.
    - `blocks.0.state.` and the name of a field is the state of the layer after each token.
    """
    return [spot.name for spot in spots(model)]


def spots(model: Model) -> list[Spot]:
    """The places of all names, in the order of the computation, states after their block."""
    if not isinstance(model, Model):
        raise ValueError(
            f"analysis looks into the modules of a torch model, and this is a "
            f"{type(model).__name__}; load the model with receptance.load"
        )
    architecture = model.config.architecture
    inside = architecture.intermediates
    att = {name: place for name, place in inside.items() if name.startswith("att.")}
    ffn = {name: place for name, place in inside.items() if name.startswith("ffn.")}
    order = ("resid_pre", "ln1", *att, "att", "resid_mid", "ln2", *ffn, "ffn", "resid_post")
    table = _BLOCK | att | ffn
    found = [_outside(model, "emb")]
    for layer, block in enumerate(model.blocks):
        modules = dict(block.named_modules())
        prefix = f"blocks.{layer}"
        found += [_inside(f"{prefix}.{name}", modules, table[name]) for name in order]
        found += [
            _inside(f"{prefix}.state.{field}", modules, _STATE)._replace(field=field, block=block)
            for field in architecture.state_fields
        ]
    return [*found, *(_outside(model, name) for name in _MODEL[1:])]


def chosen(model: Model, patterns: Iterable[str]) -> list[Spot]:
    """The places whose names match a pattern; ValueError for a pattern that matches none.

    In a pattern `*` stands for one part of a name, and `**` for any number of parts.
    """
    known = spots(model)
    wanted: set[str] = set()
    for pattern in patterns:
        matching = re.compile(_expression(pattern))
        matched = {spot.name for spot in known if matching.fullmatch(spot.name)}
        if not matched:
            raise ValueError(_unknown(pattern, [spot.name for spot in known]))
        wanted |= matched
    return [spot for spot in known if spot.name in wanted]


def _expression(pattern: str) -> str:
    parts = re.split(r"(\*\*|\*)", pattern)
    signs = {"**": ".*", "*": "[^.]*"}
    return "".join(signs.get(part, re.escape(part)) for part in parts)


def _unknown(pattern: str, known: list[str]) -> str:
    near = difflib.get_close_matches(pattern, known, 3, 0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else "analysis.names(model) lists all"
    return f"nothing in this model is called {pattern!r}; {hint}"


def _outside(model: Model, name: str) -> Spot:
    return Spot(name, model, name, Place(name))


def _inside(name: str, modules: dict[str, nn.Module], place: Place) -> Spot:
    # Attributes of the block may be stand-ins at the moment (see watching); its modules are not.
    path, _, attribute = place.call.rpartition(".")
    return Spot(name, modules[path], attribute, place)
