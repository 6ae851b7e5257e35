"""What a model is: its version and sizes, the published ones, and what they cost.

Shapes everywhere in this package use one alphabet: B batch, T time, C channels (the model's width),
L layers, V vocabulary, F feed-forward width.
"""

from __future__ import annotations

import dataclasses
import reprlib
from dataclasses import dataclass
from typing import Any

VERSIONS = (4,)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The sizes that decide a model's tensors. Checked here, once."""

    vocab_size: int
    """V, the number of token ids; `emb` and `head` have this many rows."""
    width: int
    """C, the number of channels of the residual stream."""
    num_layers: int
    """L, the number of blocks."""
    version: int = 4
    """The RWKV architecture."""
    ffn_width: int = 0
    """F, the hidden width of channel mixing; 0 means 4 times the width."""
    layer_norm_epsilon: float = 1e-5
    """Epsilon of every layer norm but the last, which the official code leaves at 1e-5."""

    def __post_init__(self) -> None:
        if self.version not in VERSIONS:
            raise ValueError(
                f"RWKV version {reprlib.repr(self.version)} is not supported; "
                "this release builds version 4"
            )
        for name in ("vocab_size", "width", "num_layers", "ffn_width"):
            value = getattr(self, name)
            if name == "ffn_width" and value == 0:
                value = 4 * self.width
                object.__setattr__(self, name, value)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                found = reprlib.repr(value)
                raise ValueError(f"{name} is {found}; it must be a whole number of at least 1")
        epsilon = self.layer_norm_epsilon
        if not isinstance(epsilon, (int, float)) or not 0 < epsilon < 1:
            found = reprlib.repr(epsilon)
            raise ValueError(f"layer_norm_epsilon is {found}; it must lie between 0 and 1")

    @property
    def num_parameters(self) -> int:
        """Exact count; with F = 4C this is the paper's 2VD + 13D²L + D(11L + 4)."""
        width, layers = self.width, self.num_layers
        matrices = 5 * width * width + 2 * width * self.ffn_width
        vectors = 11 * width
        return 2 * self.vocab_size * width + layers * (matrices + vectors) + 4 * width

    @property
    def forward_flops_per_token(self) -> int:
        """Matrix multiplications only, the embedding look-up not counted.

        With F = 4C this is 2(VD + 13D²L), the formula behind every entry of the paper's table 2.
        """
        width = self.width
        matrices = 5 * width * width + 2 * width * self.ffn_width
        return 2 * (self.vocab_size * width + self.num_layers * matrices)

    @property
    def training_flops_per_token(self) -> int:
        """Forward and backward; the backward pass costs about twice the forward pass."""
        return 3 * self.forward_flops_per_token

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Any) -> ModelConfig:
        """The inverse of to_dict; ValueError names fields that are missing or unknown."""
        if not isinstance(fields, dict):
            raise ValueError(f"the sizes of the model are a {type(fields).__name__}, not named")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ValueError(
                f"unknown model fields {reprlib.repr(unknown)}; known ones are {sorted(known)}"
            )
        if missing := sorted({"vocab_size", "width", "num_layers"} - set(fields)):
            raise ValueError(f"model fields {missing} are missing")
        return cls(**fields)


PILE_VOCAB_SIZE = 50277
WORLD_VOCAB_SIZE = 65536

# Table 2 of the paper (arXiv 2305.13048): the models trained on the Pile.
PUBLISHED_SIZES = {
    name: ModelConfig(vocab_size=PILE_VOCAB_SIZE, width=width, num_layers=layers)
    for name, layers, width in (
        ("169m", 12, 768),
        ("430m", 24, 1024),
        ("1.5b", 24, 2048),
        ("3b", 32, 2560),
        ("7b", 32, 4096),
        ("14b", 40, 5120),
    )
}


def published(name: str) -> ModelConfig:
    """The published size of that name; ValueError lists the names there are."""
    try:
        return PUBLISHED_SIZES[name.lower()]
    except KeyError:
        known = ", ".join(PUBLISHED_SIZES)
        raise ValueError(f"unknown model size {name!r}; the published sizes are {known}") from None
