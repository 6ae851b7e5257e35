"""The manifest of a directory: name, length and sha256 of every file in it, and of itself.

Neither safetensors nor a file system notices a flipped bit, a file of another checkpoint or one
that a copy cut short. So all of a directory is compared with its manifest before it is read.
"""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

from receptance.sealed import MANIFEST, Entries, Entry, read_manifest, rendered

OPTIMIZER = "optimizer"
"""The prefix of the names of files that hold the state of an optimizer."""


def verify(directory: str | Path, *, optimizer: bool = True) -> None:
    """ValueError names the first file that is missing, surplus or different from the manifest.

    `optimizer` tells whether the digests of the optimizer's files are compared; their lengths are
    always compared.
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
    # safetensors makes files that only their owner can read, so they get the directory's
    # permissions.
    os.chmod(file, file.parent.stat().st_mode & 0o666)
    entry = _entry(file)
    sync(file)
    if _entry(file) != entry:
        raise OSError(errno.EIO, "not read back as it was written", str(file))
    return entry


def write_manifest(directory: Path, entries: Entries) -> None:
    """Write the manifest, the last file of a directory; OSError if it is not read back equal."""
    manifest = directory / MANIFEST
    manifest.write_bytes(rendered(entries))
    sync(manifest)
    sync(directory)
    if read_manifest(directory) != entries:
        raise OSError(errno.EIO, "not read back as it was written", str(manifest))


def check_listing(directory: Path, entries: Entries) -> None:
    """ValueError unless a directory holds exactly these files, with these lengths."""
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
    """The names of all files but the manifest; ValueError for a folder or a link."""
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
    """Force a file or a folder to disk and drop it from the cache, so that it is read from disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        if hasattr(os, "posix_fadvise"):  # macOS has no such function.
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def _entry(file: Path) -> Entry:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return Entry(stream.tell(), digest)
