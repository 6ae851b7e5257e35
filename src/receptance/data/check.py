"""Whether sources can be made into a corpus, as far as a look at their beginnings tells."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from receptance.data import hub
from receptance.data.encode import (
    ReadOptions,
    Row,
    bad_record,
    encode_document,
    parse,
    read_rows,
    stream_rows,
)
from receptance.data.sources import Piece, Source, find_sources, record_ranges
from receptance.tokenizer import ByteTokenizer


def check_sources(
    names: Sequence[str],
    options: ReadOptions,
    exclude: Sequence[str] = (),
    *,
    records: int = 100,
) -> list[Source]:
    """The sources that `prepare` would find, of which nothing is written or tokenized.

    The first `records` records of each source are laid out as the options say. ValueError names
    what is not there, cannot be read or is empty, and the first of those records that is bad,
    unless options.skip_bad has such records left out.
    """
    sources = find_sources(names, exclude)
    for source in sources:
        if source.kind == "text":
            continue
        for row in itertools.islice(_rows(source, options, records), records):
            try:
                encode_document(parse(row.content), ByteTokenizer(), options)
            except ValueError as error:
                if not options.skip_bad:
                    raise bad_record(row, error) from None
    return sources


def _rows(source: Source, options: ReadOptions, records: int) -> Iterator[Row]:
    if source.kind == "stream":
        stream = hub.read_stream(source.path, 0, options.only_field)
        rows = tuple(itertools.islice(stream, records))
        return stream_rows(Piece(0, "drawn", (), source.path, 0, rows))
    spans = record_ranges(source)
    return itertools.chain.from_iterable(read_rows(span, options.only_field) for span in spans)
