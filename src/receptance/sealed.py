"""Sealed directories: a manifest lists every file in them, so nothing else may be written there.

The manifest holds the length and the sha256 of each file, and the digest of itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Entry:
    """The length and the digest of one file."""

    bytes: int
    sha256: str


Entries = dict[str, Entry]


def read_manifest(directory: Path) -> Entries:
    """Read the manifest; ValueError if it is missing, damaged or names files elsewhere."""
    manifest = directory / MANIFEST
    if not os.path.lexists(manifest):
        raise ValueError(f"{manifest} is missing: {directory} is not a whole checkpoint")
    if manifest.is_symlink() or not manifest.is_file():
        raise ValueError(f"{manifest} is no plain file: {directory} is not a whole checkpoint")
    content = manifest.read_bytes()
    try:
        files = json.loads(content)["files"]
        entries = {name: Entry(entry["bytes"], entry["sha256"]) for name, entry in files.items()}
        intact = rendered(entries) == content
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{manifest} is damaged: {type(error).__name__} {error}") from None
    if not intact:
        raise ValueError(f"{manifest} is damaged: it does not match its own digest")
    for name in entries:
        if Path(name).name != name or name in ("", "..", MANIFEST) or "\0" in name:
            raise ValueError(f"{manifest} names {name!r}, which is no file beside it")
    return entries


def enclosing_checkpoint(path: Path) -> Path | None:
    """The directory with a manifest that a path names or lies in, if there is one.

    Whatever else is written there makes it unreadable, as it holds what its manifest lists only.
    """
    path = path.absolute()
    for folder in (path, *path.parents):
        try:
            read_manifest(folder)
        except (OSError, ValueError):
            continue
        return folder
    return None


def check_outside(path: Path) -> None:
    """ValueError if a path names a checkpoint or lies in one."""
    if (holder := enclosing_checkpoint(path)) is not None:
        raise ValueError(
            f"cannot write into {path}: {holder} is a model or checkpoint, which files added to "
            "it would spoil; choose another folder"
        )


def rendered(entries: Entries) -> bytes:
    """The bytes of a manifest, which has a single form, so that every change is noticed."""
    files = {name: asdict(entries[name]) for name in sorted(entries)}
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return (json.dumps({"files": files, "sha256": digest}, indent=1) + "\n").encode()
