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
"""The size of a piece, which takes seconds: an interruption costs each worker at most one piece."""
CHUNK_BYTES = 1 << 18
"""At most this much text is tokenized at a time: a BPE takes 140 bytes of memory for each byte."""
# At most this many records of a stream are tokenized at a time.
_STREAM_ROWS = 1000
# A good place to cut is looked for in this many bytes before the latest possible one.
_WINDOW = 1 << 16
_SPACE = b" \t\n\r\v\f"
# Files of a folder that end so are taken although they are binary. Other .gz files may hold
# anything, so they are taken only when they are named themselves.
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
    """About how many bytes of input the range has."""
    ends_document: bool = True
    left_out: bool = False
    """Whether its source is not to be read, because it turned out to be no text."""


@dataclass(frozen=True)
class Piece:
    """What is tokenized at once; its tokens lie together in one part on disk."""

    index: int
    part: str
    """train, validation, or drawn: some of its documents are drawn for validation at the end."""
    ranges: tuple[Range, ...]
    stream: str = ""
    """The name of the stream that the piece is from, if it has no ranges."""
    first_row: int = 0
    rows: tuple[dict, ...] = ()
    """The stream's records from number first_row on, which a worker could not read again."""

    @property
    def weight(self) -> int:
        """About how many bytes of input the piece has."""
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
        file = open(source.path, "rb")  # noqa: SIM115 (the caller closes the file)
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
    """Neighboring ranges put together until they weigh enough for a piece."""
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
    """The bytes from begin to end of a text, cut where that changes no token, if possible."""
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
            file.readline()  # the range ends with the line that this byte belongs to
            end = min(file.tell(), source.size)
            yield Range(source, begin, end, end - begin)
            begin = end


def stream_pieces(
    sources: Iterable[Source],
    field: str | None,
    first: int,
    finished: Callable[[int], PartReport | None],
) -> Iterator[Piece]:
    """The pieces of all streams, numbered from `first`.

    Those at the front that are finished already come without their records.
    """
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
    """Rows put together until they are many or large."""
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
    """Where to cut a text so that it has at most all its bytes but the last, and at least 1.

    The best place is behind the last newline that stands alone between two characters which Unicode
    does not call spaces: there a byte-level BPE never merges, so the tokens of the halves are those
    of the whole. Without such a newline the cut is behind the last newline of any kind, and without
    a newline it is in front of the last character.
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
    """Whether the characters on both sides of a newline are certainly no spaces of Unicode."""
    # This decides most cases without decoding anything.
    if text[newline - 1] in _SPACE or text[newline + 1] in _SPACE:
        return False
    sides = (text[max(0, newline - 4) : newline], -1), (text[newline + 1 : newline + 5], 0)
    for near, place in sides:
        character = near.decode("utf-8", "replace")[place]
        # At the border of the text the character may be cut off, and could be any.
        if character.isspace() or (character == "\ufffd" and len(near) < 4):
            return False
    return True


def chunks(read: Iterable[bytes]) -> Iterator[bytes]:
    """The same text in pieces of at most CHUNK_BYTES that `good_cut` has cut."""
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
