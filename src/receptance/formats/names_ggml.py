"""The names of tensors in files of llama.cpp (GGUF) and rwkv.cpp, and their official names.

Both store the low-rank matrices of RWKV-7 transposed and its six shares of time mixing as one
tensor. Names and order are those of conversion/rwkv.py in llama.cpp and of
python/convert_pytorch_to_ggml.py in rwkv.cpp. rwkv.cpp has official names for everything else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from receptance.config import ModelConfig
from receptance.formats.names import infer_config, some
from receptance.model.architecture import Shape

ARCHITECTURES = {"rwkv7": 7}
"""The versions by the name that llama.cpp gives to their architecture."""


@dataclass(frozen=True)
class Place:
    """The place of a tensor of an official name in a file."""

    stored: str
    """The name of the tensor in the file."""
    row: int | None = None
    """The number of the row that is meant, if the tensor in the file joins several."""
    turned: bool = False
    """Whether the file holds the transpose."""


_OUTSIDE = {
    "emb": "token_embd",
    "blocks.0.ln0": "token_embd_norm",
    "ln_out": "output_norm",
    "head": "output",
}
_BLOCK_7 = {
    "ln1": "attn_norm",
    "ln2": "attn_norm_2",
    "att.ln_x": "time_mix_ln",
    "ffn.x_k": "channel_mix_lerp_k",
    "ffn.key": "channel_mix_key",
    "ffn.value": "channel_mix_value",
}
_SHARES = {f"att.x_{letter}": row for row, letter in enumerate("rwkvag")}
_LOW_RANK = frozenset(f"att.{x}{i}" for x in "wavg" for i in (1, 2))
_BONUS = "att.r_k"


def in_gguf(name: str, version: int) -> Place:
    """The place of a tensor in a GGUF file; the version is one of ARCHITECTURES."""
    assert version in ARCHITECTURES.values()
    part, kind = _split(name)
    if part in _OUTSIDE:
        return Place(f"{_OUTSIDE[part]}.{kind}")
    _, layer, own = part.split(".", 2)
    if own in _SHARES:
        return Place(f"blk.{layer}.time_mix_lerp_fused.weight", row=_SHARES[own])
    theirs = _BLOCK_7.get(own) or own.replace("att.", "time_mix_")
    return Place(f"blk.{layer}.{theirs}.{kind}", turned=own in _LOW_RANK)


def in_ggmf(name: str, version: int) -> Place:
    """The place of a tensor in a file of rwkv.cpp."""
    part, _ = _split(name)
    if version != 7 or not part.startswith("blocks."):
        return Place(name)
    _, layer, own = part.split(".", 2)
    if own in _SHARES:
        return Place(f"blocks.{layer}.{_JOINED}", row=_SHARES[own])
    return Place(name, turned=own in _LOW_RANK)


_JOINED = "att.x_rwkvag"


def ggmf_version(stored: Iterable[str]) -> int | None:
    """The version that names in a file of rwkv.cpp show; None if official names tell it."""
    return 7 if any(name.endswith(f".{_JOINED}") for name in stored) else None


def _split(name: str) -> tuple[str, str]:
    """The official name of a module or parameter, and weight or bias."""
    part, _, kind = name.rpartition(".")
    return (part, kind) if kind in ("weight", "bias") else (name, "weight")


def places(
    stored: Iterable[str], version: int, layers: int, place: Callable[[str, int], Place]
) -> dict[str, Place]:
    """The places of all tensors of a model, as far as a file with these stored names has them.

    A stored name that belongs to no tensor of such a model comes back as it is, so that it can be
    named in an error. ValueError if that is the official name of a tensor that has another place.
    """
    left = dict.fromkeys(stored)
    # The names depend on the number of layers alone.
    anything = ModelConfig(version=version, vocab_size=1, width=1, num_layers=layers)
    wanted = {name: place(name, version) for name in anything.architecture.shapes(anything)}
    found = {name: where for name, where in wanted.items() if where.stored in left}
    known = {where.stored for where in found.values()}
    others = {name: Place(name) for name in left if name not in known}
    if twice := found.keys() & others.keys():
        raise ValueError(f"its tensors {some(twice)} are there under two names each")
    return found | others


def official_shape(place: Place, shape: Shape) -> Shape:
    """The shape of a tensor, given that of the stored one.

    ValueError if the stored one does not join the right number of vectors.
    """
    if place.row is not None:
        if shape[0] != len(_SHARES) or math.prod(shape) != len(_SHARES) * shape[-1]:
            raise ValueError(
                f"{place.stored} has the shape {shape}; it must join {len(_SHARES)} vectors"
            )
        return shape[-1:]
    return shape[::-1] if place.turned else shape


def is_matrix(name: str) -> bool:
    """Whether rwkv.cpp takes a tensor of two axes for a matrix, which the bonus is not."""
    return not name.endswith(f".{_BONUS}")


def ggmf_joined_shape(rows: int, shape: Shape) -> Shape:
    """The shape in a file of rwkv.cpp of vectors that are joined: [rows,1,C]."""
    return rows, 1, shape[-1]


def joined_shape(rows: int, shape: Shape) -> Shape:
    """The shape in a GGUF file of vectors that are joined: [rows,1,1,C]."""
    return rows, 1, 1, shape[-1]


# ---- what GGUF files say beside the tensors -----------------------------------------------------

Number = Callable[[str], int | float | None]
"""Gives the number that a file has under a key, without the prefix of its architecture."""

_HEAD_SIZE, _VALUE_RANK = "wkv.head_size", "attention.value_residual_mix_lora_rank"
_EXTRAS_7 = {
    "attention.decay_lora_rank": "decay_rank",
    "attention.iclr_lora_rank": "rate_rank",
    _VALUE_RANK: "value_rank",
    "attention.gate_lora_rank": "gate_rank",
    _HEAD_SIZE: "head_size",
}
_SIZES = {
    "embedding_length": "width",
    "block_count": "num_layers",
    "feed_forward_length": "ffn_width",
}


def gguf_sizes(config: ModelConfig) -> dict[str, int]:
    """The sizes that a GGUF file has, by their keys without the prefix of the architecture."""
    sizes = {theirs: getattr(config, ours) for theirs, ours in _SIZES.items()}
    return sizes | {theirs: int(config.extras[ours]) for theirs, ours in _EXTRAS_7.items()}


def gguf_config(version: int, shapes: Mapping[str, Shape], number: Number) -> ModelConfig:
    """The configuration of a model whose tensors have these shapes, by official name.

    GGUF files store the bonus as one vector, so the size of a head is read from its key. In the
    first block they have other tensors in place of those that no model uses, and llama.cpp ignores
    them; of these the shapes count in no other block. ValueError if the sizes are not possible or
    if the keys tell others.
    """
    assert version in ARCHITECTURES.values()
    head_size = number(_HEAD_SIZE)
    width = shapes.get("emb.weight", (0, 0))[-1]
    if not isinstance(head_size, int) or head_size < 1 or width % head_size:
        raise ValueError(
            f"its key {_HEAD_SIZE} is {head_size}; the width, {width}, must be a multiple of it"
        )
    bonuses = [
        name for name, shape in shapes.items() if name.endswith(f".{_BONUS}") and shape == (width,)
    ]
    heads = dict.fromkeys(bonuses, (width // head_size, head_size))
    config = infer_config(dict(shapes) | _unused(shapes, width, number(_VALUE_RANK)) | heads)
    for key, size in gguf_sizes(config).items():
        if (told := number(key)) not in (None, size):
            raise ValueError(f"its key {key} is {told}, but its tensors have {size}; it is damaged")
    return config


def _unused(shapes: Mapping[str, Shape], width: int, told: int | float | None) -> dict[str, Shape]:
    """The shapes of the tensors of the first block that are there but never used."""
    second = shapes.get("blocks.1.att.v1")
    rank = told if second is None else second[-1]
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"its key {_VALUE_RANK} is {rank}; it must be a whole number above 0")
    return {
        "blocks.0.att.v0": (width,),
        "blocks.0.att.v1": (width, rank),
        "blocks.0.att.v2": (rank, width),
    }


def gguf_stand_ins(config: ModelConfig) -> dict[str, str]:
    """The tensors that stand in a GGUF file for those that no model uses, by official names.

    llama.cpp reads them with these shapes.
    """
    return {name: name.replace(".att.v", ".att.a") for name in config.architecture.unused(config)}
