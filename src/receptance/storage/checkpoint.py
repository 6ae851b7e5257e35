"""Models and their tokenizers on disk, and `load`, which opens every format that has a reader.

directories.py and manifest.py tell how a directory is written so that it loses nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from receptance import formats
from receptance.config import ModelConfig
from receptance.formats import hf
from receptance.formats.names import conform
from receptance.model import Model
from receptance.model.devices import resolve_device
from receptance.sealed import read_manifest
from receptance.storage.directories import ABOUT, expanded, write_directory
from receptance.storage.manifest import OPTIMIZER
from receptance.storage.opening import CHECKPOINT_FORMAT, FORMAT_VERSION, Opened, open_path
from receptance.storage.pairing import (
    check_tokenizer,
    chosen_tokenizer,
    found_tokenizer,
    stored_with,
    tokenizer_in,
)
from receptance.storage.quantized import dequantized_tensors, open_quantized
from receptance.tokenizer import Tokenizer, load_tokenizer


def save(model: Model, directory: str | Path, tokenizer: Tokenizer | None) -> None:
    """Write a model and its tokenizer, if it has one, as a directory that `load` opens.

    What an earlier call wrote there is replaced. ValueError if there is anything else, such as
    integer weights or the state of a training run.
    """
    _check_only_model(expanded(directory))
    write_directory(directory, lambda partial: write_model(model, partial, tokenizer))


def _check_only_model(directory: Path) -> None:
    """ValueError if there is a checkpoint that holds more than a model's tensors, or others."""
    try:
        names = set(read_manifest(directory))
    except (OSError, ValueError):
        return  # write_directory tells what may be replaced
    training = {name for name in names if name == ABOUT or name.startswith(OPTIMIZER)}
    if training or not any(name.startswith("model") for name in names):
        what = "the state of a training run" if training else "no model of this kind"
        raise ValueError(
            f"cannot write {directory}: there is a checkpoint with {what}, which would be lost; "
            "choose another name"
        )


def write_model(model: Model, directory: Path, tokenizer: Tokenizer | None) -> None:
    """Put a model's files into a directory that is being written (see write_directory)."""
    write_description(model.config, directory, tokenizer)
    write_tensors(model.state_dict(), directory, "model")


def write_description(config: ModelConfig, directory: Path, tokenizer: Tokenizer | None) -> None:
    """Put everything about a model but its tensors into a directory that is being written."""
    about = {
        "format": CHECKPOINT_FORMAT,
        "format_version": FORMAT_VERSION,
        "model": config.to_dict(),
        "tokenizer": stored_with(config, directory, tokenizer),
    }
    (directory / "config.json").write_text(json.dumps(about, indent=1))


def read_description(opened: Opened) -> tuple[ModelConfig, Tokenizer | None]:
    """Read what `write_description` wrote; ValueError if the directory holds no model."""
    if opened.kind != "checkpoint":
        raise ValueError(f"{opened.path} is no checkpoint that receptance wrote; name one that is")
    opened.check_version()
    config = ModelConfig.from_dict(opened.fields.get("model"))
    return config, tokenizer_in(opened.path, opened.fields.get("tokenizer"))


def write_tensors(
    tensors: Mapping[str, Tensor],
    directory: Path,
    stem: str,
    *,
    shard: int = 0,
    shards: int = 1,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Write tensors as STEM.safetensors, or as one of its shards, and return the file's name.

    Shards are counted from 0; the caller calls `write_index` after the last of them. The metadata
    goes into the file's header.
    """
    from safetensors.torch import save_file

    part = f"-{shard + 1:05d}-of-{shards:05d}" if shards > 1 else ""
    name = f"{stem}{part}.safetensors"
    ours = {n: x.detach().cpu().contiguous() for n, x in tensors.items()}
    save_file(ours, directory / name, metadata=dict(metadata or {"format": "pt"}))
    return name


def write_index(directory: Path, stem: str, shards: Iterable[str]) -> str:
    """Write an index of which shard holds which tensor, as transformers does; return its name."""
    held = {shard: formats.read_safetensors(directory / shard) for shard in sorted(shards)}
    size = sum(x.nbytes for part in held.values() for x in part.values())
    files = {name: shard for shard, tensors in held.items() for name in tensors}
    return hf.write_index(directory, stem, files, size)


def read_tensors(directory: Path, stem: str) -> dict[str, Tensor]:
    """Map the tensors of STEM.safetensors, or of its shards, without copying them.

    The caller must have verified the directory. ValueError if there is no such file.
    """
    index = directory / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return formats.read_safetensors(directory / f"{stem}.safetensors")
    return hf.read_shards(index, formats.read_safetensors)


def load(
    source: str | Path,
    *,
    tokenizer: str | Path | Tokenizer | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> tuple[Model, Tokenizer | None]:
    """Load a model, ready to run, and its tokenizer from a path or a hub id.

    The path is a directory that this package wrote, the folder of a training run (its newest whole
    checkpoint is read; a warning says why newer ones were passed over), an official .pth or a
    Hugging Face directory; a hub id looks like "hf:RWKV/rwkv-4-169m-pile".
    tokenizer (a file, a directory, "bytes" or an object) overrides the one found beside the
    weights, but a directory that this package wrote accepts only its own. The tokenizer returned
    is None if there is none. dtype None keeps the type in the file, except that float16, in which
    RWKV-4 overflows, becomes float32. device "auto" is a GPU where there is one.
    ValueError says in one line what is wrong.
    """
    device = resolve_device(device)
    config, tensors, found = read_model(source, tokenizer=tokenizer, revision=revision)
    return as_model(config, tensors, device, dtype), found


def as_model(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Model:
    """Make a model of tensors as they were stored; dtype means what it means for `load`."""
    if dtype is None and tensors["emb.weight"].dtype == torch.float16:
        dtype = torch.float32
    return Model.from_tensors(config, tensors, device=device, dtype=dtype)


def read_model(
    source: str | Path,
    *,
    tokenizer: str | Path | Tokenizer | None = None,
    revision: str | None = None,
) -> tuple[ModelConfig, dict[str, Tensor], Tokenizer | None]:
    """Read a model's sizes, its tensors as they are stored and its tokenizer (see `load`).

    Tensors stay mapped where the format permits. Quantized weights are dequantized to float32.
    """
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    return read_opened(open_path(source), source, tokenizer, revision)


def read_opened(
    opened: Opened, source: str | Path, tokenizer: Tokenizer | None, revision: str | None = None
) -> tuple[ModelConfig, dict[str, Tensor], Tokenizer | None]:
    """Do what `read_model` does, for what `open_path` found at the source."""
    path = opened.path
    if opened.sealed:
        formats.check_local(path, revision)
    if opened.kind == "adapter":
        raise ValueError(
            f"{path} holds an adapter and no model; name the model that it was trained on, and "
            "this directory as its adapter"
        )
    if opened.kind == "sequences":
        raise ValueError(
            f"{path} holds a classifier, regressor or forecaster, and no language model; load it "
            "with receptance.storage.sequences.load_sequence_model"
        )
    if opened.kind == "quantized":
        quantized = open_quantized(opened)
        found = chosen_tokenizer(path, quantized.config, quantized.tokenizer, tokenizer)
        return quantized.config, dequantized_tensors(quantized), found
    if opened.kind == "checkpoint":
        config, own = read_description(opened)
        tensors = _belonging(path, config, read_tensors(path, "model"))
        found = chosen_tokenizer(path, config, own, tokenizer)
    else:
        weights = formats.read(path if path.exists() else source, revision=revision)
        config, tensors = weights.config, dict(weights.tensors)
        found = tokenizer or found_tokenizer(weights.tokenizer, config)
    if found is not None:
        check_tokenizer(found, config)
    return config, tensors, found


def _belonging(path: Path, config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors; ValueError, before a model is made, unless they have these sizes."""
    try:
        return conform(tensors, path, config)[1]
    except ValueError as error:
        raise ValueError(
            f"{error}; config.json and the tensors beside it do not belong together"
        ) from None
