"""The names of RWKV's tensors in transformers and in packages for it, and their official names.

RWKV-4 has one spelling, that of transformers, and RWKV-5.2 and RWKV-6 have the same one with the
names of their own parameters. RWKV-7 has three, all of which are read here:

- flash-linear-attention (RWKV7ForCausalLM), and rwkv7-hf with the same names, which store the
  low-rank matrices of a part as two layers, transposed, with a bias;
- `rwkv7.blocks.0.att...`, the official names behind a prefix, proposed for transformers;
- `model.layers.0.attention...` of the older Rwkv7ForCausalLM.

The first of these is also written, because most tools read it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from receptance.model.architecture import Shape

# What transformers names differently up to RWKV-6, where all but the head get the prefix `rwkv.`.
_PARTS_6 = {
    "emb": "embeddings",
    "ln0": "pre_ln",
    "att": "attention",
    "ffn": "feed_forward",
    "time_mix_k": "time_mix_key",
    "time_mix_v": "time_mix_value",
    "time_mix_r": "time_mix_receptance",
    "time_mix_g": "time_mix_gate",
}
# What flash-linear-attention names differently, where all but the head get the prefix `model.`.
_PARTS_7 = {
    "emb": "embeddings",
    "blocks": "layers",
    "ln_out": "norm",
    "ln0": "pre_norm",
    "ln1": "attn_norm",
    "ln2": "ffn_norm",
    "att": "attn",
    "head": "lm_head",
}
_ATTENTION_7 = {
    "receptance": "r_proj",
    "key": "k_proj",
    "value": "v_proj",
    "output": "o_proj",
    "ln_x": "g_norm",
}
# The last part of an official name, 0, 1 or 2 behind the letter, as the tensor of a layer there.
_LAYERS_7 = {"0": "lora.2.bias", "1": "lora.0.weight", "2": "lora.2.weight"}

_PREFIXES = ("rwkv.", "rwkv7.", "model.")
_OFFICIAL = {
    theirs: ours for table in (_PARTS_6, _PARTS_7, _ATTENTION_7) for ours, theirs in table.items()
}
_LOW_RANK = re.compile(r"(.*\.att\.)([wavg])_lora\.(lora\.[02]\.(?:weight|bias))")
# Six vectors that older files of flash-linear-attention hold as one, in its order.
_FUSED, _SHARES = ".att.x_x", "rwkvag"


def to_hf(name: str, version: float = 4) -> str:
    """The name that packages for transformers give to an official tensor name."""
    parts = name.split(".")
    if version < 7:
        renamed = ".".join(_PARTS_6.get(part, part) for part in parts)
        return renamed if parts[0] == "head" else f"rwkv.{renamed}"
    if parts[2:3] == ["att"]:
        letter, number = parts[3][:1], parts[3][1:]
        low_rank = len(parts) == 4 and number in _LAYERS_7
        own = [f"{letter}_lora", _LAYERS_7[number]] if low_rank else parts[3:]
        parts = [*parts[:3], *(_ATTENTION_7.get(part, part) for part in own)]
    renamed = ".".join(_PARTS_7.get(part, part) for part in parts)
    return renamed if parts[0] == "head" else f"model.{renamed}"


def from_hf(name: str) -> str:
    """The official name of a tensor of transformers; unknown names come back as they are."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    official = ".".join(_OFFICIAL.get(part, part) for part in name.split("."))
    if official.startswith("ln0."):  # Rwkv7ForCausalLM has it outside of the first block.
        official = f"blocks.0.{official}"
    if found := _LOW_RANK.fullmatch(official):
        numbers = {theirs: ours for ours, theirs in _LAYERS_7.items()}
        return f"{found[1]}{found[2]}{numbers[found[3]]}" if found[3] in numbers else official
    return official


def is_transposed(name: str) -> bool:
    """Whether a tensor of this name in transformers is the transpose of the official one."""
    return "_lora.lora." in name and name.endswith(".weight")


def shape_in_hf(name: str, shape: Shape, version: float) -> Shape:
    """The shape of a tensor there, by its official name and shape.

    Some are transposed, and of the vectors of RWKV-7 only the shares of token shift in time mixing
    keep their axes of size 1.
    """
    if is_transposed(to_hf(name, version)):
        return shape[::-1]
    squeezed = version == 7 and shape[:2] == (1, 1) and ".att.x_" not in name
    return shape[2:] if squeezed else shape


def is_hf(names: Iterable[str]) -> bool:
    """Whether these are names of a model of transformers, and not official ones."""
    starts = ("rwkv.", "rwkv7.", "embeddings.", "model.embeddings.", "model.layers.")
    return any(name.startswith(starts) for name in names)


def to_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under official names; ValueError if two would get the same name.

    A transposed matrix is copied: products of a view may differ in their last bits.
    """
    if not is_hf(tensors):
        return dict(tensors)
    renamed: dict[str, Tensor] = {}
    twice = []
    for name, tensor in tensors.items():
        turned = tensor.mT.contiguous() if _turns(name, tensor) else tensor
        for official, value in _split(from_hf(name), turned):
            twice += [official] if official in renamed else []
            renamed[official] = value
    if twice:
        shown = ", ".join(repr(name[:80]) for name in twice[:3])
        raise ValueError(f"these tensors are there under two names each: {shown}")
    return renamed


def _turns(name: str, tensor: Tensor) -> bool:
    return is_transposed(name) and tensor.dim() == 2


def _split(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor and its official name, or the several tensors of which it is made."""
    if not name.endswith(_FUSED) or tensor.shape[:1] != (len(_SHARES),):
        yield name, tensor
        return
    for letter, part in zip(_SHARES, tensor, strict=True):
        yield f"{name[: -len(_FUSED)]}.att.x_{letter}", part
