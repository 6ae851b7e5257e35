"""Which files a corpus is made of, and which documents are kept for validation."""

from __future__ import annotations

import fnmatch
import glob
import gzip
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from receptance.storage.directories import expanded

# As many bytes at the front of a file decide whether it is text; git uses the same test.
_SNIFFED_BYTES = 8000
# How files begin that are no text, although they may have no zero byte near the front.
_MAGIC = {
    b"\xfd7zXZ\0": "an xz file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"PK\3\4": "a zip file",
    b"\x1f\x8b\x08": "a gzip file without .gz",
    **{b"BZh%d1AY&SY" % level: "a bzip2 file" for level in range(1, 10)},
}
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def find_files(
    sources: Sequence[str],
    exclude: Sequence[str] = (),
    also: tuple[str, ...] = (),
    output: Path | None = None,
) -> list[Path]:
    """The files behind paths, folders (all text files below) and globs, sorted, each once.

    exclude drops files with a path component that matches one of its patterns. Hidden files are
    left out unless named as a path of their own, and so are binary ones (a zero byte near the
    front), which are refused when they are named; files that end like one of `also`, in whatever
    case, are taken although they are binary. What a source that is not in the folder output finds
    there is left out: it is the work's own.
    ValueError names a source that matches nothing or is no text.
    """
    found: dict[str, Path] = {}  # by real path
    for source in sources:
        path = expanded(source)
        if path.is_file():
            _check_named(path, also)
            texts = [path]
        else:
            texts = _texts_inside(path, exclude, also, output)
        if not texts:
            raise ValueError(f"{_lack(path)} {source}")
        for text in texts:
            found.setdefault(os.path.realpath(text), text)
    return list(found.values())


def _texts_inside(
    path: Path, exclude: Sequence[str], also: tuple[str, ...], output: Path | None
) -> list[Path]:
    """What a folder or a glob stands for."""
    if path.is_dir():
        root, inside = path, sorted(path.rglob("*"))
    else:
        root = _literal_part(path)
        matches = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
        inside = [p for m in matches for p in ([m] if m.is_file() else sorted(m.rglob("*")))]
    wanted = [p for p in inside if p.is_file() and _wanted(p, root, exclude)]
    if output and not _is_below(root, output):
        wanted = [p for p in wanted if not _is_below(p, output)]
    return [p for p in wanted if p.name.lower().endswith(also) or not _other(_beginning(p))]


def _lack(path: Path) -> str:
    """What is wrong with a folder or glob that stands for nothing."""
    if path.is_dir():
        return "no text files in folder"
    matched = glob.glob(str(path), recursive=True)
    return "no text files behind" if matched else "no such file, folder or match:"


def _is_below(path: Path, folder: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _literal_part(pattern: Path) -> Path:
    """The folders of a glob before the first component with a wildcard."""
    parts = pattern.parts
    first = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return Path(*parts[:first])


def _wanted(path: Path, root: Path, exclude: Sequence[str]) -> bool:
    parts = path.relative_to(root).parts if path.is_relative_to(root) else path.parts
    hidden = any(p.startswith(".") and p not in (".", "..") for p in parts)
    return not hidden and not any(fnmatch.fnmatch(p, e) for p in parts for e in exclude)


def _check_named(path: Path, also: tuple[str, ...]) -> None:
    """ValueError if a file that is named as a path of its own would be read as what it is not."""
    name = path.name.lower()
    packed = name.endswith(".gz")
    if not packed and name.endswith(also):
        return
    start = _beginning(path, packed=packed)
    if start.startswith(_UTF16):
        raise ValueError(f"{path} is UTF-16; save it as UTF-8")
    if other := _other(start):
        raise ValueError(f"{path} looks like {other}, not text; unpack it, or give .gz or .parquet")
    opening = start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if name.endswith((".json", ".json.gz")) and opening in (b"{", b"["):
        raise ValueError(
            f"{path}: .json holds one document; give records as .jsonl, one object a line"
        )


def _beginning(path: Path, *, packed: bool = False) -> bytes:
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            return file.read(_SNIFFED_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {path}: {getattr(error, 'strerror', 0) or error}") from None


def _other(start: bytes) -> str:
    """What a file that begins so is instead of text; empty if it is text."""
    for magic, kind in _MAGIC.items():
        if start.startswith(magic):
            return kind
    return "binary data" if b"\0" in start else ""


def check_share(validation_share: float) -> None:
    """ValueError for a share that leaves nothing to train on or nothing to check with."""
    if not 0 < validation_share < 1:
        raise ValueError(f"validation share is {validation_share}; it must lie between 0 and 1")


def check_seed(seed: int) -> None:
    """ValueError for a seed that not every generator takes."""
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"seed is {seed}; it must be at least 0 and less than 2**32")


def choose(
    sizes: np.ndarray, validation_share: float, seed: int
) -> tuple[np.ndarray, tuple[int, int] | None]:
    """The documents kept for validation, by their sizes [N]: whole ones that fit, and an end.

    Documents are drawn at random and taken while they fit the share: their numbers, as drawn. When
    they are too few or too long for half of it, the end of the longest remaining document is to be
    cut off: (its number, the size of what stays in front).
    """
    check_share(validation_share)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(sizes), generator=generator).numpy()
    wanted = validation_share * int(sizes.sum())
    chosen: list[np.ndarray] = []
    size = 0
    # Each turn takes those that fit in a row. One that does not fit now will not fit later.
    while len(order := order[size + sizes[order] <= wanted]):
        total = size + np.cumsum(sizes[order])
        count = int(np.searchsorted(total, wanted, side="right"))
        chosen.append(order[:count])
        size, order = int(total[count - 1]), order[count:]
    taken = np.concatenate([np.zeros(0, np.int64), *chosen])
    if size >= wanted / 2:
        return taken, None
    rest = sizes.copy()
    rest[taken] = -1
    longest = int(rest.argmax())
    return taken, (longest, max(1, round(int(sizes[longest]) - (wanted - size))))
