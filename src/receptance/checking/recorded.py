"""What a model said about a few fixed tokens, in a file that other machines can compare with.

A safetensors file beside the model, PATH.logits:

    tokens     [T] int64
    positions  [P] int64        those whose logits are kept
    logits     [P,V] float32    computed in float32
    metadata   about = JSON: format, format_version, model (its fingerprint), stored (the type of
               the weights)

It lies beside a directory and not in it: a manifest vouches for every file in there.
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

FORMAT = "receptance-logits"
FORMAT_VERSION = "1"

_DTYPES = {"tokens": torch.int64, "positions": torch.int64, "logits": torch.float32}


@dataclass(frozen=True)
class Recorded:
    """The content of such a file."""

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
    """Where the logits of the model at a path are looked for."""
    named = path if path.name not in ("", "..") else Path(os.path.abspath(path))
    return named.with_name(named.name + ".logits")


def write(file: Path, tokens: Tensor, logits: Tensor, *, model: str, stored: str) -> None:
    """Keep some of the logits [T,V] of tokens [T]; ValueError if the file is there already."""
    from safetensors.torch import save

    if file.exists():
        raise ValueError(f"{file} exists; verify against it, or remove it to record again")
    last = len(tokens) - 1
    positions = torch.tensor(sorted({0, min(1, last), last // 2, last}))
    about = {"format": FORMAT, "format_version": FORMAT_VERSION, "model": model, "stored": stored}
    tensors = {"tokens": tokens, "positions": positions, "logits": logits[positions].float()}
    # One word: safetensors writes several in any order, and equal records are to be equal files.
    content = save(tensors, metadata={"about": json.dumps(about)})
    with one_line(file), written(file) as stream:
        stream.write(content)


def read(file: Path) -> Recorded:
    """What `write` wrote; ValueError if it is damaged or something else."""
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
