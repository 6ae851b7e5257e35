"""What a corpus is made of, and how the work on it is cut into pieces before any is done.

Pieces depend on the sources alone, never on the number of workers or on what was interrupted.
"""

from __future__ import annotations

import codecs
import gzip
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from receptance.data import hub, parquet
from receptance.data.files import LeftOut, choose, file_kind, find_files
from receptance.data.parts import PartReport
from receptance.data.tokens import is_corpus

PIECE_BYTES = 4 << 20
"""Work for some seconds: what an interruption costs at most, per worker."""
CHUNK_BYTES = 1 << 18
"""Text that is tokenized at a time: a BPE takes 140 bytes of memory for each of its bytes."""
# Records of a stream that are tokenized at a time.
_STREAM_ROWS = 1000
# So far back a good place to cut is looked for.
_WINDOW = 1 << 16
_SPACE = b" \t\n\r\v\f"
# Taken from folders although they are binary; other .gz files may be anything, so must be named.
_BINARY = (".txt.gz", ".json.gz", ".jsonl.gz", ".ndjson.gz", ".parquet")


@dataclass(frozen=True)
class Source:
    """A file or data set as it was when the work was planned."""

    path: str
    kind: str
    """text, lines (of JSON), json (a list of objects), parquet, rows (a saved data set) or stream
    (a data set of unknown size)."""
    size: int
    """Bytes; rows for "rows"; 0 for "stream"."""
    changed: int
    """Time of the last change, in ns; 0 for "stream"."""

    @property
    def compressed(self) -> bool:
        """Whether it is a gzip file, which can only be read from its beginning."""
        return self.path.lower().endswith(".gz")


@dataclass(frozen=True)
class Range:
    """A part of a source: bytes of text and lines, groups of rows of parquet, rows."""

    source: Source
    begin: int
    end: int
    weight: int
    """About as many bytes of input."""
    ends_document: bool = True
    left_out: bool = False
    """Whether its source is not to be read, because it turned out to be no text."""


@dataclass(frozen=True)
class Piece:
    """What is tokenized at once; its tokens lie together in one part on disk."""

    index: int
    part: str
    """train, validation, or drawn: its documents are drawn for validation at the end."""
    ranges: tuple[Range, ...]
    stream: str = ""
    """The stream that it is from instead."""
    first_row: int = 0
    rows: tuple[dict, ...] = ()
    """The stream's records from number first_row on; a worker could not read them again."""

    @property
    def weight(self) -> int:
        """About as many bytes of input."""
        return sum(piece.weight for piece in self.ranges)


def find_sources(
    names: Sequence[str],
    exclude: Sequence[str] = (),
    output: Path | None = None,
    left_out: LeftOut = lambda path, instead: None,
) -> list[Source]:
    """The sources behind paths, folders, globs and hf:NAME[:CONFIG][:SPLIT]; files first.

    Each is taken once, and nothing that a folder or glob has in the folder output. left_out is told
    which of their files are no text (see `find_files`). ValueError names what is not there, cannot
    be read, holds tokens already, or is empty altogether.
    """
    if tokenized := [name for name in names if is_corpus(name)]:
        raise ValueError(f"{tokenized[0]} holds tokens already; receptance data merge takes those")
    paths = [name for name in names if not name.startswith("hf:")]
    found = [_file(path) for path in find_files(paths, exclude, _BINARY, output, left_out)]
    for name in dict.fromkeys(name for name in names if name.startswith("hf:")):
        found.append(Source(name, *hub.describe(name)))
    if all(source.size == 0 and source.kind != "stream" for source in found):
        names = [source.path for source in found] or list(names)
        raise ValueError(
            f"the text is empty: {', '.join(names[:3])}; give a file with something in it"
        )
    return found


def _file(path: Path) -> Source:
    try:
        about = path.stat()
        return Source(str(path), file_kind(path), about.st_size, about.st_mtime_ns)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def open_unchanged(source: Source) -> BinaryIO:
    """Open a file of the plan; ValueError if it is not what it was when the work was planned."""
    try:
        file = open(source.path, "rb")  # noqa: SIM115 the caller closes it
    except OSError as error:
        raise ValueError(f"cannot read {source.path}: {error.strerror}") from None
    about = os.fstat(file.fileno())
    if (about.st_size, about.st_mtime_ns) != (source.size, source.changed):
        file.close()
        raise ValueError(
            f"{source.path} changed while it was read: {about.st_size} bytes instead of "
            f"{source.size}; start again, into a new folder, when it no longer changes"
        )
    return file


def cut_pieces(sources: Sequence[Source], validation_share: float, seed: int) -> list[Piece]:
    """All work that is known beforehand, in order: training text, validation text, records.

    Text whose size is known is divided here: whole files drawn at random while they fit the share,
    or the end of the longest. Streams are not among the pieces.
    """
    texts = [source for source in sources if source.size and _is_plain(source)]
    others = [source for source in sources if source.size and not _is_plain(source)]
    sizes = np.array([source.size for source in texts], np.int64)
    numbers, cut = choose(sizes, validation_share, seed)
    chosen = set(numbers.tolist())
    spans: dict[str, list[Range]] = {"train": [], "validation": [], "drawn": []}
    for i, source in enumerate(texts):
        middle = 0 if i in chosen else source.size
        if cut is not None and i == cut[0]:
            middle = _cut_near(source, cut[1])
        spans["train"] += _text_ranges(source, 0, middle)
        spans["validation"] += _text_ranges(source, middle, source.size)
    for source in others:
        spans["drawn"] += record_ranges(source)
    groups = ((part, group) for part, ranges in spans.items() for group in _packed(ranges))
    return [Piece(index, part, group) for index, (part, group) in enumerate(groups)]


def _is_plain(source: Source) -> bool:
    return source.kind == "text" and not source.compressed


def _packed(ranges: Iterable[Range]) -> Iterator[tuple[Range, ...]]:
    """Neighbors together until they weigh enough for a piece."""
    group: list[Range] = []
    weight = 0
    for one in ranges:
        if group and weight + one.weight > PIECE_BYTES:
            yield tuple(group)
            group, weight = [], 0
        group.append(one)
        weight += one.weight
    if group:
        yield tuple(group)


def _text_ranges(source: Source, begin: int, end: int) -> Iterator[Range]:
    """The bytes begin ... end of a text, cut where cutting changes no token, if there is such."""
    if end - begin > PIECE_BYTES:
        with open_unchanged(source) as file:
            while end - begin > PIECE_BYTES:
                start = begin + max(0, PIECE_BYTES - _WINDOW)
                file.seek(start)
                cut = start + good_cut(file.read(begin + PIECE_BYTES + 1 - start))
                yield Range(source, begin, cut, cut - begin, ends_document=False)
                begin = cut
    if end > begin:
        yield Range(source, begin, end, end - begin)


def record_ranges(source: Source) -> Iterator[Range]:
    """The ranges in which the records of a source are read, in order; not for text or streams."""
    if source.compressed or source.kind == "json":
        yield Range(source, 0, source.size, source.size)
    elif source.kind == "lines":
        yield from _line_ranges(source)
    else:
        groups = hub.row_groups if source.kind == "rows" else parquet.row_groups
        for begin, end, weight in groups(source.path, PIECE_BYTES):
            yield Range(source, begin, end, weight)


def _line_ranges(source: Source) -> Iterator[Range]:
    begin = 0
    with open_unchanged(source) as file:
        while begin < source.size:
            file.seek(begin + PIECE_BYTES - 1)
            file.readline()  # to the end of the line that this byte belongs to
            end = min(file.tell(), source.size)
            yield Range(source, begin, end, end - begin)
            begin = end


def stream_pieces(
    sources: Iterable[Source],
    field: str | None,
    first: int,
    finished: Callable[[int], PartReport | None],
) -> Iterator[Piece]:
    """The pieces of all streams, numbered from `first`; those finished at the front come empty."""
    index = first
    for source in sources:
        if source.kind != "stream":
            continue
        name, row = source.path, 0
        while (report := finished(index)) is not None and report.stream == name:
            yield Piece(index, "drawn", (), name, row)
            row, index = row + report.rows, index + 1
        for rows in _grouped(hub.read_stream(name, row, field)):
            yield Piece(index, "drawn", (), name, row, tuple(rows))
            row, index = row + len(rows), index + 1


def _grouped(rows: Iterable[dict]) -> Iterator[list[dict]]:
    """Rows together until they are many or large."""
    group: list[dict] = []
    size = 0
    for row in rows:
        group.append(row)
        size += sum(len(v) if isinstance(v, str) else len(repr(v)) for v in row.values())
        if len(group) == _STREAM_ROWS or size > PIECE_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def good_cut(text: bytes) -> int:
    """Where to cut all but the last byte of a text, from its end backwards, at least 1.

    Between two lines, so that a newline alone stands between characters that are no space of
    Unicode: there a byte-level BPE never merges, and the halves' tokens are those of the whole.
    Without such a place after any newline, and without a newline at the beginning of a character.
    """
    limit = len(text) - 1
    newline = text.rfind(b"\n", 0, limit)
    while newline > 0:
        if _stands_alone(text, newline):
            return newline + 1
        newline = text.rfind(b"\n", 0, newline)
    cut = text.rfind(b"\n", 0, limit) + 1 or limit
    while cut > max(1, limit - 3) and text[cut] & 0xC0 == 0x80:
        cut -= 1
    return max(1, cut)


def _stands_alone(text: bytes, newline: int) -> bool:
    """Whether the characters beside a newline are certainly no spaces, in all of Unicode."""
    if text[newline - 1] in _SPACE or text[newline + 1] in _SPACE:  # mostly, and at once
        return False
    sides = (text[max(0, newline - 4) : newline], -1), (text[newline + 1 : newline + 5], 0)
    for near, place in sides:
        character = near.decode("utf-8", "replace")[place]
        if character.isspace() or (character == "\ufffd" and len(near) < 4):  # perhaps cut off
            return False
    return True


def chunks(read: Iterable[bytes]) -> Iterator[bytes]:
    """A text that comes in any pieces, in pieces of at most CHUNK_BYTES, cut by `good_cut`."""
    rest = b""
    for more in read:
        rest, begin = rest + more, 0
        while len(rest) - begin > CHUNK_BYTES:
            start = begin + max(0, CHUNK_BYTES - _WINDOW)
            cut = start + good_cut(rest[start : begin + CHUNK_BYTES + 1])
            yield rest[begin:cut]
            begin = cut
        rest = rest[begin:]
    if rest:
        yield rest


def read_range(span: Range) -> Iterator[bytes]:
    """The bytes of a range of text, decompressed, in order, without the file's byte-order mark.

    ValueError if some are missing.
    """
    with open_unchanged(span.source) as file:
        if span.source.compressed:
            with gzip.open(file) as inner:
                yield from _unmarked(_blocks(inner, None, span.source.path))
            return
        file.seek(span.begin)
        blocks = _blocks(file, span.end - span.begin, span.source.path)
        yield from blocks if span.begin else _unmarked(blocks)


def _unmarked(blocks: Iterator[bytes]) -> Iterator[bytes]:
    yield next(blocks, b"").removeprefix(codecs.BOM_UTF8)
    yield from blocks


def _blocks(file: BinaryIO | gzip.GzipFile, size: int | None, path: str) -> Iterator[bytes]:
    while size is None or size > 0:
        try:
            block = file.read(CHUNK_BYTES if size is None else min(CHUNK_BYTES, size))
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"cannot read {path}: {error}") from None
        if not block and size is not None:
            raise ValueError(f"{path} became shorter while it was read; start again when it rests")
        if not block:
            return
        size = size if size is None else size - len(block)
        yield block


def _cut_near(source: Source, cut: int) -> int:
    """A cut of a text at the last line that ends before `cut`, or else between two characters."""
    start = max(cut // 2, cut - (1 << 20))
    with open_unchanged(source) as file:
        file.seek(start)
        text = file.read(cut - start + 3)
    at = cut - start
    if newline := text.rfind(b"\n", 0, at) + 1:
        return start + newline
    near = (n for n in (at, at - 1, at - 2, at - 3, at + 1, at + 2, at + 3) if 0 < n <= len(text))
    return start + next((n for n in near if text[n : n + 1] < b"\x80" or text[n] >= 0xC0), at)
