"""Weights in the formats that others write, read into official names. One module per format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from receptance.config import ModelConfig
from receptance.formats import hf, hub
from receptance.formats.files import reason
from receptance.formats.ggmf import is_ggmf, open_ggmf, read_ggmf
from receptance.formats.gguf import is_gguf, open_gguf, read_gguf
from receptance.formats.names import conform, infer_config
from receptance.formats.names_hf import is_hf
from receptance.formats.pth import read_pth
from receptance.formats.safetensors import read_safetensors
from receptance.tokenizer import Tokenizer
from receptance.tokenizer.files import find_tokenizer

__all__ = [
    "Weights",
    "check_local",
    "infer_config",
    "read",
    "read_ggmf",
    "read_gguf",
    "read_pth",
    "read_safetensors",
]

_READERS = {
    ".pth": read_pth,
    ".pt": read_pth,
    ".bin": read_pth,
    ".safetensors": read_safetensors,
    ".st": read_safetensors,
}
_GGUF = ".gguf"
_SUFFIXES = ", ".join((*_READERS, _GGUF))


@dataclass(frozen=True)
class Weights:
    """The model in a file or directory, as it was read."""

    config: ModelConfig
    tensors: Mapping[str, Tensor]
    """The tensors by official name, in official shapes and the file's dtypes.

    They stay mapped to the file where that is possible. A tensor of a GGUF file or of one of
    rwkv.cpp is made anew each time that it is asked for.
    """
    tokenizer: Path | Callable[[], Tokenizer | None] | None
    """The tokenizer's file beside the weights, or a call that makes the one inside their file."""
    source: Path
    """The file or directory that the tensors came from."""


def read(source: str | Path, *, revision: str | None = None) -> Weights:
    """The weights in a file, a directory or a model of the Hugging Face hub.

    Files are .pth, .pt, .bin, .safetensors, .st, and those of llama.cpp (GGUF) and rwkv.cpp,
    whatever their suffix. Directories are those of transformers, and those with a single .pth,
    .safetensors, .st or .gguf file.
    A Path is never looked for on the hub, a str only if `hub.means_hub` says so; `revision` is for
    hub models alone. ValueError says what was found instead and what to do.
    """
    try:
        if hub.means_hub(source):
            return _read_path(hub.resolve(str(source), revision=revision), None)
        return _read_path(Path(source), revision)
    except OSError as error:
        raise ValueError(f"{source}: cannot be read: {reason(error)}") from None


def check_local(path: Path, revision: str | None) -> None:
    """ValueError if a revision was given for what is on this machine."""
    if revision is not None:
        raise ValueError(f"{path}: revision {revision!r} was given, but only hub models have them")


def _read_path(path: Path, revision: str | None) -> Weights:
    check_local(path, revision)
    return _read_directory(path) if path.is_dir() else _read_file(path)


def _read_directory(directory: Path) -> Weights:
    if (directory / "config.json").is_file():
        return _weights(hf.read_hf(directory), directory)
    suffixes = ".pth", ".safetensors", ".st", _GGUF
    files = sorted(path for path in directory.iterdir() if path.suffix in suffixes)
    if len(files) != 1:
        found = ", ".join(path.name for path in files[:3]) + ", ..." * (len(files) > 3)
        raise ValueError(
            f"{directory}: wanted a config.json or a single .pth, .safetensors, .st or .gguf "
            f"file in it; found {found or 'neither'}"
        )
    return _read_file(files[0])


def check_exists(path: Path) -> None:
    """ValueError if there is nothing at a path."""
    if not path.exists():
        raise ValueError(
            f"no such file or directory: {path}; models of the Hugging Face hub are written "
            "hf:owner/name"
        )


def check_kind(path: Path) -> None:
    """ValueError for a file that does not exist or, by its name and first bytes, has no weights."""
    check_exists(path)
    if path.is_dir() or path.suffix in (_GGUF, *_READERS) or is_ggmf(path) or is_gguf(path):
        return
    raise ValueError(f"{path}: weights are read from {_SUFFIXES} files, or from a directory")


def _read_file(path: Path) -> Weights:
    check_kind(path)
    # Files of rwkv.cpp are known by their first bytes: .bin, their usual suffix, is that of many
    # formats.
    if is_ggmf(path):
        file = open_ggmf(path)
        return Weights(file.config, file, find_tokenizer(path.parent, file.config.vocab_size), path)
    if is_gguf(path) or path.suffix == _GGUF:
        return _gguf(path)
    tensors = _READERS[path.suffix](path)
    if is_hf(tensors) and (path.parent / "config.json").is_file():
        fields = hf.read_config(path.parent)
        return _weights(hf.complete(path.parent, fields, tensors), path)
    config, official = conform(tensors, path)
    return Weights(config, official, find_tokenizer(path.parent, config.vocab_size), path)


def _gguf(path: Path) -> Weights:
    file = open_gguf(path)
    beside = find_tokenizer(path.parent, file.config.vocab_size)
    return Weights(file.config, file, file.tokenizer if file.has_tokenizer else beside, path)


def _weights(found: hf.HFWeights, source: Path) -> Weights:
    return Weights(found.config, found.tensors, found.tokenizer, source)
