"""From pieces of sources to tokens: text, and records that hold a text or an example."""

from __future__ import annotations

import codecs
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from receptance.data import hub, parquet
from receptance.data.examples import encode_record, is_example
from receptance.data.files import check_list_size
from receptance.data.ondisk import token_dtype
from receptance.data.parts import Part, PartReport, part_writer, vouch
from receptance.data.sources import (
    Piece,
    Range,
    Source,
    chunks,
    open_unchanged,
    read_range,
)
from receptance.data.templates import find_template
from receptance.tokenizer import Tokenizer

Progress = Callable[[int], None]
"""A function that is told how many more bytes of input are done."""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How records become documents."""

    text_field: str = "text"
    """The field of a record that holds its text."""
    template: str | None = None
    """How prompts and responses, or messages, are laid out: world, raven, ..."""
    skip_bad: bool = False
    """Leave out records that cannot be read and text files that are not UTF-8, and count them,
    instead of stopping at the first."""

    def __post_init__(self) -> None:
        if self.template is not None:
            find_template(self.template)

    @property
    def only_field(self) -> str | None:
        """The field to read of each record, or None for all, because there may be examples."""
        return self.text_field if self.template is None else None


@dataclass(frozen=True)
class Row:
    """A record as it was found, which is a line, a mapping or what is wrong with it; and where."""

    content: bytes | Mapping[str, Any] | ValueError
    where: Callable[[], str]
    size: int = 0


def tokenize_piece(
    piece: Piece,
    tokenizer: Tokenizer,
    options: ReadOptions,
    folder: Path,
    progress: Progress = lambda done: None,
) -> PartReport:
    """Write a piece's tokens as a part; ValueError names the file and the line that are bad."""
    with part_writer(folder, piece.index, token_dtype(tokenizer.vocab_size)) as part:
        work = _PieceWork(part, tokenizer, options, progress)
        for span in piece.ranges:
            if span.left_out:
                continue
            if span.source.kind == "text":
                work.text(span)
            else:
                work.records(read_rows(span, options.only_field))
        work.records(stream_rows(piece))
    report = PartReport(
        index=piece.index,
        part=piece.part,
        num_tokens=part.num_tokens,
        text_bytes=part.text_bytes,
        masked=part.masked,
        stream=piece.stream,
        rows=len(piece.rows),
        skipped=work.skipped,
        first_skipped=work.first_skipped,
        ranges_left_out=sum(span.left_out for span in piece.ranges),
    )
    vouch(folder, report)
    return report


class _PieceWork:
    def __init__(
        self, part: Part, tokenizer: Tokenizer, options: ReadOptions, progress: Progress
    ) -> None:
        self.part, self.tokenizer, self.options = part, tokenizer, options
        self.progress = progress
        self.skipped, self.first_skipped = 0, ""

    def text(self, span: Range) -> None:
        """Add a range of a text, which is a document or a part of one."""
        empty = True
        for chunk in chunks(read_range(span)):
            if self.tokenizer.kind != "bytes":
                _check_utf8(chunk, span.source.path)
            self.part.add(self.tokenizer.encode(chunk))
            self.part.text_bytes += len(chunk)
            self.progress(len(chunk))
            empty = False
        if span.ends_document and not empty:
            self.part.add([self.tokenizer.end_of_text])

    def records(self, rows: Iterable[Row]) -> None:
        """Add each record as a document; records without any text are left out."""
        for row in rows:
            try:
                self._record(parse(row.content))
            except ValueError as error:
                if not self.options.skip_bad:
                    raise bad_record(row, error) from None
                self.first_skipped = self.first_skipped or f"{row.where()}: {error}"
                self.skipped += 1
            self.progress(row.size)

    def _record(self, record: Mapping[str, Any]) -> None:
        ids, mask, size = encode_document(record, self.tokenizer, self.options)
        end = self.tokenizer.end_of_text
        if mask is not None:
            self.part.add([*ids, end], [*mask, 1])
        elif ids:
            self.part.add([*ids, end])
        self.part.text_bytes += size


def bad_record(row: Row, error: ValueError) -> ValueError:
    """The error that names a bad record, for when nobody has asked to leave such records out."""
    advice = "repair it, or set skip_bad to leave such records out"
    return ValueError(f"{row.where()}: {error}; {advice}")


def encode_document(
    record: Mapping[str, Any], tokenizer: Tokenizer, options: ReadOptions
) -> tuple[list[int], list[int] | None, int]:
    """The ids of a record, their mask if it is an example, and how many bytes of text it has.

    No end of text is added. ValueError says what is wrong with the record.
    """
    field = options.text_field
    if options.template is not None and is_example(record):
        ids, mask = encode_record(record, tokenizer, options.template)
        return ids, mask, len(tokenizer.decode_bytes(ids))
    if field in record:
        text = _text(record, field)
        ids = [token for chunk in chunks([text]) for token in tokenizer.encode(chunk)]
        return ids, None, len(text)
    if is_example(record):
        raise ValueError("it holds an example; say with template= how that is laid out")
    known = ", ".join(map(str, record)) or "none at all"
    raise ValueError(f"no field {field!r}; there are {known}; set text_field to one of them")


def _check_utf8(text: bytes, path: str) -> None:
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: it has the byte 0x{text[error.start]:02x}, {error.reason}; save "
            'it as UTF-8, set skip_bad to leave such files out, or take the tokenizer "bytes"'
        ) from None


def is_utf8(source: Source) -> bool:
    """Whether a text, all of which is read, is UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for block in read_range(Range(source, 0, source.size, 0)):
            decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _text(record: Mapping[str, Any], field: str) -> bytes:
    text = record[field]
    if not isinstance(text, str):
        raise ValueError(f"field {field!r} is {type(text).__name__}, not a text")
    return text.encode("utf-8", errors="surrogatepass")


def parse(content: bytes | Mapping[str, Any] | ValueError) -> Mapping[str, Any]:
    """The fields of a record as it was found; ValueError says why it has none."""
    if isinstance(content, ValueError):
        raise content
    return _object(_from_json(content)) if isinstance(content, bytes) else content


def _from_json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None


def _object(record: Any) -> Mapping[str, Any]:
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__}, not an object with fields")
    return record


def read_rows(span: Range, field: str | None) -> Iterator[Row]:
    """The records of a range, each with the place where it was found.

    Where the format can read a field by itself, only that one is read; None asks for all fields.
    """
    source = span.source
    if source.kind == "lines":
        yield from _lines(span)
        return
    if source.kind == "json":
        yield from _listed(span)
        return
    read = hub.read_rows if source.kind == "rows" else parquet.read_rows
    if source.kind == "parquet":
        open_unchanged(source).close()
    for number, row in read(source.path, span.begin, span.end, field):
        yield Row(row, functools.partial(_name_row, source.path, number + 1))


def _listed(span: Range) -> Iterator[Row]:
    """The records of a .json file, which are the items of one list."""
    path = span.source.path
    content = bytearray()
    for block in read_range(span):
        content += block
        check_list_size(path, len(content))
    try:
        records = _from_json(bytes(content))
    except ValueError as error:
        yield Row(error, lambda: path)
        return
    for number, record in enumerate(records, start=1):
        yield Row(_item(record), functools.partial(_name_row, path, number))


def _item(record: Any) -> Mapping[str, Any] | ValueError:
    try:
        return _object(record)
    except ValueError as error:
        return error


def stream_rows(piece: Piece) -> Iterator[Row]:
    """The records of a stream that a piece holds, and where each was found."""
    for number, row in enumerate(piece.rows, start=piece.first_row + 1):
        yield Row(row, functools.partial(_name_row, piece.stream, number))


def _name_row(name: str, number: int) -> str:
    return f"{name}, row {number}"


def _lines(span: Range) -> Iterator[Row]:
    number = 0
    # The blocks of a line that has not ended yet. They are joined once, because it may be long.
    begun: list[bytes] = []
    for block in itertools.chain(read_range(span), [b"\n"]):
        begun.append(block)
        if b"\n" not in block:
            continue
        *lines, rest = b"".join(begun).split(b"\n")
        begun = [rest]
        for line in lines:
            number += 1
            if line.strip():
                yield Row(line, functools.partial(_name_line, span, number), len(line) + 1)


def _name_line(span: Range, number: int) -> str:
    """The place of a line; those before the range are counted only now, when it is asked for."""
    before = read_range(Range(span.source, 0, span.begin, 0)) if span.begin else ()
    number += sum(block.count(b"\n") for block in before)
    return f"{span.source.path}, line {number}"


def texts(piece: Piece, options: ReadOptions) -> Iterator[str]:
    """The text of a piece to train a tokenizer on, without bad records and without any layout."""
    for span in piece.ranges:
        if span.left_out:
            continue
        if span.source.kind == "text":
            yield from (chunk.decode("utf-8", "replace") for chunk in chunks(read_range(span)))
        else:
            yield from _strings(read_rows(span, options.text_field), options.text_field)
    yield from _strings(stream_rows(piece), options.text_field)


def _strings(rows: Iterable[Row], field: str) -> Iterator[str]:
    for row in rows:
        try:
            record = parse(row.content)
        except ValueError:
            continue
        yield from _inside(record.get(field, record))


def _inside(value: Any) -> Iterator[str]:
    """All strings in a value that may be a list or mapping of others."""
    if isinstance(value, str):
        # The trainer refuses lone surrogates, which JSON can hold.
        yield value.encode("utf-8", "replace").decode()
    elif isinstance(value, list | Mapping):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _inside(inner)
