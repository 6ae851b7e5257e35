"""`open_path`: what lies at a path, verified once before anybody reads it."""

from __future__ import annotations

import json
import reprlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from receptance.sealed import MANIFEST
from receptance.storage.directories import existing, is_step, newest_checkpoint, step_directories
from receptance.storage.manifest import verify

CHECKPOINT_FORMAT = "receptance"
QUANTIZED_FORMAT = "receptance-quantised"
SEQUENCE_FORMAT = "receptance-sequences"
FORMAT_VERSION = 1
ADAPTER_FILE = "adapter.safetensors"
"""The file that a directory with an adapter, and without a model, holds."""

Kind = Literal["checkpoint", "quantized", "sequences", "adapter", "other"]


@dataclass(frozen=True)
class Opened:
    """A file or directory of weights."""

    path: Path
    """The path; for the folder of a training run it is that of the newest whole checkpoint."""
    kind: Kind
    """What the path holds; "other" is anything that this package did not write, or nothing."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The content of config.json, in a directory that has one."""
    sealed: bool = False
    """Whether the directory has a manifest, or should have one."""
    verified: bool = False
    """Whether the directory was compared with its manifest and is equal."""

    def check_version(self) -> None:
        """ValueError if another release wrote a format that this one cannot read."""
        if (version := self.fields.get("format_version")) != FORMAT_VERSION:
            raise ValueError(
                f"{self.path / 'config.json'} has format version {reprlib.repr(version)}; this "
                f"release reads {FORMAT_VERSION}, so update receptance"
            )


def open_path(source: str | Path, *, optimizer: bool = False) -> Opened:
    """Tell what is at a path, and compare a sealed directory with its manifest.

    For the folder of a training run that is its newest whole checkpoint; a warning says why newer
    ones were passed over. `optimizer` tells whether the optimizer's state, twice as large as the
    model, is compared as well. ValueError names the file that is not as it was written.
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
    """Whether this is the folder of a training run, with checkpoints and without a config.json."""
    return path.is_dir() and not (path / "config.json").exists() and bool(step_directories(path))


def look(path: Path, *, verified: bool = False) -> Opened:
    """Tell what a path holds by its file names and its config.json, without reading the rest."""
    if not path.is_dir():
        return Opened(path, "other")
    # A damaged config.json must not make a sealed directory look like one of another format.
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
    elif written == SEQUENCE_FORMAT:
        kind = "sequences"
    known = kind in ("checkpoint", "quantized", "sequences")
    return Opened(path, kind, fields, sealed or known, verified)


def _fields(file: Path, *, quiet: bool) -> dict[str, Any]:
    """Read config.json; quiet returns nothing for a damaged one, which the manifest will tell."""
    if not file.is_file():
        return {}
    try:
        fields = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if quiet:
            return {}
        raise ValueError(f"{file} is damaged: {error}") from None
    return fields if isinstance(fields, dict) else {}
