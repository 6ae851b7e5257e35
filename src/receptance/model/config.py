"""`ModelConfig`: the version and the sizes of a model, and what they cost.

Shapes everywhere in this package use one alphabet: B batch, T time, C channels (the model's width),
L layers, V vocabulary, F feed-forward width.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from receptance.model.architecture import Architecture
from receptance.model.versions import architecture


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The version and sizes that determine a model's tensors; making one checks them."""

    vocab_size: int
    """V, the number of token ids; `emb` and `head` have this many rows."""
    width: int
    """C, the number of channels of the residual stream."""
    num_layers: int
    """L, the number of blocks."""
    version: float = 4
    """The version of RWKV."""
    ffn_width: int = 0
    """F, the hidden width of channel mixing; 0 means the usual multiple of the width."""
    layer_norm_epsilon: float = 1e-5
    """The epsilon of every layer norm but the last, which the official code leaves at 1e-5."""
    extras: dict[str, float] = field(default_factory=dict, hash=False)
    """The sizes and epsilons that only some versions have, such as ranks, by name; those left out
    get their usual values. Version 4 has none."""

    def __post_init__(self) -> None:
        version = architecture(self.version)
        object.__setattr__(self, "version", version.number)  # 7 and not 7.0, as in flags
        for name in ("vocab_size", "width", "num_layers"):
            _check_size(name, getattr(self, name))
        if self.ffn_width == 0:
            object.__setattr__(self, "ffn_width", version.default_ffn_width(self.width))
        _check_size("ffn_width", self.ffn_width)
        _check_epsilon("layer_norm_epsilon", self.layer_norm_epsilon)
        object.__setattr__(self, "extras", self._all_extras())
        version.check(self)

    def _all_extras(self) -> dict[str, float]:
        """The extras given, and the usual values of the others; ValueError for an unknown name."""
        if not isinstance(self.extras, dict):
            raise ValueError(
                f"extras is a {type(self.extras).__name__}; wanted a dict of sizes by name"
            )
        usual = self.architecture.default_extras(self.width)
        for name, value in self.extras.items():
            if name not in usual:
                known = ", ".join(usual) or "none"
                raise ValueError(f"RWKV-{self.version} has no size {name!r}; it has {known}")
            (_check_epsilon if isinstance(usual[name], float) else _check_size)(name, value)
        return {**usual, **self.extras}

    @property
    def architecture(self) -> Architecture:
        """The `Architecture` of the version, which answers all that depends on it."""
        return architecture(self.version)

    @cached_property
    def num_parameters(self) -> int:
        """The exact count; for version 4 with F = 4C it is the paper's 2VD + 13D²L + D(11L + 4)."""
        return self.architecture.num_parameters(self)

    @cached_property
    def num_trained(self) -> int:
        """The parameters that training changes: all but those that no model uses."""
        shapes = self.architecture.shapes(self)
        unused = self.architecture.unused(self)
        return self.num_parameters - sum(math.prod(shapes[name]) for name in unused)

    @cached_property
    def forward_flops_per_token(self) -> int:
        """The operations of the matrix multiplications in a forward pass, per token.

        For version 4 with F = 4C that is 2(VD + 13D²L), the formula behind every entry of the
        paper's table 2.
        """
        return self.architecture.forward_flops_per_token(self)

    @property
    def training_flops_per_token(self) -> int:
        """The operations of both passes; the backward pass costs about twice the forward pass."""
        return 3 * self.forward_flops_per_token

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON; `extras` is left out if the version has none."""
        fields = dataclasses.asdict(self)
        return fields if self.extras else {n: x for n, x in fields.items() if n != "extras"}

    @classmethod
    def from_dict(cls, fields: Any) -> ModelConfig:
        """The inverse of to_dict; ValueError names fields that are missing or unknown."""
        if not isinstance(fields, dict):
            raise ValueError(
                f"the model's sizes are a {type(fields).__name__}; wanted a dict of sizes by name"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ValueError(
                f"unknown model fields {reprlib.repr(unknown)}; known ones are {sorted(known)}"
            )
        if missing := sorted({"vocab_size", "width", "num_layers"} - set(fields)):
            raise ValueError(f"model fields {missing} are missing")
        return cls(**fields)


def _check_size(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        found = reprlib.repr(value)
        raise ValueError(f"{name} is {found}; it must be a whole number of at least 1")


def _check_epsilon(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ValueError(f"{name} is {reprlib.repr(value)}; it must lie between 0 and 1")
