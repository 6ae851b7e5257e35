"""The documents of files: a text file is one, and so is each record of JSON lines and Parquet."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from receptance.data.encode import ReadOptions, parse, read_rows
from receptance.data.sources import Range, chunks, find_sources, read_range, record_ranges
from receptance.data.sources import Source as File
from receptance.evaluation.results import Source
from receptance.tokenizer import Tokenizer

Progress = Callable[[int], object]
"""A function that is told how many more bytes were read."""

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Document:
    """A text as its tokens and its sizes."""

    number: int
    tokens: NDArray[np.int32]
    bytes: int
    characters: int
    words: int
    """Pieces between white space, counted as lm-evaluation-harness does."""


def find_files(names: Sequence[str]) -> list[File]:
    """The files behind paths, folders and globs, as training reads them.

    ValueError names what is not there, is no text, or is a stream of the hub.
    """
    found = find_sources(names)
    if streams := [file.path for file in found if file.kind == "stream"]:
        raise ValueError(f"{streams[0]} is a stream of the hub; save it to a file first")
    return found


def describe(files: Iterable[File], progress: Progress = lambda done: None) -> list[Source]:
    """Name, digest and size of each file."""
    return [
        Source(
            name=Path(file.path).name, digest=_digest(file, progress), about={"bytes": file.size}
        )
        for file in files
    ]


def read_documents(
    files: Iterable[File],
    tokenizer: Tokenizer,
    *,
    text_field: str = "text",
    limit: int | None = None,
) -> Iterator[Document]:
    """The documents that have a token at least, in order, up to a number of them.

    The text of a record is in its field `text_field`. ValueError names the file and the record that
    cannot be read.
    """
    number = 0
    for text in _texts(files, text_field):
        if number == limit:
            return
        if found := encoded(number, text, tokenizer):
            yield found
            number += 1


def encoded(
    number: int, text: Iterable[bytes], tokenizer: Tokenizer, *, strict: bool = True
) -> Document | None:
    """A text in pieces as a document; None if it has no token.

    ValueError if it has to be UTF-8 (`strict`, except for a tokenizer of bytes) and is not.
    """
    ids: list[NDArray[np.int32]] = []
    size = characters = words = 0
    # Words that a piece cuts in two are counted once, because pieces end at white space.
    for chunk in chunks(text):
        ids.append(np.asarray(tokenizer.encode(chunk), np.int32))
        known = _decoded(chunk, number, strict and tokenizer.kind != "bytes")
        size, characters = size + len(chunk), characters + len(known)
        words += len(re.split(r"\s+", known)) - (words > 0)
    tokens = np.concatenate(ids) if ids else np.zeros(0, np.int32)
    return Document(number, tokens, size, characters, words) if len(tokens) else None


def _texts(files: Iterable[File], text_field: str) -> Iterator[Iterable[bytes]]:
    options = ReadOptions(text_field=text_field)
    for file in files:
        if file.kind == "text":
            yield read_range(Range(file, 0, file.size, file.size))
            continue
        for span in record_ranges(file):
            for row in read_rows(span, options.only_field):
                try:
                    yield [_text(parse(row.content), text_field)]
                except ValueError as error:
                    raise ValueError(f"{row.where()}: {error}") from None


def _decoded(chunk: bytes, number: int, strict: bool) -> str:
    try:
        return chunk.decode("utf-8", "surrogatepass" if strict else "replace")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"document {number + 1} is not UTF-8: it has the byte 0x{chunk[error.start]:02x}; save "
            "it as UTF-8"
        ) from None


def _text(record: object, field: str) -> bytes:
    assert isinstance(record, dict)
    if field not in record:
        raise ValueError(
            f"no field {field!r}; there are {', '.join(map(str, record))}; set text_field to one "
            "of them"
        )
    if not isinstance(record[field], str):
        raise ValueError(f"field {field!r} is {type(record[field]).__name__}, not a text")
    return bytes(record[field].encode("utf-8", "surrogatepass"))


def _digest(file: File, progress: Progress) -> str | None:
    """The sha256 of a file; None for a data set, which is a folder."""
    if not Path(file.path).is_file():
        return None
    digest = hashlib.sha256()
    with open(file.path, "rb") as content:
        while block := content.read(_BLOCK):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()
