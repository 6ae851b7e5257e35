"""What lies at a path: looked at once, proved once."""

from __future__ import annotations

import json
import reprlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from receptance.storage.directories import existing, is_step, newest_checkpoint, step_directories
from receptance.storage.manifest import MANIFEST, verify

CHECKPOINT_FORMAT = "receptance"
QUANTIZED_FORMAT = "receptance-quantised"
FORMAT_VERSION = 1
ADAPTER_FILE = "adapter.safetensors"
"""A directory with this file holds an adapter and no model."""

Kind = Literal["checkpoint", "quantized", "adapter", "other"]


@dataclass(frozen=True)
class Opened:
    """A file or directory of weights."""

    path: Path
    """Where it is; of the folder of a training run its newest whole checkpoint."""
    kind: Kind
    """other: anything that this package did not write, or nothing at all."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The config.json of a directory that this package wrote."""
    sealed: bool = False
    """Whether a manifest vouches for the directory, or should."""
    verified: bool = False
    """Whether the directory was compared with its manifest."""

    def check_version(self) -> None:
        """ValueError if another release wrote it in a way that this one does not read."""
        if (version := self.fields.get("format_version")) != FORMAT_VERSION:
            raise ValueError(
                f"{self.path / 'config.json'} has format version {reprlib.repr(version)}; this "
                f"release reads {FORMAT_VERSION}, so update receptance"
            )


def open_path(source: str | Path, *, optimizer: bool = False) -> Opened:
    """What is at a path, after a sealed directory was compared with its manifest.

    Of a training run's folder it is the newest whole checkpoint; a warning says why newer ones
    were passed over. optimizer: whether its state is compared as well, which has twice the size of
    the model. ValueError names the file that is not as it was written.
    """
    path = existing(source)
    if is_run(path):
        newest, skipped = newest_checkpoint(path, optimizer=optimizer)
        for reason in skipped:
            warnings.warn(f"passed over a damaged checkpoint: {reason}", stacklevel=2)
        return look(newest, verified=True)
    found = look(path)
    if not found.sealed:
        return found
    verify(path, optimizer=optimizer)
    return look(path, verified=True)


def is_run(path: Path) -> bool:
    """Whether this is the folder of a training run: checkpoints and no model of its own."""
    return path.is_dir() and not (path / "config.json").exists() and bool(step_directories(path))


def look(path: Path, *, verified: bool = False) -> Opened:
    """What a path holds by its names and its config.json, in whatever condition the rest is."""
    if not path.is_dir():
        return Opened(path, "other")
    # A manifest comes first: a damaged config.json must not make it look like another format.
    sealed = (path / MANIFEST).is_file() or is_step(path)
    fields = _fields(path / "config.json", quiet=sealed and not verified)
    written = fields.get("format")
    kind: Kind = "other"
    if (path / ADAPTER_FILE).is_file():
        kind = "adapter"
    elif written == CHECKPOINT_FORMAT:
        kind = "checkpoint"
    elif written == QUANTIZED_FORMAT:
        kind = "quantized"
    return Opened(path, kind, fields, sealed or kind in ("checkpoint", "quantized"), verified)


def _fields(file: Path, *, quiet: bool) -> dict[str, Any]:
    """What config.json says; quiet: nothing if it is damaged, for a manifest will say that."""
    if not file.is_file():
        return {}
    try:
        fields = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if quiet:
            return {}
        raise ValueError(f"{file} is damaged: {error}") from None
    return fields if isinstance(fields, dict) else {}
