"""Files with a model's logits for a few fixed tokens, which other machines compare with theirs.

The file is named PATH.logits and lies beside the model. It is a safetensors file with:

    tokens     [T] int64
    positions  [P] int64        the positions whose logits are kept
    logits     [P,V] float32    the logits, computed in float32
    metadata   about = JSON: format, format_version, model (its fingerprint), stored (the type of
               the weights)

The file never lies in a model's directory, because a manifest must list every file in there.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from receptance.atomic import written
from receptance.errors import one_line
from receptance.formats.files import reason
from receptance.storage.directories import is_included

FORMAT = "receptance-logits"
FORMAT_VERSION = "1"

_DTYPES = {"tokens": torch.int64, "positions": torch.int64, "logits": torch.float32}


@dataclass(frozen=True)
class Recorded:
    """The content of a file of logits."""

    tokens: Tensor
    """[T] int64."""
    positions: Tensor
    """[P] int64."""
    logits: Tensor
    """[P,V] float32."""
    model: str
    """The fingerprint of the model."""
    stored: str
    """The type that its weights had."""


def beside(path: Path) -> Path:
    """The path of the file with the logits of the model at a path.

    For a model that comes with the package it is in the current folder.
    """
    if is_included(path):
        return Path(f"{path.name}.logits")
    named = path if path.name not in ("", "..") else Path(os.path.abspath(path))
    return named.with_name(named.name + ".logits")


def write(file: Path, tokens: Tensor, logits: Tensor, *, model: str, stored: str) -> None:
    """Write some of the logits [T,V] of tokens [T] to a file; ValueError if it exists already."""
    from safetensors.torch import save

    if file.exists():
        raise ValueError(f"{file} exists; verify against it, or remove it to record again")
    last = len(tokens) - 1
    positions = torch.tensor(sorted({0, min(1, last), last // 2, last}))
    about = {"format": FORMAT, "format_version": FORMAT_VERSION, "model": model, "stored": stored}
    tensors = {"tokens": tokens, "positions": positions, "logits": logits[positions].float()}
    # The metadata is one entry, because safetensors writes several in any order, and equal records
    # are to be equal files.
    content = save(tensors, metadata={"about": json.dumps(about)})
    with one_line(file), written(file) as stream:
        stream.write(content)


def read(file: Path) -> Recorded:
    """Read a file that `write` wrote; ValueError if it is damaged or another kind of file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as stream:
            about = json.loads((stream.metadata() or {}).get("about", "{}"))
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, RecursionError) as error:
        raise ValueError(f"{file} is not a readable file of logits: {reason(error)}") from None
    if not _is_ours(about) or not _fit(tensors):
        raise ValueError(f"{file} holds no logits of format {FORMAT_VERSION}; record them again")
    return Recorded(**tensors, model=str(about.get("model")), stored=str(about.get("stored")))


def _is_ours(about: Any) -> bool:
    return (
        isinstance(about, dict)
        and about.get("format") == FORMAT
        and about.get("format_version") == FORMAT_VERSION
    )


def _fit(tensors: dict[str, Tensor]) -> bool:
    if {name: x.dtype for name, x in tensors.items()} != _DTYPES:
        return False
    tokens, positions, logits = (tensors[name] for name in _DTYPES)
    if (tokens.dim(), positions.dim(), logits.dim()) != (1, 1, 2) or not positions.numel():
        return False
    inside = positions.min() >= 0 and positions.max() < len(tokens)
    return len(positions) == len(logits) and bool(inside)
