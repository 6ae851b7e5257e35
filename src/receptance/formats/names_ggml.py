"""The names of tensors in files of llama.cpp (GGUF) and rwkv.cpp, and their official names.

Both store the low-rank matrices of RWKV-6 and RWKV-7 transposed. GGUF files have the shares of time
mixing of both as one tensor, files of rwkv.cpp those of RWKV-7. Names and order are those of
conversion/rwkv.py in llama.cpp and of python/convert_pytorch_to_ggml.py in rwkv.cpp, which has
official names for everything else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from receptance.config import ModelConfig
from receptance.formats.names import infer_config, some
from receptance.model.architecture import Shape

ARCHITECTURES = {"rwkv6": 6, "rwkv7": 7}
"""The versions by the name that llama.cpp gives to their architecture."""


@dataclass(frozen=True)
class Place:
    """The place of a tensor of an official name in a file."""

    stored: str
    """The name of the tensor in the file."""
    row: int | None = None
    """The number of the row that is meant, if the tensor in the file joins several."""
    turned: bool = False
    """Whether the file holds the transpose, of the last two axes."""
    joined: int = 0
    """The number of vectors that the tensor in the file joins, if it does."""
    last: int = 0
    """The number of axes of size 1 that the file has behind the others."""


_OUTSIDE = {
    "emb": "token_embd",
    "blocks.0.ln0": "token_embd_norm",
    "ln_out": "output_norm",
    "head": "output",
}
_BLOCK = {
    "ln1": "attn_norm",
    "ln2": "attn_norm_2",
    "att.ln_x": "time_mix_ln",
    "att.time_faaaa": "time_mix_first",
    "att.time_maa_x": "time_mix_lerp_x",
    "att.time_maa_w1": "time_mix_w1",
    "att.time_maa_w2": "time_mix_w2",
    "att.time_decay": "time_mix_decay",
    "att.time_decay_w1": "time_mix_decay_w1",
    "att.time_decay_w2": "time_mix_decay_w2",
    "ffn.x_k": "channel_mix_lerp_k",
    "ffn.time_maa_k": "channel_mix_lerp_k",
    "ffn.time_maa_r": "channel_mix_lerp_r",
    "ffn.key": "channel_mix_key",
    "ffn.receptance": "channel_mix_receptance",
    "ffn.value": "channel_mix_value",
}
_ORDERS = {6: "wkvrg", 7: "rwkvag"}  # of the shares that one tensor joins
_SHARES = {
    version: {f"att.{x}{letter}": row for row, letter in enumerate(_ORDERS[version])}
    for version, x in ((6, "time_maa_"), (7, "x_"))
}
_LOW_RANK = frozenset(
    (
        *(f"att.{x}{i}" for x in "wavg" for i in (1, 2)),
        *("att.time_maa_w1", "att.time_maa_w2", "att.time_decay_w1", "att.time_decay_w2"),
    )
)
_BONUS, _BONUS_6, _DECAY = "att.r_k", "att.time_faaaa", "att.time_decay"


def in_gguf(name: str, version: float) -> Place:
    """The place of a tensor in a GGUF file; the version is one of ARCHITECTURES."""
    assert version in ARCHITECTURES.values()
    part, kind = _split(name)
    if part in _OUTSIDE:
        return Place(f"{_OUTSIDE[part]}.{kind}")
    _, layer, own = part.split(".", 2)
    shares = _SHARES[int(version)]
    if own in shares:
        stored = f"blk.{layer}.time_mix_lerp_fused.weight"
        return Place(stored, row=shares[own], joined=len(shares))
    theirs = _BLOCK.get(own) or own.replace("att.", "time_mix_")
    return Place(f"blk.{layer}.{theirs}.{kind}", turned=own in _LOW_RANK)


def in_ggmf(name: str, version: float) -> Place:
    """The place of a tensor in a file of rwkv.cpp.

    Its RWKV-5 is either one without gates, whose bonus has the name of the older one, or one with a
    decay for every channel.
    """
    part, _ = _split(name)
    if version < 5 or not part.startswith("blocks."):
        return Place(name)
    _, layer, own = part.split(".", 2)
    if version == 7 and own in _SHARES[7]:
        return Place(f"blocks.{layer}.{_JOINED}", row=_SHARES[7][own], joined=len(_SHARES[7]))
    if version == 5.0 and own in (_BONUS_6, _DECAY):
        old = f"blocks.{layer}.att.time_first" if own == _BONUS_6 else name
        return Place(old, last=2)
    if version == 5.1 and own in (_BONUS_6, _DECAY):
        return Place(name, last=1 if own == _BONUS_6 else 2)
    if own == _BONUS_6 or (version == 5.2 and own == _DECAY):
        return Place(name, last=1)
    return Place(name, turned=own in _LOW_RANK)


_JOINED = "att.x_rwkvag"


def ggmf_version(entries: Mapping[str, Shape]) -> float | None:
    """The version that names and shapes in a file of rwkv.cpp show; None for RWKV-4."""
    first = {name.removeprefix("blocks.0."): shape for name, shape in entries.items()}
    if _JOINED in first:
        return 7
    if "att.time_maa_x" in first:
        return 6
    if "att.ln_x.weight" not in first:
        return None
    decay = first.get(_DECAY, ())
    channels = math.prod(decay) // max(1, decay[0]) if decay else 1
    return 5.2 if channels > 1 else 5.1 if "att.gate.weight" in first else 5.0


def _split(name: str) -> tuple[str, str]:
    """The official name of a module or parameter, and weight or bias."""
    part, _, kind = name.rpartition(".")
    return (part, kind) if kind in ("weight", "bias") else (name, "weight")


def places(
    stored: Iterable[str], version: float, layers: int, place: Callable[[str, float], Place]
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
        if shape[0] != place.joined or math.prod(shape) != place.joined * shape[-1]:
            raise ValueError(
                f"{place.stored} has the shape {shape}; it must join {place.joined} vectors"
            )
        return shape[-1:]
    if place.last and shape[-place.last :] == (1,) * place.last:
        return shape[: -place.last]
    return turned(shape) if place.turned else shape


def turned(shape: Shape) -> Shape:
    """The shape with its last two axes exchanged."""
    return (*shape[:-2], *shape[:-3:-1])


def is_matrix(name: str) -> bool:
    """Whether rwkv.cpp takes a tensor of two axes for a matrix that may be narrow."""
    return not name.endswith(f".{_BONUS}") and ".time_" not in name


def keeps_axes(name: str) -> bool:
    """Whether GGUF files have a tensor that is no matrix with its axes, and not as one vector."""
    return name.endswith(f".{_BONUS_6}")


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
_EXTRAS = {
    6: {
        "time_mix_extra_dim": "mix_rank",
        "time_decay_extra_dim": "decay_rank",
        _HEAD_SIZE: "head_size",
    },
    7: {
        "attention.decay_lora_rank": "decay_rank",
        "attention.iclr_lora_rank": "rate_rank",
        _VALUE_RANK: "value_rank",
        "attention.gate_lora_rank": "gate_rank",
        _HEAD_SIZE: "head_size",
    },
}
_RESCALED = "rescale_every_n_layers"
_SIZES = {
    "embedding_length": "width",
    "block_count": "num_layers",
    "feed_forward_length": "ffn_width",
}


def gguf_sizes(config: ModelConfig) -> dict[str, int]:
    """The sizes that a GGUF file has, by their keys without the prefix of the architecture."""
    sizes = {theirs: getattr(config, ours) for theirs, ours in _SIZES.items()}
    extras = _EXTRAS[int(config.version)]
    return sizes | {theirs: int(config.extras[ours]) for theirs, ours in extras.items()}


def gguf_fixed(config: ModelConfig) -> dict[str, int]:
    """What a file of this version says besides its sizes: that no weights were divided."""
    return {_RESCALED: 0} if config.version == 6 else {}


def gguf_rescaled(number: Number) -> int:
    """The number of blocks after which llama.cpp halves activations, and files smaller weights.

    0 where it does not. ValueError if it is no such number.
    """
    every = number(_RESCALED) or 0
    if not isinstance(every, int) or every < 0:
        raise ValueError(f"its key {_RESCALED} is {every}; it must be a whole number")
    return every


def gguf_config(version: float, shapes: Mapping[str, Shape], number: Number) -> ModelConfig:
    """The configuration of a model whose tensors have these shapes, by official name.

    ValueError if the sizes are not possible or if the keys tell others.
    """
    assert version in ARCHITECTURES.values()
    hidden = _hidden_shapes(shapes, number) if version == 7 else {}
    config = infer_config(dict(shapes) | hidden)
    for key, size in gguf_sizes(config).items():
        if (told := number(key)) not in (None, size):
            raise ValueError(f"its key {key} is {told}, but its tensors have {size}; it is damaged")
    return config


def _hidden_shapes(shapes: Mapping[str, Shape], number: Number) -> dict[str, Shape]:
    """The shapes that tensors of RWKV-7 do not show.

    GGUF files store the bonus as one vector, so the size of a head is read from its key. In the
    first block they have other tensors in place of those that no model uses, and llama.cpp ignores
    them; of these the shapes count in no other block.
    """
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
    return _unused(shapes, width, number(_VALUE_RANK)) | heads


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
