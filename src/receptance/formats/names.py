"""The tensors of RWKV: their names in official files and in transformers, and whose they are.

Official names and shapes are those of RWKV-LM, RWKV-v4neo/src/model.py. Other versions' files are
recognized by the names in its siblings RWKV-v2-RNN to RWKV-v7, in the transformers ports of RWKV-5
and RWKV-6, and in flash-linear-attention.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from receptance.config import ModelConfig
from receptance.model.architecture import Shape
from receptance.model.versions import architecture

# The version of files that nothing marks as another one.
_VERSION = 4

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Where transformers names a part differently. All but the head also get the prefix `rwkv.` there.
_HF_PARTS = {
    "emb": "embeddings",
    "ln0": "pre_ln",
    "att": "attention",
    "ffn": "feed_forward",
    "time_mix_k": "time_mix_key",
    "time_mix_v": "time_mix_value",
    "time_mix_r": "time_mix_receptance",
}
_OFFICIAL_PARTS = {theirs: ours for ours, theirs in _HF_PARTS.items()}


def to_hf(name: str) -> str:
    """The name that transformers gives to an official tensor name."""
    renamed = ".".join(_HF_PARTS.get(part, part) for part in name.split("."))
    return renamed if renamed.startswith("head.") else f"rwkv.{renamed}"


def from_hf(name: str) -> str:
    """The official name of a tensor of transformers; unknown names come back as they are."""
    parts = name.removeprefix("rwkv.").split(".")
    return ".".join(_OFFICIAL_PARTS.get(part, part) for part in parts)


def is_hf(names: Iterable[str]) -> bool:
    """Whether these are the names of transformers' RwkvForCausalLM or RwkvModel."""
    return any(name.startswith(("rwkv.", "embeddings.")) for name in names)


def to_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under official names; ValueError if two would get the same name."""
    if not is_hf(tensors):
        return dict(tensors)
    renamed = {from_hf(name): tensor for name, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        twice = [name for name, count in Counter(map(from_hf, tensors)).items() if count > 1]
        raise ValueError(f"these tensors are there under two names each: {some(twice)}")
    return renamed


def tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every tensor of a model of this configuration, by official name, with its shape."""
    return config.architecture.shapes(config)


def infer_config(shapes: Mapping[str, Shape]) -> ModelConfig:
    """The configuration of the model whose tensors, by official name, have these shapes.

    Parameters that are vectors may be [1,1,C] or [C]. ValueError names the tensors that are
    missing, unexpected or of a wrong shape, or says what the tensors are instead: a version or
    variant that is not built, an adapter, no RWKV at all.
    """
    _refuse_others(shapes)
    _check_names(shapes)
    config = ModelConfig(**architecture(_VERSION).infer(shapes))
    _check_shapes(shapes, tensor_shapes(config))
    return config


def conform(
    tensors: Mapping[str, Tensor], source: Path, config: ModelConfig | None = None
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Checked tensors under official names in official shapes, as views, and their configuration.

    Takes official names or those of transformers. The configuration is inferred unless it is
    given. ValueError starts with the source.
    """
    try:
        official = to_official(tensors)
        shapes = {name: tuple(tensor.shape) for name, tensor in official.items()}
        if config is None:
            config = infer_config(shapes)
        else:
            _check_num_layers(config, shapes)  # before names are made for all of them
            _check_whole(config, shapes)
            _check_shapes(shapes, tensor_shapes(config))
        _check_dtypes(official)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    wanted = tensor_shapes(config)
    return config, {name: official[name].view(shape) for name, shape in wanted.items()}


def some(names: Iterable[str], limit: int = 3) -> str:
    """A few of the names for an error message: quoted, shortened, and how many more there are."""
    # Names come from files: quoting keeps line breaks and terminal codes out of the message.
    every = list(names)
    shown = ", ".join(repr(name[:80]) for name in every[:limit])
    return shown if len(every) <= limit else f"{shown} and {len(every) - limit} more"


def _num_layers(names: Iterable[str]) -> int:
    # Layers are counted, not read off the largest index: a file could name a block 10**12.
    return len({name.split(".")[1] for name in names if name.startswith("blocks.")})


def _check_names(shapes: Mapping[str, Shape]) -> None:
    """ValueError unless these are the names of a whole model, whatever its sizes."""
    layers = max(1, _num_layers(shapes))
    anything = ModelConfig(version=_VERSION, vocab_size=1, width=1, num_layers=layers)
    _check_whole(anything, shapes)


def _check_num_layers(config: ModelConfig, shapes: Mapping[str, Shape]) -> None:
    if (found := _num_layers(shapes)) != config.num_layers:
        raise ValueError(f"the tensors have {found} layers and their config {config.num_layers}")


def _check_whole(config: ModelConfig, shapes: Mapping[str, Shape]) -> None:
    wanted = tensor_shapes(config)
    found = []
    if missing := [name for name in wanted if name not in shapes]:
        found.append(f"missing are {some(missing)}")
    if unexpected := [name for name in shapes if name not in wanted]:
        found.append(f"unexpected are {some(unexpected)}")
    if found:
        raise ValueError(
            f"the tensors are not those of a whole RWKV-{config.version} model: "
            f"{'; '.join(found)}; with {config.num_layers} blocks there are {len(wanted)} tensors"
        )


def _check_shapes(shapes: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> None:
    for name, shape in wanted.items():
        # (C) for (1,1,C): converters squeeze time_mix_*, and mean the same.
        squeezed = shape[2:] if shape[:2] == (1, 1) and len(shape) == 3 else shape
        if shapes[name] not in (shape, squeezed):
            raise ValueError(
                f"{name} has the shape {shapes[name]}; "
                f"with the other sizes of this model it must be {shape}"
            )


def _check_dtypes(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in WEIGHT_DTYPES:
            raise ValueError(
                f"{name} is of type {tensor.dtype}; weights must be "
                "float32, float16, bfloat16 or float64: use the original, unquantized file"
            )


def _refuse_others(shapes: Mapping[str, Shape]) -> None:
    """ValueError that says what these tensors are, when they are recognizably not RWKV-4."""
    _refuse_adapters(shapes)
    if version := other_version(shapes):
        raise ValueError(f"this is an {version} file; this release reads RWKV-4")
    _refuse_variants(shapes)
    _refuse_prefixes(shapes)
    if not any(name.startswith("blocks.") and ".att." in name for name in shapes):
        raise ValueError(
            f"this is no RWKV model: there are {len(shapes)} tensors, named {some(shapes)}; "
            "RWKV-4 has tensors such as 'blocks.0.att.time_decay'"
        )


def _refuse_adapters(names: Iterable[str]) -> None:
    if found := [name for name in names if re.search(r"lora_[AB]\b", name)]:
        raise ValueError(
            f"this is a LoRA adapter or has one inside ({some(found)}); "
            "merge it into its base model and use the result"
        )


# The last parts of names that only one version has; the first version that fits decides.
# `att` is official and, once mapped, transformers; `attn` is flash-linear-attention.
_MARKS: dict[str, Callable[[str, Shape], bool]] = {
    "RWKV-8": lambda name, shape: name.endswith(".ffn.enn.weight"),
    "RWKV-7": lambda name, shape: name.endswith((".att.r_k", ".att.x_r", ".att.w0", ".attn.r_k")),
    "RWKV-6": lambda name, shape: (
        ".att.time_maa_" in name or name.endswith((".att.time_decay_w1", ".attn.x_bias"))
    ),
    # Heads, and in them a decay for each channel.
    "RWKV-5.2": lambda name, shape: (
        name.endswith(".att.time_decay") and len(shape) > 1 and shape[-1] > 1
    ),
    "RWKV-5": lambda name, shape: name.endswith(
        (".att.ln_x.weight", ".att.gate.weight", ".att.time_faaaa")
    ),
    "RWKV-3": lambda name, shape: name.endswith(".att.time_decay") and len(shape) > 1,
    "RWKV-2": lambda name, shape: name.endswith(".att.time_mix"),
}


def other_version(shapes: Mapping[str, Shape]) -> str | None:
    """What tensors of these official names and shapes are, "RWKV-6" say, if not RWKV-4."""
    for version, marked in _MARKS.items():
        if any(marked(name, shape) for name, shape in shapes.items()):
            return version
    return None


# What switches of RWKV-v4neo's training script add to or replace in RWKV-4.
_VARIANTS = {
    "tiny attention (RWKV-4a)": r"\.tiny_",
    "extra attention (RWKV-4b)": r"\.att\.((qq|kk|vv|oo)\.|time_mix_(qq|kk|vv)$|att_mask$)",
    "a feed-forward for the first attention (pre_ffn)": r"\.ffnPre\.",
    "a copying head (head_qk)": r"^(head_[qk]\.|copy_mask$)",
    "another feed-forward (MishGLU)": r"\.ffn\.(aa|bb)\.",
}


def _refuse_variants(names: Iterable[str]) -> None:
    for what, pattern in _VARIANTS.items():
        if found := [name for name in names if re.search(pattern, name)]:
            raise ValueError(
                f"this is a variant of RWKV-4 with {what}: {some(found)}; "
                "this release reads RWKV-4 without it"
            )


def _refuse_prefixes(names: Iterable[str]) -> None:
    for name in names:
        prefix = name.removesuffix("emb.weight")
        if prefix != name and prefix.endswith("."):
            raise ValueError(
                f"the tensor names start with {some([prefix])}, which a wrapper around the model "
                "added; save the state dict of the model inside it"
            )
