"""Reading and writing directories of transformers: its own RWKV-4, and models of later versions.

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
from receptance.formats.hf_config import MODEL_TYPES, SIZES, config_fields, told
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
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        known = " and ".join(f"RWKV-{n}, whose model_type is {x!r}" for x, n in MODEL_TYPES.items())
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
    if (version := MODEL_TYPES[fields["model_type"]]) != config.version:
        raise ValueError(
            f"{path}: the model_type is that of RWKV-{version}, but the tensors beside it are of "
            f"RWKV-{config.version}; the two files do not belong together"
        )
    found = {theirs: getattr(config, ours) for theirs, ours in SIZES.items()}
    for theirs, size in found.items():
        if fields.get(theirs) not in (None, size):
            raise ValueError(
                f"{path}: {theirs} is {reprlib.repr(fields[theirs])}, but the tensors beside it "
                f"have {size}; the two files do not belong together"
            )
    try:
        known = dataclasses.replace(config, **told(config, fields))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if known.extras != config.extras:  # A rank that no tensor shows is that of unused ones.
        official = conform(tensors, directory, known)[1]
    return HFWeights(known, official, find_tokenizer(directory, config.vocab_size))


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
