"""Which files a corpus is made of, and which documents are kept for validation."""

from __future__ import annotations

import codecs
import fnmatch
import glob
import gzip
import os
import re
import stat
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from receptance.storage.directories import expanded

# This many bytes at the front of a file decide whether it is text; git uses the same test.
_SNIFFED_BYTES = 8000
_GZIP = "a gzip file"
# Files that begin like this are no text, although they may have no zero byte near the front.
_MAGIC = {
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
    b"\xfd7zXZ\0": "an xz file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"PK\3\4": "a zip file",
    b"\x1f\x8b\x08": _GZIP,
    **{b"BZh%d1AY&SY" % level: "a bzip2 file" for level in range(1, 10)},
}
# Files of these kinds have no content of their own, and reading one may wait for ever.
_SPECIAL = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_JSON = (".json", ".json.gz")
# A list of objects in JSON, or an empty list, begins like this.
_RECORDS = rb"\[\s*[{\]]"
_DANGLING = "a link to nothing"
_NO_FILES = (*_SPECIAL.values(), _DANGLING)
_DOCUMENT, _LONG_LIST = "a JSON document", "a list in .json that is too long to be read whole"
_UNREADABLE = "unreadable: "
LIST_BYTES = 1 << 30
"""The largest list in a .json file: it is read whole, and takes some ten times as much memory."""

LeftOut = Callable[[Path, str], object]
"""A function that is told of each file of a folder or glob that is no text, and what it is."""


def find_files(
    sources: Sequence[str],
    exclude: Sequence[str] = (),
    also: tuple[str, ...] = (),
    output: Path | None = None,
    left_out: LeftOut = lambda path, instead: None,
) -> list[Path]:
    """The files behind paths, folders (all text files below) and globs, sorted, each once.

    Hidden files, and files with a path component that matches one of the patterns in exclude, are
    not looked for in folders and globs. Neither are files below the folder output, unless the
    source itself lies there. Of the others, those that are no text (see `what_instead`) are refused
    when a path names them, and left out, which left_out is told, when a folder or glob has them.
    Names that end like one of `also`, in whatever case, are taken although they are binary.
    ValueError names a source that matches nothing or is no text.
    """
    found: dict[str, Path] = {}  # the key is the real path, so that links do not double a file
    for source in sources:
        path = expanded(source)
        if path.is_dir() or not os.path.lexists(path):
            texts, others = _texts_inside(path, exclude, also, output)
        else:
            _check_named(path, also)
            texts, others = [path], {}
        if not texts:
            about = f"; {describe_left_out(others)}" if others else ""
            raise ValueError(f"{_lack(path)} {source}{about}")
        for other, instead in others.items():
            left_out(other, instead)
        for text in texts:
            found.setdefault(os.path.realpath(text), text)
    return list(found.values())


def describe_left_out(files: Mapping[Path, str]) -> str:
    """How many files were left out, what they are instead of text, and the first of them."""
    counts = ", ".join(f"{kind}: {n:,}" for kind, n in Counter(files.values()).items())
    return f"files left out: {len(files):,} ({counts}), the first is {next(iter(files))}"


def _texts_inside(
    path: Path, exclude: Sequence[str], also: tuple[str, ...], output: Path | None
) -> tuple[list[Path], dict[Path, str]]:
    """The texts of a folder or a glob, and what each of its other files is."""
    if path.is_dir():
        root, inside = path, sorted(path.rglob("*"))
    else:
        root = _literal_part(path)
        matches = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
        inside = [p for m in matches for p in (sorted(m.rglob("*")) if m.is_dir() else [m])]
    wanted = [p for p in dict.fromkeys(inside) if _wanted(p, root, exclude)]
    if output and not _is_below(root, output):
        wanted = [p for p in wanted if not _is_below(p, output)]
    kinds = {file: what_instead(file, also) for file in wanted}
    texts = [file for file, instead in kinds.items() if not instead and file.is_file()]
    return texts, {file: instead for file, instead in kinds.items() if instead}


def _lack(path: Path) -> str:
    """The beginning of the error for a folder or glob in which there is no text."""
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
    # In a folder only .gz files that end like `also` are opened; here a .gz may have any name.
    instead = what_instead(path, (*also, ".gz"))
    if instead.startswith(_UNREADABLE):
        raise ValueError(f"cannot read {path}: {instead.removeprefix(_UNREADABLE)}")
    if instead == "UTF-16":
        raise ValueError(f"{path} is UTF-16; save it as UTF-8")
    if instead == _DOCUMENT:
        raise ValueError(
            f"{path}: .json holds one document; give records as .jsonl, one object a line, or as a "
            "list of objects"
        )
    if instead == _LONG_LIST:
        check_list_size(str(path), path.stat().st_size)
    if instead in _NO_FILES:
        raise ValueError(f"{path} is {instead}, not a file; write the text to a file and name that")
    if instead:
        raise ValueError(
            f"{path} looks like {instead}, not text; unpack it, or give .gz or .parquet"
        )


def what_instead(path: Path, also: tuple[str, ...]) -> str:
    """What a path is instead of text, "" for text, a folder that can be read, or one of `also`.

    A .json file is text only if it begins like no list or object; a list of objects holds records,
    and anything else is one document. Nothing but regular files is opened.
    """
    try:
        about = path.stat()
        if special := _SPECIAL.get(stat.S_IFMT(about.st_mode)):
            return special
        if stat.S_ISDIR(about.st_mode):
            return _folder_problem(path)
        name = path.name.lower()
        packed = name.endswith(".gz") and name.endswith(also)
        if not packed and name.endswith(also):
            path.open("rb").close()
            return ""
        start = _beginning(path, packed=packed)
    except FileNotFoundError:
        return _DANGLING
    except (OSError, EOFError, zlib.error) as error:
        return f"{_UNREADABLE}{getattr(error, 'strerror', 0) or error}"
    return _content(start, name, about.st_size)


def _content(start: bytes, name: str, size: int) -> str:
    """What a file that begins so is instead of text; "" if it is text."""
    for magic, kind in _MAGIC.items():
        if start.startswith(magic):
            return kind + " without .gz" * (kind == _GZIP and not name.endswith(".gz"))
    if b"\0" in start:
        return "binary data"
    if name.endswith(_JSON) and _opens(start, rb"[\[{]"):
        if not _opens(start, _RECORDS):
            return _DOCUMENT
        return _LONG_LIST if size > LIST_BYTES else ""
    return ""


def _folder_problem(folder: Path) -> str:
    # A link may lead back to a folder above it, so links inside a folder are not followed.
    if folder.is_symlink():
        return "a link to a folder"
    return "" if os.access(folder, os.R_OK | os.X_OK) else f"{_UNREADABLE}Permission denied"


def file_kind(path: Path) -> str:
    """What is in a file that `find_files` has found: text, lines (of JSON), json or parquet."""
    name = path.name.lower()
    if name.endswith(".parquet"):
        return "parquet"
    if name.endswith((".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")):
        return "lines"
    if name.endswith(_JSON):
        start = _beginning(path, packed=name.endswith(".gz"))
        return "json" if _opens(start, _RECORDS) else "text"
    return "text"


def check_list_size(path: str, size: int) -> None:
    """ValueError for a list in JSON that is too large to be read whole."""
    if size > LIST_BYTES:
        raise ValueError(
            f"{path} is {_LONG_LIST}: more than {LIST_BYTES:,} bytes; make it a .jsonl, one "
            "object a line"
        )


def _opens(start: bytes, pattern: bytes) -> bool:
    return re.match(rb"\s*" + pattern, start.removeprefix(codecs.BOM_UTF8)) is not None


def _beginning(path: Path, *, packed: bool = False) -> bytes:
    with gzip.open(path) if packed else path.open("rb") as file:
        return file.read(_SNIFFED_BYTES)


def check_share(validation_share: float) -> None:
    """ValueError for a share that leaves nothing to train on or nothing to validate on."""
    if not 0 < validation_share < 1:
        raise ValueError(f"validation share is {validation_share}; it must lie between 0 and 1")


def check_seed(seed: int) -> None:
    """ValueError for a seed that some random generator does not accept."""
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"seed is {seed}; it must be at least 0 and less than 2**32")


def choose(
    sizes: np.ndarray, validation_share: float, seed: int
) -> tuple[np.ndarray, tuple[int, int] | None]:
    """Choose the documents to keep for validation by the sizes [N] of all documents.

    Documents are drawn at random and taken while they fit the share. The first result is their
    numbers, in the order in which they were drawn. When they make up less than half of the share,
    the end of the longest of the other documents is to be cut off as well: the second result is
    that document's number and the size of what stays in front of the cut.
    """
    check_share(validation_share)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(sizes), generator=generator).numpy()
    wanted = validation_share * int(sizes.sum())
    chosen: list[np.ndarray] = []
    size = 0
    # Each turn takes all documents up to the first that does not fit. A document that does not fit
    # now will not fit later either, so the condition of the loop drops it.
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
