"""`ModelConfig`, the sizes of a model, and the sizes of the published models."""

from __future__ import annotations

from receptance.model.config import ModelConfig

__all__ = [
    "PILE_VOCAB_SIZE",
    "PUBLISHED_SIZES",
    "WORLD_VOCAB_SIZE",
    "ModelConfig",
    "published",
]

PILE_VOCAB_SIZE = 50277
WORLD_VOCAB_SIZE = 65536

# These are the models trained on the Pile (table 2 of the paper, arXiv 2305.13048).
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
    """The sizes of a published model, by name; ValueError lists the known names."""
    try:
        return PUBLISHED_SIZES[name.lower()]
    except KeyError:
        known = ", ".join(PUBLISHED_SIZES)
        raise ValueError(f"unknown model size {name!r}; the published sizes are {known}") from None
