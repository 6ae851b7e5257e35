"""The manifest of a directory: name, length and sha256 of every file in it, and of itself.

Neither safetensors nor a file system notices a flipped bit, a file of another checkpoint or one
that was cut short by a copy. Whoever reads a directory compares all of it with its manifest first.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

MANIFEST = "manifest.json"
OPTIMIZER = "optimizer"
"""What the names of files with the state of an optimizer begin with."""


@dataclass(frozen=True)
class Entry:
    """What the manifest says about one file."""

    bytes: int
    sha256: str


Entries = dict[str, Entry]


def verify(directory: str | Path, *, optimizer: bool = True) -> None:
    """ValueError names the first file that is missing, surplus or not as the manifest has it.

    optimizer: whether the content of the optimizer's files is read too; their lengths always are.
    """
    directory = Path(directory)
    try:
        entries = read_manifest(directory)
        check_listing(directory, entries)
        for name, entry in entries.items():
            if not optimizer and name.startswith(OPTIMIZER):
                continue
            if _entry(directory / name) != entry:
                raise ValueError(
                    f"{directory / name} does not match its sha256 digest; it was damaged or edited"
                )
    except OSError as error:
        raise ValueError(f"{directory} cannot be read: {error}") from None


def seal_file(file: Path) -> Entry:
    """Force a file to disk and read it back from there; OSError if it comes back different."""
    # safetensors makes files that only their owner can read; they get the directory's permissions.
    os.chmod(file, file.parent.stat().st_mode & 0o666)
    entry = _entry(file)
    sync(file)
    if _entry(file) != entry:
        raise OSError(errno.EIO, "not read back as it was written", str(file))
    return entry


def write_manifest(directory: Path, entries: Entries) -> None:
    """Write and read back the manifest, the last file of a directory; OSError if that fails."""
    manifest = directory / MANIFEST
    manifest.write_bytes(_render(entries))
    sync(manifest)
    sync(directory)
    if read_manifest(directory) != entries:
        raise OSError(errno.EIO, "not read back as it was written", str(manifest))


def read_manifest(directory: Path) -> Entries:
    """What the manifest says; ValueError if it is missing, damaged or names files elsewhere."""
    manifest = directory / MANIFEST
    if not os.path.lexists(manifest):
        raise ValueError(f"{manifest} is missing: {directory} is not a whole checkpoint")
    if manifest.is_symlink() or not manifest.is_file():
        raise ValueError(f"{manifest} is no plain file: {directory} is not a whole checkpoint")
    content = manifest.read_bytes()
    try:
        files = json.loads(content)["files"]
        entries = {name: Entry(entry["bytes"], entry["sha256"]) for name, entry in files.items()}
        intact = _render(entries) == content
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{manifest} is damaged: {type(error).__name__} {error}") from None
    if not intact:
        raise ValueError(f"{manifest} is damaged: it does not match its own digest")
    for name in entries:
        if Path(name).name != name or name in ("", "..", MANIFEST) or "\0" in name:
            raise ValueError(f"{manifest} names {name!r}, which is no file beside it")
    return entries


def check_listing(directory: Path, entries: Entries) -> None:
    """ValueError unless there are exactly these files, of these lengths."""
    found = plain_files(directory)
    for name, entry in entries.items():
        file = directory / name
        if name not in found:
            raise ValueError(f"{file} is missing; the checkpoint is incomplete")
        if (size := file.stat().st_size) != entry.bytes:
            how = "truncated" if size < entry.bytes else "something was added"
            raise ValueError(f"{file} has {size} bytes instead of {entry.bytes}; {how}")
    if surplus := sorted(found - entries.keys()):
        raise ValueError(f"{directory / surplus[0]} is not in the manifest; move it elsewhere")


def plain_files(directory: Path) -> set[str]:
    """The names of all files but the manifest; ValueError if there is anything else."""
    with os.scandir(directory) as items:
        found = list(items)
    for item in found:
        if not item.is_file(follow_symlinks=False):
            raise ValueError(
                f"{item.path} is a folder or a link; a checkpoint has plain files only, move it "
                "elsewhere"
            )
    return {item.name for item in found} - {MANIFEST}


def sync(path: Path) -> None:
    """Force a file or a folder to disk; what is read next comes from there."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def _entry(file: Path) -> Entry:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return Entry(stream.tell(), digest)


def _render(entries: Entries) -> bytes:
    """The bytes of a manifest; there is one form only, so that no change of it goes unnoticed."""
    files = {name: asdict(entries[name]) for name in sorted(entries)}
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return (json.dumps({"files": files, "sha256": digest}, indent=1) + "\n").encode()
