"""Where the tensors inside RWKV-7's time mixing and channel mixing can be seen (see v7.py)."""

from __future__ import annotations

from receptance.model.architecture import Place

# What reads the mixtures of tokens, by the letters of their shares.
_READERS = {
    "r": "receptance",
    "w": "_log_decay",
    "k": "key",
    "v": "_value",
    "a": "_rate",
    "g": "_gate",
}

INTERMEDIATES = {
    **{f"att.mix_{x}": Place(f"att.{call}", "argument") for x, call in _READERS.items()},
    **{f"att.{call.strip('_')}": Place(f"att.{call}") for call in _READERS.values()},
    "att.scaled_key": Place("att.wkv", "argument", 4),  # k, scaled by the learning rate
    "att.removal": Place("att.wkv", "argument", 6),  # minus the normalized key
    "att.wkv": Place("att.wkv"),
    "att.gated": Place("att.output", "argument"),
    "ffn.mix_k": Place("ffn.key", "argument"),
    "ffn.key": Place("ffn.key"),
    "ffn.hidden": Place("ffn.value", "argument"),
}
"""The `intermediates` of its Architecture. The value is the one that the first layer's is in."""
