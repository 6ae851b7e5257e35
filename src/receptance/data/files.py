"""Which files a corpus is made of, and which documents are kept for validation."""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from receptance.directories import expanded

# As many bytes at the front of a file decide whether it is text; git uses the same test.
_SNIFFED_BYTES = 8000


def find_files(
    sources: Sequence[str],
    exclude: Sequence[str] = (),
    also: tuple[str, ...] = (),
    output: Path | None = None,
) -> list[Path]:
    """The files behind paths, folders (all text files below) and globs, sorted, each once.

    exclude drops files with a path component that matches one of its patterns. Hidden files and
    binary ones (a zero byte near the front) are left out unless named as a path of their own;
    files that end like one of `also` are taken although they are binary. What a source that is
    not in the folder output finds there is left out: it is the work's own.
    ValueError names a source that matches nothing.
    """
    found: dict[str, Path] = {}  # by real path
    for source in sources:
        path = expanded(source)
        texts = [path] if path.is_file() else _texts_inside(path, exclude, also, output)
        if not texts:
            what = "no text files in folder" if path.is_dir() else "no such file, folder or match:"
            raise ValueError(f"{what} {source}")
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
        inside = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
    wanted = [p for p in inside if p.is_file() and _wanted(p, root, exclude)]
    if output and not _is_below(root, output):
        wanted = [p for p in wanted if not _is_below(p, output)]
    return [p for p in wanted if p.name.endswith(also) or _is_text(p)]


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


def _is_text(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return b"\0" not in file.read(_SNIFFED_BYTES)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def check_share(validation_share: float) -> None:
    """ValueError for a share that leaves nothing to train on or nothing to check with."""
    if not 0 < validation_share < 1:
        raise ValueError(f"validation share is {validation_share}; it must lie between 0 and 1")


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
