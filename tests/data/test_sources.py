"""Cutting sources into pieces of work."""

import gzip
import tempfile
from pathlib import Path

import numpy as np
import pytest
from corpora import run
from hypothesis import given
from hypothesis import strategies as st
from tiny import TEXT, small_bpe

from receptance.data.sources import (
    Range,
    Source,
    chunks,
    cut_pieces,
    find_sources,
    good_cut,
    read_range,
)

texts = st.lists(st.binary(min_size=1, max_size=400), min_size=1, max_size=6)


@given(texts, st.floats(0.01, 0.6), st.integers(0, 3))
def test_every_byte_of_text_is_in_one_piece_in_order(texts, share, seed):
    """At most one text is on both sides, its end for validation."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("receptance.data.sources.PIECE_BYTES", 100)
        for n, text in enumerate(texts):
            (Path(folder) / f"{n}.txt").write_bytes(text)
        names = [str(Path(folder) / f"{n}.txt") for n in range(len(texts))]
        pieces = cut_pieces(find_sources(names), share, seed)
        sides = {"train": dict.fromkeys(names, b""), "validation": dict.fromkeys(names, b"")}
        for piece in pieces:
            assert piece.weight <= 100
            for span in piece.ranges:
                sides[piece.part][span.source.path] += b"".join(read_range(span))
    train, validation = (list(side.values()) for side in sides.values())
    assert [a + b for a, b in zip(train, validation, strict=True)] == texts
    assert sum(bool(a) and bool(b) for a, b in zip(train, validation, strict=True)) <= 1
    assert any(train)
    ends = [span.ends_document for piece in pieces for span in piece.ranges]
    assert sum(ends) == sum(map(bool, train + validation))


@pytest.mark.usefixtures("small_pieces")
def test_pieces_of_a_text_have_the_tokens_of_the_whole(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    corpus = run(tmp_path / "a.txt", out=tmp_path / "out", tokenizer=small_bpe())
    assert len(cut_pieces(find_sources([str(tmp_path / "a.txt")]), 0.1, 0)) > 8
    sides = [small_bpe().decode(x[:-1].tolist()) for x in (corpus.train, corpus.validation)]
    assert "".join(sides) == TEXT
    assert corpus.train.tolist() == [*small_bpe().encode(sides[0]), small_bpe().end_of_text]
    assert corpus.validation.tolist() == [*small_bpe().encode(sides[1]), small_bpe().end_of_text]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (b"".join(b"line %d\n" % n for n in range(100)), 0.1),
        (b"x" * 1000, 0.1),
    ],
    ids=["between lines", "anywhere in one long line"],
)
def test_one_document_is_cut(text, wanted, tmp_path):
    (tmp_path / "a.txt").write_bytes(text)
    corpus = run(tmp_path / "a.txt", out=tmp_path / "out")
    train, validation = (bytes(x[:-1].tolist()) for x in (corpus.train, corpus.validation))
    assert train + validation == text
    assert train.endswith(b"\n") == (b"\n" in text)
    assert len(validation) / len(text) == pytest.approx(wanted, abs=0.02)


@given(st.text(st.sampled_from("ab \n\tü狐"), max_size=200), st.integers(2, 40))
def test_chunks_are_the_text(text, size):
    data = text.encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("receptance.data.sources.CHUNK_BYTES", size)
        found = list(chunks(data[n : n + 7] for n in range(0, len(data), 7)))
    assert b"".join(found) == data
    assert all(0 < len(chunk) <= size for chunk in found)
    if size >= 4:
        assert all(chunk.decode() for chunk in found)  # no character is cut


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        (b"one\ntwo\nthree", 8),
        (b"one\ntwo\n three", 4),
        (b"one\n\ntwo", 5),
        (b"one two", 6),
        ("狐狐x".encode(), 6),
        ("狐狐".encode(), 3),
        (b"ab", 1),
    ],
)
def test_good_cuts(text, cut):
    assert good_cut(text) == cut


def test_a_file_that_is_gone_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*gone"):
        list(read_range(Range(Source(str(tmp_path / "gone"), "text", 5, 0), 0, 5, 5)))


@pytest.mark.parametrize("place", [0, 40, -30])
def test_a_damaged_gz_is_named(place, tmp_path):
    packed = bytearray(gzip.compress(np.random.default_rng(0).bytes(999).hex().encode()))
    for at in range(place, place + 20):
        packed[at] ^= 255
    (tmp_path / "a.txt.gz").write_bytes(packed)
    with pytest.raises(ValueError, match=r"cannot read .*a\.txt\.gz"):
        run(tmp_path / "a.txt.gz", out=tmp_path / "out")


def test_only_empty_files(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match=r"text is empty: .*a\.txt"):
        run(tmp_path / "a.txt", out=tmp_path / "out")
