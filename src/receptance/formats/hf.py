"""A directory that transformers' RwkvForCausalLM was saved to."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from receptance.config import WORLD_VOCAB_SIZE, ModelConfig
from receptance.formats.files import reason
from receptance.formats.names import conform, some, to_official
from receptance.formats.pth import read_pth
from receptance.formats.safetensors import read_safetensors

Reader = Callable[[Path], dict[str, Tensor]]

# In the order in which transformers looks for them; the second of each pair names shards.
_FILES: tuple[tuple[str, Reader], ...] = (
    ("model.safetensors", read_safetensors),
    ("model.safetensors.index.json", read_safetensors),
    ("pytorch_model.bin", read_pth),
    ("pytorch_model.bin.index.json", read_pth),
)

# Fields of config.json that the tensors decide too.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "num_layers",
    "intermediate_size": "ffn_width",
}


@dataclass(frozen=True)
class HFWeights:
    """What a transformers directory holds, in this package's terms."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    """By official name, in official shapes."""
    tokenizer: Path | None
    """The tokenizer's file beside the weights, if there is one."""


def read_hf(directory: str | Path) -> HFWeights:
    """The RWKV-4 model in a transformers directory: safetensors or .bin, whole or in shards.

    transformers divides the output matrices by powers of two during its first evaluation; weights
    saved after that can't be told from others, and are read as they are.
    ValueError, starting with the path, when something is missing, damaged, inconsistent or not
    RWKV-4.
    """
    directory = Path(directory)
    fields = read_config(directory)
    return complete(directory, fields, _read_tensors(directory))


def read_config(directory: Path) -> dict[str, Any]:
    """The fields of config.json; ValueError unless it describes an RWKV-4 model."""
    path = directory / "config.json"
    fields = _read_json(path)
    model_type = fields.get("model_type")
    if model_type != "rwkv":
        raise ValueError(
            f"{path}: the model_type is {model_type!r}; "
            "this release reads RWKV-4, whose model_type is 'rwkv'"
        )
    width, attention = fields.get("hidden_size"), fields.get("attention_hidden_size")
    if attention not in (None, width):
        raise ValueError(
            f"{path}: attention_hidden_size is {attention!r} and hidden_size {width!r}; "
            "this release reads models where they are equal, as in every published RWKV-4"
        )
    return fields


def complete(directory: Path, fields: dict[str, Any], tensors: dict[str, Tensor]) -> HFWeights:
    """The tensors checked against the fields of their config.json; tied heads filled in."""
    if fields.get("tie_word_embeddings"):
        tensors = _with_head(tensors)
    config, official = conform(tensors, directory)
    path = directory / "config.json"
    for theirs, ours in _SIZES.items():
        if fields.get(theirs) not in (None, getattr(config, ours)):
            raise ValueError(
                f"{path}: {theirs} is {fields[theirs]!r}, but the tensors beside it have "
                f"{getattr(config, ours)}; the two files do not belong together"
            )
    config = _with_epsilon(config, fields.get("layer_norm_epsilon"), path)
    return HFWeights(config, official, find_tokenizer(directory, config.vocab_size))


def find_tokenizer(directory: Path, vocab_size: int) -> Path | None:
    """The tokenizer file in a directory; of several, the one that goes with the vocabulary."""
    bpe = [directory / name for name in ("tokenizer.json", "20B_tokenizer.json")]
    world = sorted(directory.glob("rwkv_vocab*.txt"))
    candidates = world + bpe if vocab_size == WORLD_VOCAB_SIZE else bpe + world
    return next((path for path in candidates if path.is_file()), None)


def _with_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    official = to_official(tensors)
    if "emb.weight" in official:
        official.setdefault("head.weight", official["emb.weight"])
    return official


def _with_epsilon(config: ModelConfig, epsilon: object, path: Path) -> ModelConfig:
    if epsilon is None:
        return config
    if not isinstance(epsilon, float):
        raise ValueError(
            f"{path}: layer_norm_epsilon is {epsilon!r}; it must be a number like 1e-5"
        )
    try:
        return dataclasses.replace(config, layer_norm_epsilon=epsilon)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    for name, reader in _FILES:
        path = directory / name
        if path.is_file():
            return read_shards(path, reader) if path.suffix == ".json" else reader(path)
    wanted = ", ".join(name for name, _ in _FILES)
    raise ValueError(
        f"{directory}: there are no weights beside config.json; wanted one of {wanted}"
    )


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
        # The index comes with the weights: it must not reach for files elsewhere.
        if not isinstance(file, str) or file in ("", "..") or Path(file).name != file:
            raise ValueError(
                f"{index}: it names the file {file!r}; shards must lie in the same directory"
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
