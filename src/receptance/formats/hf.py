"""Reading and writing directories of transformers: RwkvForCausalLM, and the models of RWKV-7.

The functions here take and return tensors under their official names.
"""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from receptance.config import ModelConfig
from receptance.formats.files import reason
from receptance.formats.names import conform, some
from receptance.formats.names_hf import is_transposed, shape_in_hf, to_hf, to_official
from receptance.formats.pth import read_pth
from receptance.formats.safetensors import read_safetensors, write_safetensors
from receptance.formats.writing import Schema
from receptance.tokenizer.files import find_tokenizer

Planned = tuple[torch.dtype, tuple[int, ...]]
"""The type and the shape of a tensor to write."""
Reader = Callable[[Path], dict[str, Tensor]]

# The files of weights, in the order in which transformers looks for them. The second of each pair
# is an index that names shards.
_FILES: tuple[tuple[str, Reader], ...] = (
    ("model.safetensors", read_safetensors),
    ("model.safetensors.index.json", read_safetensors),
    ("pytorch_model.bin", read_pth),
    ("pytorch_model.bin.index.json", read_pth),
)

# The number of blocks after which transformers halves weights, unless config.json says otherwise.
RESCALE_EVERY = 6

# The fields of config.json that the shapes of the tensors decide, too.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "num_layers",
    "intermediate_size": "ffn_width",
}
# The same for the extras of RWKV-7, under the names of flash-linear-attention.
_EXTRAS_7 = {
    "head_dim": "head_size",
    "decay_low_rank_dim": "decay_rank",
    "a_low_rank_dim": "rate_rank",
    "v_low_rank_dim": "value_rank",
    "gate_low_rank_dim": "gate_rank",
}
_VERSIONS = {"rwkv": 4, "rwkv7": 7}  # by model_type


@dataclass(frozen=True)
class HFWeights:
    """The content of a transformers directory under this package's names."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    """By official name, in official shapes."""
    tokenizer: Path | None
    """The tokenizer's file beside the weights, if there is one."""


def read_hf(directory: str | Path) -> HFWeights:
    """The model in a transformers directory: safetensors or .bin, whole or in shards.

    Weights that transformers saved after an evaluation are read as they are (see rescaling.py).
    ValueError, starting with the path, when something is missing, damaged, inconsistent or of
    another version.
    """
    directory = Path(directory)
    fields = read_config(directory)
    return complete(directory, fields, _read_tensors(directory))


def read_config(directory: Path) -> dict[str, Any]:
    """The fields of config.json; ValueError unless it describes a model that is read here."""
    path = directory / "config.json"
    fields = _read_json(path)
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in _VERSIONS:
        known = " and ".join(f"RWKV-{n}, whose model_type is {x!r}" for x, n in _VERSIONS.items())
        raise ValueError(
            f"{path}: the model_type is {reprlib.repr(model_type)}; this release reads {known}"
        )
    width, attention = fields.get("hidden_size"), fields.get("attention_hidden_size")
    if attention not in (None, width):
        raise ValueError(
            f"{path}: attention_hidden_size is {reprlib.repr(attention)} and hidden_size "
            f"{reprlib.repr(width)}; this release reads models where they are equal, as in every "
            "published one"
        )
    return fields


def complete(directory: Path, fields: dict[str, Any], tensors: dict[str, Tensor]) -> HFWeights:
    """The tensors, checked against their config.json; a tied head becomes a tensor of its own."""
    if fields.get("tie_word_embeddings"):
        tensors = _with_head(tensors)
    config, official = conform(tensors, directory)
    path = directory / "config.json"
    if (version := _VERSIONS[fields["model_type"]]) != config.version:
        raise ValueError(
            f"{path}: the model_type is that of RWKV-{version}, but the tensors beside it are of "
            f"RWKV-{config.version}; the two files do not belong together"
        )
    found = {theirs: getattr(config, ours) for theirs, ours in _SIZES.items()}
    for theirs, size in found.items():
        if fields.get(theirs) not in (None, size):
            raise ValueError(
                f"{path}: {theirs} is {reprlib.repr(fields[theirs])}, but the tensors beside it "
                f"have {size}; the two files do not belong together"
            )
    try:
        known = dataclasses.replace(config, **_told(config, fields))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if known.extras != config.extras:  # A rank that no tensor shows is that of unused ones.
        official = conform(tensors, directory, known)[1]
    return HFWeights(known, official, find_tokenizer(directory, config.vocab_size))


def _told(config: ModelConfig, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a ModelConfig that only config.json tells: epsilons, and a hidden rank."""
    told: dict[str, Any] = {}
    name = "norm_eps" if "norm_eps" in fields else "layer_norm_epsilon"
    if (epsilon := fields.get(name)) is not None:
        if not isinstance(epsilon, float):
            raise ValueError(f"{name} is {reprlib.repr(epsilon)}; it must be a number like 1e-5")
        told["layer_norm_epsilon"] = epsilon
    if config.version == 7:
        extras = dict(config.extras)
        if config.num_layers == 1 and isinstance(rank := fields.get("v_low_rank_dim"), int):
            extras["value_rank"] = rank
        if name == "norm_eps" and epsilon is not None:
            # The rule of the packages with this field. Official code has a constant instead.
            extras["group_norm_epsilon"] = told["layer_norm_epsilon"] * extras["head_size"]
        told["extras"] = extras
    return told


def _with_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with a copy of the embedding as the head, if there is no head among them.

    In this package the two are never one tensor: each is trained and written by itself.
    """
    official = to_official(tensors)
    if "emb.weight" in official and "head.weight" not in official:
        official["head.weight"] = official["emb.weight"].clone()
    return official


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    for name, reader in _FILES:
        path = directory / name
        if path.is_file():
            return read_shards(path, reader) if path.suffix == ".json" else reader(path)
    wanted = ", ".join(name for name, _ in _FILES)
    raise ValueError(
        f"{directory}: there are no weights beside config.json; wanted one of {wanted}"
    )


def weight_files(directory: Path) -> dict[Path, list[str] | None]:
    """The files of weights, with the names of the tensors to read from each (None: all).

    Files that an index names but that are missing are left out; without weights there are none.
    """
    path = next((directory / name for name, _ in _FILES if (directory / name).is_file()), None)
    if path is None or path.suffix != ".json":
        return {} if path is None else {path: None}
    names = defaultdict[Path, list[str]](list)
    for name, file in _weight_map(path).items():
        names[directory / file].append(name)
    return {shard: names[shard] for shard in sorted(names) if shard.is_file()}


def read_shards(index: Path, reader: Reader) -> dict[str, Tensor]:
    """The tensors of the files that an index names; ValueError if they do not agree with it."""
    files = _weight_map(index)
    shards = {file: reader(index.parent / file) for file in sorted(set(files.values()))}
    if absent := [name for name, file in files.items() if name not in shards[file]]:
        raise ValueError(f"{index}: tensors are not in the files it names for them: {some(absent)}")
    return {name: shards[file][name] for name, file in files.items()}


def _weight_map(index: Path) -> Mapping[str, str]:
    files = _read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{index}: there is no weight_map of tensor names to files in it")
    for file in files.values():
        # The index is as foreign as the weights and must not name files elsewhere.
        plain = isinstance(file, str) and file not in ("", "..") and Path(file).name == file
        if not plain or not file.isprintable() or len(file) > 255:
            raise ValueError(
                f"{index}: it names the file {reprlib.repr(file)}; "
                "shards must lie in the same directory"
            )
    return files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {reason(error)}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: it holds a JSON {type(fields).__name__}; wanted an object")
    return fields


# ---- writing ------------------------------------------------------------------------------------


def write_hf(
    directory: Path,
    config: ModelConfig,
    layout: Schema,
    tensors: Mapping[str, Tensor],
    shard_bytes: float,
) -> None:
    """Put config.json and the tensors into a directory, in files of about shard_bytes at most.

    Tensors are read one at a time, by their official names, which the layout has too.
    ValueError when one has values too large for its type.
    """
    unused = config.architecture.unused(config)
    layout = {name: planned for name, planned in layout.items() if name not in unused}
    fields = config_fields(config, layout["emb.weight"][0])
    (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    shards = _shards(layout, shard_bytes)
    files: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"model{part}.safetensors"
        pairs = ((to_hf(n, config.version), tensors[n]) for n in names)
        renamed = {to_hf(n, config.version): _planned(n, config, layout[n]) for n in names}
        turned = ((n, x.mT if is_transposed(n) else x) for n, x in pairs)
        shaped = ((n, x.reshape(renamed[n][1]).contiguous()) for n, x in turned)
        write_safetensors(directory / file, renamed, shaped)
        files |= dict.fromkeys(renamed, file)
    if len(shards) > 1:
        write_index(directory, "model", files, sum(map(_nbytes, layout.values())))


def check_hf(config: ModelConfig) -> None:
    """ValueError if config.json cannot say what this model computes."""
    usual = config.layer_norm_epsilon * config.extras.get("head_size", 1)
    epsilon = config.extras.get("group_norm_epsilon", usual)
    if not math.isclose(epsilon, usual, rel_tol=1e-9):
        raise ValueError(
            f"the group_norm_epsilon is {epsilon}, and the packages that read this format take "
            f"the size of a head times the epsilon of layer norms, {usual:.3g}; use another format"
        )


def config_fields(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The fields of config.json for a model whose matrices are of this type."""
    return {
        **{theirs: getattr(config, ours) for theirs, ours in _SIZES.items()},
        **(_fields_4(config, dtype) if config.version == 4 else _fields_7(config)),
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _fields_4(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "architectures": ["RwkvForCausalLM"],
        "model_type": "rwkv",
        "attention_hidden_size": config.width,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        # With any other value than 0, transformers divides weights when it evaluates the model, and
        # epsilon then acts on smaller numbers. In float16 models overflow without that.
        "rescale_every": RESCALE_EVERY if dtype == torch.float16 else 0,
    }


def _fields_7(config: ModelConfig) -> dict[str, Any]:
    """Those of flash-linear-attention, whose defaults are not those of published models."""
    return {
        "architectures": ["RWKV7ForCausalLM"],
        "model_type": "rwkv7",
        **{theirs: config.extras[ours] for theirs, ours in _EXTRAS_7.items()},
        "num_heads": config.width // int(config.extras["head_size"]),
        "hidden_ratio": config.ffn_width / config.width,
        "value_dim": [config.width] * config.num_layers,
        "hidden_act": "sqrelu",
        "norm_eps": config.layer_norm_epsilon,
        "norm_bias": True,
        "norm_first": True,
        "fuse_norm": False,  # The fused norm has another epsilon.
        "pad_token_id": 0,
    }


def _planned(name: str, config: ModelConfig, official: Planned) -> Planned:
    """The type and shape of a tensor in the file, by its official name, type and shape."""
    return official[0], shape_in_hf(name, official[1], config.version)


def tokenizer_fields(end_of_text: str) -> dict[str, Any]:
    """The fields of the tokenizer_config.json beside a tokenizer.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), end_of_text),
    }


def _shards(layout: Schema, shard_bytes: float) -> list[list[str]]:
    """The names in order, in lists of at most shard_bytes, but at least one tensor each."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, planned in layout.items():
        if shards[-1] and size + _nbytes(planned) > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _nbytes(planned)
    return shards


def _nbytes(planned: Planned) -> int:
    dtype, shape = planned
    return math.prod(shape) * dtype.itemsize


def write_index(directory: Path, stem: str, files: Mapping[str, str], size: int) -> str:
    """Write the index that says which file of STEM holds each tensor; returns its name."""
    index = {"metadata": {"total_size": size}, "weight_map": files}
    name = f"{stem}.safetensors.index.json"
    (directory / name).write_text(json.dumps(index, indent=2) + "\n")
    return name
