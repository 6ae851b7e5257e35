"""What a path holds: weights of any RWKV, a checkpoint, an adapter or a state, and its format.

Unlike `load`, this also opens models that no engine runs, if it can tell what they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from receptance import state
from receptance.adapters import base as adapters
from receptance.config import ModelConfig
from receptance.formats import hf, hub, read_pth, read_safetensors
from receptance.formats.files import check_file, reason
from receptance.formats.ggmf import is_ggmf, open_ggmf
from receptance.formats.names import conform, marked_version
from receptance.formats.names_hf import to_official
from receptance.storage import quantized
from receptance.storage.checkpoint import read_tensors
from receptance.storage.directories import existing, step_directories
from receptance.storage.opening import ADAPTER_FILE, Opened, is_run, look, open_path

_TRAINING = "training.json"
_PICKLES = (b"PK\x03\x04", b"\x80")
_WEIGHTS = ("*.pth", "*.pt", "*.bin", "*.safetensors", "*.st")


@dataclass(frozen=True)
class Contents:
    """The contents of a path. Where the format allows it, tensors are read when they are used."""

    path: Path
    """The file or directory; for a run folder, its newest whole checkpoint."""
    kind: str
    """The kind of contents, such as "weights", "checkpoint" or "adapter"."""
    format: str
    files: tuple[Path, ...]
    """The files that hold the tensors."""
    tensors: Mapping[str, Tensor]
    """The tensors under the names that the file gives them."""
    config: ModelConfig | None = None
    """The configuration; None unless this is a whole model that can be run."""
    version: str | None = None
    """The version of RWKV, such as "RWKV-4" or "RWKV-6"; None if it is not known."""
    problem: str | None = None
    """The reason why no engine runs this; None if there is none."""
    stored: str | None = None
    """The type of the weights in the file; None if it is that of the tensors."""
    tokenizer: str | None = None
    """The kind of the tokenizer in the directory; None if the directory does not say it."""
    about: str | None = None
    """Further information for the reader, such as the step of a checkpoint."""
    named: Path = Path()
    """The path that was asked for: `path`, or the run folder in which it lies."""
    verified: bool = False
    """Whether the directory was compared with its manifest."""


def find(source: str | Path) -> Contents:
    """The contents of a path or a hub id. ValueError when they are of no known kind."""
    try:
        path = existing(source)
        if hub.means_hub(source):
            path = hub.resolve(str(source))
        if is_run(path):
            newest = open_path(path, optimizer=True)
            about = f"the newest whole one of {len(step_directories(path))} in {path}"
            return replace(_in_directory(newest), about=about, named=path, verified=True)
        found = _in_directory(look(path)) if path.is_dir() else _in_file(path)
        return replace(found, named=path)
    except OSError as error:
        raise ValueError(f"{source}: cannot be read: {reason(error)}") from None


# ---- directories --------------------------------------------------------------------------------


def _in_directory(opened: Opened) -> Contents:
    path = opened.path
    if opened.kind == "checkpoint":
        return _checkpoint(opened)
    if opened.kind == "quantized":
        return _quantized(opened)
    if opened.kind == "adapter":
        return replace(_in_file(path / ADAPTER_FILE), path=path)
    if (path / "config.json").is_file():
        return _transformers(path)
    return _in_file(_only_file(path))


def _fields(file: Path) -> dict[str, Any]:
    """The fields of a JSON file; none if the file is missing, unreadable or no JSON object."""
    try:
        fields = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _checkpoint(opened: Opened) -> Contents:
    path, fields = opened.path, opened.fields
    tensors = read_tensors(path, "model")
    training = _fields(path / _TRAINING)
    return _weights(
        Contents(
            path,
            "training checkpoint" if training else "checkpoint",
            f"receptance directory, version {fields.get('format_version')}",
            tuple(sorted(path.glob("model*.safetensors"))),
            tensors,
            tokenizer=_kind(fields),
            about=f"step {training['step']}" if "step" in training else None,
        )
    )


def _kind(fields: Mapping[str, Any]) -> str | None:
    tokenizer = fields.get("tokenizer")
    return str(tokenizer.get("kind")) if isinstance(tokenizer, dict) else None


def _quantized(opened: Opened) -> Contents:
    path, fields = opened.path, opened.fields
    found = quantized.open_quantized(opened)
    about = found.about
    parts = {f"{name} (codes)": packed.data for name, packed in found.matrices.items()}
    scales = {
        f"{name} (scales)": packed.params
        for name, packed in found.matrices.items()
        if packed.params is not None
    }
    return Contents(
        path,
        "quantized weights",
        f"receptance quantized directory, version {fields.get('format_version')}",
        (path / quantized.WEIGHTS,),
        {**found.vectors, **parts, **scales},
        config=found.config,
        version=f"RWKV-{found.config.version}",
        stored=f"{about.kind} in groups of {about.group}, vectors float32",
        tokenizer=None if found.tokenizer is None else found.tokenizer.kind,
        about=f"made from model {about.source[:12]}",
    )


def _transformers(path: Path) -> Contents:
    weights = hf.weight_files(path)
    if not weights:
        raise ValueError(f"{path}: there are no weights beside config.json")
    tensors: dict[str, Tensor] = {}
    for file, names in weights.items():
        inside = _read(file)[1]
        tensors |= {n: inside[n] for n in (inside if names is None else names) if n in inside}
    found = _weights(Contents(path, "weights", "transformers directory", tuple(weights), tensors))
    try:
        config = hf.complete(path, hf.read_config(path), tensors).config
    except ValueError as error:
        return replace(found, config=None, problem=found.problem or str(error))
    return replace(found, config=config, version=f"RWKV-{config.version}", problem=None)


def _only_file(path: Path) -> Path:
    files = sorted(file for pattern in _WEIGHTS for file in path.glob(pattern))
    if len(files) != 1:
        shown = ", ".join(file.name for file in files[:5]) + ", ..." * (len(files) > 5)
        raise ValueError(f"{path}: name one of its files: {shown}" if files else _nothing(path))
    return files[0]


def _nothing(path: Path) -> str:
    return f"{path}: there is no model in this directory, nor a file of weights"


# ---- files --------------------------------------------------------------------------------------


def _in_file(path: Path) -> Contents:
    if not path.exists():
        raise ValueError(
            f"no such file or directory: {path}; models of the Hugging Face hub are written "
            "hf:owner/name"
        )
    if is_ggmf(path):
        return _rwkv_cpp(path)
    format_, tensors = _read(path)
    contents = Contents(path, "weights", format_, (path,), tensors)
    if format_ == "safetensors" and (own := _own(contents, _metadata(path))) is not None:
        return own
    return _weights(contents)


def _read(path: Path) -> tuple[str, Mapping[str, Tensor]]:
    """The format of a file, which its first bytes tell, and its tensors."""
    check_file(path)
    with path.open("rb") as file:
        start = file.read(9)
    # The brace is checked first: the length before it may begin with the first byte of a pickle.
    if start[8:] == b"{":
        return "safetensors", read_safetensors(path)
    if start.startswith(_PICKLES):
        return f"PyTorch {'zip' if start[:2] == b'PK' else 'legacy'} file", read_pth(path)
    raise ValueError(f"{path}: this is no file of weights that is known here")


def _rwkv_cpp(path: Path) -> Contents:
    file = open_ggmf(path)
    return Contents(
        path,
        "weights",
        f"rwkv.cpp file, version {file.version}",
        (path,),
        file,
        config=file.config,
        version=f"RWKV-{file.config.version}",
        stored=", ".join(sorted(file.kinds)),
    )


def _weights(contents: Contents) -> Contents:
    """The contents with the configuration and version that the names and shapes tell."""
    try:
        config, _ = conform(contents.tensors, contents.path)
    except ValueError as error:
        return replace(contents, problem=str(error), version=_version(contents.tensors))
    return replace(contents, config=config, version=f"RWKV-{config.version}")


def _version(tensors: Mapping[str, Tensor]) -> str | None:
    try:
        official = to_official(tensors)
    except ValueError:
        return None
    return marked_version({name: tuple(x.shape) for name, x in official.items()})


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _own(contents: Contents, metadata: dict[str, str]) -> Contents | None:
    """The contents as an adapter or a state, if the metadata says that it is one."""
    if metadata.get("format") == state.FORMAT:
        rows = contents.tensors["tokens"].numel() if "tokens" in contents.tensors else 0
        about = f"{rows} rows, of model {metadata.get('model', '')[:12]}"
        return replace(contents, kind="state", about=about)
    try:
        about = json.loads(metadata.get(adapters.ABOUT, "{}"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(about, dict) or about.get("format") != adapters.FORMAT:
        return None
    words = f"{about.get('kind')}, of model {str(about.get('model'))[:12]}"
    return replace(contents, kind="adapter", about=words)
