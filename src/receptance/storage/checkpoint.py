"""Models and their tokenizers on disk, and `load`, which opens every format there is a reader for.

How a directory becomes one that loses nothing is told in directories.py and manifest.py.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from receptance import formats
from receptance.config import ModelConfig
from receptance.formats import hf
from receptance.formats.names import conform
from receptance.model import Model
from receptance.storage.directories import current, existing, is_step, write_directory
from receptance.storage.manifest import MANIFEST, verify
from receptance.storage.pairing import (
    check_same,
    check_tokenizer,
    found_tokenizer,
    no_tokenizer,
)
from receptance.storage.quantized import dequantized_tensors, is_quantized, open_quantized
from receptance.tokenizer import Tokenizer, load_tokenizer, stored_tokenizer

FORMAT = "receptance"
FORMAT_VERSION = 1


def save(model: Model, directory: str | Path, tokenizer: Tokenizer) -> None:
    """Write a model and its tokenizer as a directory that `load` opens."""
    write_directory(directory, lambda partial: write_model(model, partial, tokenizer))


def write_model(model: Model, directory: Path, tokenizer: Tokenizer) -> None:
    """Put a model's files into a directory that is being written (see write_directory)."""
    write_description(model.config, directory, tokenizer)
    write_tensors(model.state_dict(), directory, "model")


def write_description(config: ModelConfig, directory: Path, tokenizer: Tokenizer) -> None:
    """Put everything about a model but its tensors into a directory that is being written."""
    check_tokenizer(tokenizer, config)
    about = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": config.to_dict(),
        "tokenizer": {
            "kind": tokenizer.kind,
            "files": tokenizer.save(directory),
            "fingerprint": tokenizer.fingerprint,
        },
    }
    (directory / "config.json").write_text(json.dumps(about, indent=1))


def read_description(directory: Path) -> tuple[ModelConfig, Tokenizer]:
    """What `write_description` wrote. Whoever calls this has verified the directory."""
    config = _own_config(directory)
    if config is None:
        raise ValueError(f"{directory} holds no model of ours")
    return ModelConfig.from_dict(config.get("model")), _own_tokenizer(
        directory, config.get("tokenizer"), None
    )


def write_tensors(
    tensors: Mapping[str, Tensor],
    directory: Path,
    stem: str,
    *,
    shard: int = 0,
    shards: int = 1,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Write tensors as STEM.safetensors, or as one of several shards of it; the file's name.

    Shards are counted from 0; after all of them somebody calls `write_index`. Metadata goes into
    the file's header.
    """
    from safetensors.torch import save_file

    part = f"-{shard + 1:05d}-of-{shards:05d}" if shards > 1 else ""
    name = f"{stem}{part}.safetensors"
    ours = {n: x.detach().cpu().contiguous() for n, x in tensors.items()}
    save_file(ours, directory / name, metadata=dict(metadata or {"format": "pt"}))
    return name


def write_index(directory: Path, stem: str, shards: Iterable[str]) -> str:
    """Write which shard holds which tensor, as transformers does; the file's name."""
    held = {shard: formats.read_safetensors(directory / shard) for shard in sorted(shards)}
    size = sum(x.nbytes for part in held.values() for x in part.values())
    files = {name: shard for shard, tensors in held.items() for name in tensors}
    return hf.write_index(directory, stem, files, size)


def read_tensors(directory: Path, stem: str) -> dict[str, Tensor]:
    """The tensors of STEM.safetensors or of its shards; they stay mapped, nothing is copied.

    Whoever calls this has verified the directory. ValueError if they are not there.
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
) -> tuple[Model, Tokenizer]:
    """A model, ready to run, and its tokenizer, from a path or a hub id.

    Reads a directory of ours or the run folder of a training (its newest whole checkpoint; a
    warning says why newer ones were passed over), an official .pth, a Hugging Face directory, or
    an id such as "RWKV/rwkv-4-169m-pile".
    tokenizer (a file, a directory, "bytes" or an object) overrides the one found beside the
    weights; a directory of ours accepts no other than its own. dtype None keeps that of the
    file, but widens float16, in which RWKV-4 overflows, to float32.
    ValueError says in one line what is wrong.
    """
    check_device(device)
    sizes, tensors, found = read_model(source, tokenizer=tokenizer, revision=revision)
    if dtype is None and tensors["emb.weight"].dtype == torch.float16:
        dtype = torch.float32
    return Model.from_tensors(sizes, tensors, device=device, dtype=dtype), found


def read_model(
    source: str | Path,
    *,
    tokenizer: str | Path | Tokenizer | None = None,
    revision: str | None = None,
) -> tuple[ModelConfig, dict[str, Tensor], Tokenizer]:
    """Sizes, tensors as they are stored (mapped where that can be) and tokenizer, as for `load`.

    What `receptance quantize` wrote comes as float32.
    """
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    found = existing(source)
    path = current(found)
    if is_ours(path):
        formats.check_local(path, revision)
        if path == found:  # that of a run has been verified
            verify(path)
    if (path / "adapter.safetensors").is_file():
        raise ValueError(
            f"{path} holds an adapter; name the model that it was trained on, and this one with "
            "--adapter"
        )
    if is_quantized(path):
        quantized = open_quantized(path)
        tensors = dequantized_tensors(quantized)
        return quantized.config, tensors, check_same(path, quantized.tokenizer, tokenizer)
    if (config := _own_config(path)) is not None:
        sizes = ModelConfig.from_dict(config.get("model"))
        tensors = _belonging(path, sizes, read_tensors(path, "model"))
        tokenizer = _own_tokenizer(path, config.get("tokenizer"), tokenizer)
    else:
        weights = formats.read(path if path.exists() else str(source), revision=revision)
        sizes, tensors = weights.config, dict(weights.tensors)
        tokenizer = tokenizer or found_tokenizer(weights.tokenizer, sizes)
        if tokenizer is None:
            raise no_tokenizer(sizes, source)
    check_tokenizer(tokenizer, sizes)
    return sizes, tensors, tokenizer


def is_ours(path: Path) -> bool:
    """Whether this is a directory that we wrote, in whatever condition."""
    # First: a damaged config must not make it look like another format.
    known = (path / MANIFEST).is_file() or is_step(path) or is_quantized(path)
    return path.is_dir() and (known or _own_config(path) is not None)


def _belonging(path: Path, sizes: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors; ValueError unless they have these sizes, before a model is made that has."""
    found, official = conform(tensors, path)
    if replace(found, layer_norm_epsilon=sizes.layer_norm_epsilon) != sizes:
        raise ValueError(f"{path}: config.json and the tensors beside it do not belong together")
    return official


def _own_config(directory: Path) -> dict[str, Any] | None:
    """The config.json of a directory that we wrote, else None."""
    file = directory / "config.json"
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        return None
    if (version := config.get("format_version")) != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format version {reprlib.repr(version)}; this release reads "
            f"{FORMAT_VERSION}, so update receptance"
        )
    return config


def _own_tokenizer(directory: Path, about: Any, given: Tokenizer | None) -> Tokenizer:
    return check_same(directory, stored_tokenizer(directory, about), given)


def check_device(device: torch.device | str) -> None:
    """ValueError if nothing can be computed there."""
    try:
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(device)!r} cannot be used here: {reason}") from None
