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
_RWKV_4 = {
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
# These are the models of BlinkDL/rwkv-5-world and of BlinkDL/rwkv-6-world.
_RWKV_5 = {
    f"rwkv5-{name}": ModelConfig(
        version=5.2, vocab_size=WORLD_VOCAB_SIZE, width=width, num_layers=layers
    )
    for name, layers, width in (
        ("0.1b", 12, 768),
        ("0.4b", 24, 1024),
        ("1.5b", 24, 2048),
        ("3b", 32, 2560),
        ("7b", 32, 4096),
    )
}
_RWKV_6 = {
    f"rwkv6-{name}": ModelConfig(
        version=6, vocab_size=WORLD_VOCAB_SIZE, width=width, num_layers=layers
    )
    for name, layers, width in (
        ("0.1b", 12, 768),
        ("0.4b", 24, 1024),
        ("1.6b", 24, 2048),
        ("3b", 32, 2560),
        ("7b", 32, 4096),
        ("14b", 61, 4096),
    )
}
# These are the G1 models of BlinkDL/rwkv7-g1. No formula gives all of their ranks, which are those
# of the decay and the in-context learning rate, of the value, and of the gate.
_RWKV_7 = {
    f"rwkv7-{name}": ModelConfig(
        version=7,
        vocab_size=WORLD_VOCAB_SIZE,
        width=width,
        num_layers=layers,
        extras={"decay_rank": rank, "rate_rank": rank, "value_rank": value, "gate_rank": gate},
    )
    for name, layers, width, rank, value, gate in (
        ("0.1b", 12, 768, 64, 32, 128),
        ("0.4b", 24, 1024, 64, 32, 128),
        ("1.5b", 24, 2048, 96, 64, 256),
        ("2.9b", 32, 2560, 96, 64, 320),
        ("7.2b", 32, 4096, 128, 96, 480),
        ("13.3b", 61, 4096, 192, 128, 384),
    )
}
PUBLISHED_SIZES = _RWKV_4 | _RWKV_5 | _RWKV_6 | _RWKV_7


def published(name: str) -> ModelConfig:
    """The sizes of a published model, by name; ValueError lists the known names."""
    try:
        return PUBLISHED_SIZES[name.lower()]
    except KeyError:
        known = ", ".join(PUBLISHED_SIZES)
        raise ValueError(f"unknown model size {name!r}; the published sizes are {known}") from None
