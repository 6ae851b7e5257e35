"""The official names of RWKV's tensors, and the version and the sizes that they show.

Official names and shapes are those of RWKV-LM: RWKV-v4neo/src/model.py, RWKV-v5/src/model.py (also
of RWKV-6) and RWKV-v7/train_temp.
Versions are recognized by the names in RWKV-v2-RNN to RWKV-v7 beside them. names_hf.py has the
names that other packages use.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from receptance.config import ModelConfig
from receptance.formats.names_hf import to_official
from receptance.model.architecture import Shape
from receptance.model.versions import VERSIONS, architecture

# The version of files that nothing marks as another one.
_UNMARKED = 4

TIME_STATE = "blocks.{}.att.time_state"
"""The name of a layer's tensor in the official files of learned states."""
_OLD_BONUS = ".att.time_first"
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every tensor of a model of this configuration, by official name, with its shape."""
    return config.architecture.shapes(config)


def infer_config(shapes: Mapping[str, Shape]) -> ModelConfig:
    """The configuration of the model whose tensors, by official name, have these shapes.

    Parameters that are vectors may be [1,1,C] or [C]. ValueError names the tensors that are
    missing, unexpected or of a wrong shape, or says what the tensors are instead: a version or
    variant that is not built, an adapter, no RWKV at all.
    """
    version = _version(shapes)
    _check_names(shapes, version)
    config = ModelConfig(**architecture(version).infer(shapes))
    _check_shapes(shapes, tensor_shapes(config))
    return config


def conform(
    tensors: Mapping[str, Tensor], source: Path, config: ModelConfig | None = None
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The tensors, checked, under official names in official shapes, and their configuration.

    The names may be official ones or those of transformers. The configuration is inferred unless
    it is given. Tensors that files may lack because no model uses them become zeros. ValueError
    starts with the source.
    """
    try:
        official = with_plain_bonus(to_official(tensors))
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
    like = official["emb.weight"]
    return config, {
        name: official[name].view(shape) if name in official else like.new_zeros(shape)
        for name, shape in tensor_shapes(config).items()
    }


def with_plain_bonus(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors of RWKV-5.0 and 5.1 with one name for the bonus, of which files may have two.

    Older training code has `time_first`, whose exponential is the bonus, and newer code the bonus
    itself, `time_faaaa`. The exponential is float32, as in the package `rwkv`.
    """
    if not any(name.endswith(".att.ln_x.weight") for name in tensors):
        return tensors
    found = {}
    for name, tensor in tensors.items():
        old = name.endswith(_OLD_BONUS)
        new = name.removesuffix(_OLD_BONUS) + ".att.time_faaaa" if old else name
        found[new] = tensor.float().exp() if old and tensor.is_floating_point() else tensor
    return found


def some(names: Iterable[str], limit: int = 3) -> str:
    """Some of the names for an error message, quoted and shortened, and how many more there are."""
    # Names come from files: quoting keeps line breaks and terminal codes out of the message.
    every = list(names)
    shown = ", ".join(repr(name[:80]) for name in every[:limit])
    return shown if len(every) <= limit else f"{shown} and {len(every) - limit} more"


def _num_layers(names: Iterable[str]) -> int:
    # Layers are counted, not read off the largest index: a file could name a block 10**12.
    return len({name.split(".")[1] for name in names if name.startswith("blocks.")})


def _check_names(shapes: Mapping[str, Shape], version: float) -> None:
    """ValueError unless these are the names of a whole model, whatever its sizes."""
    layers = max(1, _num_layers(shapes))
    anything = ModelConfig(version=version, vocab_size=1, width=1, num_layers=layers)
    _check_whole(anything, shapes)


def _check_num_layers(config: ModelConfig, shapes: Mapping[str, Shape]) -> None:
    if (found := _num_layers(shapes)) != config.num_layers:
        raise ValueError(f"the tensors have {found} layers and their config {config.num_layers}")


def _check_whole(config: ModelConfig, shapes: Mapping[str, Shape]) -> None:
    wanted, found = tensor_shapes(config), []
    may_lack = config.architecture.unused(config)
    if missing := [name for name in wanted if name not in shapes and name not in may_lack]:
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
        # Some converters squeeze the vectors of shape (1,1,C) to (C); the values are the same.
        squeezed = shape[2:] if shape[:2] == (1, 1) and len(shape) == 3 else shape
        if shapes.get(name, shape) not in (shape, squeezed):
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


def _version(shapes: Mapping[str, Shape]) -> float:
    """The number of the version; ValueError says what these tensors are if it is none of ours."""
    _refuse_adapters(shapes)
    marked = marked_version(shapes)
    version = _built(marked)
    if version is None:
        raise ValueError(f"this is an {marked} file; this release reads {_readable()}")
    if marked is None:
        _refuse_variants(shapes)
    _refuse_prefixes(shapes)
    if not any(name.startswith("blocks.") and ".att." in name for name in shapes):
        raise ValueError(
            f"this is no RWKV model: there are {len(shapes)} tensors, named {some(shapes)}; "
            "RWKV-4 has tensors such as 'blocks.0.att.time_decay'"
        )
    return version


def _built(marked: str | None) -> float | None:
    """The number of the version of this name; None if this release does not have it."""
    if marked is None:
        return _UNMARKED
    return next((number for number in VERSIONS if marked == f"RWKV-{number}"), None)


def _readable() -> str:
    *others, last = VERSIONS
    return f"RWKV-{', '.join(map(str, others))} and {last}"


def _refuse_adapters(names: Iterable[str]) -> None:
    if found := [name for name in names if re.search(r"lora_[AB]\b", name)]:
        raise ValueError(
            f"this is a LoRA adapter or has one inside ({some(found)}); "
            "merge it into its base model and use the result"
        )


# The last parts of names that only one version or variant has; the first that fits decides.
_MARKS: dict[str, Callable[[str, Shape], bool]] = {
    "RWKV-8": lambda name, shape: name.endswith(".ffn.enn.weight"),
    "RWKV-7b (with attention)": lambda name, shape: ".qkv." in name,
    "RWKV-7a (with deep embeddings)": lambda name, shape: ".ffn.s_emb" in name,
    "RWKV-7 of rwkv.cpp": lambda name, shape: name.endswith(".att.x_rwkvag"),
    "RWKV-7": lambda name, shape: name.endswith((".att.r_k", ".att.x_r", ".att.w0")),
    "RWKV-6 of flash-linear-attention": lambda name, shape: name.endswith(".att.x_bias"),
    "RWKV-6": lambda name, shape: ".att.time_maa_" in name or name.endswith(".att.time_decay_w1"),
    # Here the axes are heads and the channels in them; RWKV-5 has one decay for a whole head.
    "RWKV-5.2": lambda name, shape: (
        name.endswith(".att.time_decay") and len(shape) > 1 and shape[-1] > 1
    ),
    "RWKV-5.1": lambda name, shape: name.endswith(".att.gate.weight"),
    "RWKV-5.0": lambda name, shape: name.endswith((".att.ln_x.weight", ".att.time_faaaa")),
    "RWKV-3": lambda name, shape: name.endswith(".att.time_decay") and len(shape) > 1,
    "RWKV-2": lambda name, shape: name.endswith(".att.time_mix"),
}


def marked_version(shapes: Mapping[str, Shape]) -> str | None:
    """The version that tensors of these official names and shapes are of; None marks RWKV-4."""
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
