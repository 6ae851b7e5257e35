"""Cutting sources into pieces of work."""

import functools
import gzip
import itertools
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
from receptance.tokenizer import BPETokenizer

# A zero byte would make a named file binary.
text = st.binary(max_size=400).map(lambda data: b"t" + data.replace(b"\0", b"\1"))
texts = st.lists(text, min_size=1, max_size=6)


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
        ("one\ntwo\n\u3000three".encode(), 4),
        ("one\ntwo\u2028\nthree".encode(), 4),
        ("one\ntwo\n\u3000".encode()[:-1], 4),  # the last character may be a space
        ("\u3000\none\ntwo".encode()[1:], 7),  # so may the first
        (b"\xa1\xa1\xa1\xa1\n\xa1\xa1\xa1\xa1", 5),  # another encoding
        (b"ab", 1),
    ],
)
def test_good_cuts(text, cut):
    assert good_cut(text) == cut


WIDE = "\u3000\u00a0\u2028\u0085\u2003"


@given(st.lists(st.text(st.sampled_from("ab。狐\n " + WIDE), max_size=12), max_size=60))
def test_chunks_have_the_tokens_of_the_whole_whatever_spaces_lines_begin_with(lines):
    """Chinese text often has U+3000 behind a newline: no place to cut, other than in "狐\nb"."""
    text = "".join(f"{line}狐\nb" for line in lines).encode()
    bpe = spaced_bpe()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("receptance.data.sources.CHUNK_BYTES", 100)
        found = [id for chunk in chunks([text]) for id in bpe.encode(chunk)]
    assert found == bpe.encode(text)


@functools.cache
def spaced_bpe() -> BPETokenizer:
    """One that has learnt runs of two spaces of every kind: of three, the last is by itself."""
    texts = ["".join(run) for run in itertools.product(f"\n {WIDE}", f"\n {WIDE}", " ")]
    return BPETokenizer.train(["a".join(texts * 9)], 500)


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


def test_the_case_of_a_suffix_does_not_matter(tmp_path):
    (tmp_path / "A.JSONL").write_text('{"text": "a"}\n')
    (tmp_path / "B.Txt.GZ").write_bytes(gzip.compress(b"b"))
    (tmp_path / "C.PARQUET").write_bytes(b"PAR1\0")
    found = find_sources([str(tmp_path)])
    assert [source.kind for source in found] == ["lines", "text", "parquet"]
    assert [source.compressed for source in found] == [False, True, False]


def test_only_empty_files(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match=r"text is empty: .*a\.txt"):
        run(tmp_path / "a.txt", out=tmp_path / "out")
