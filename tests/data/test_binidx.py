"""RWKV-LM's and Megatron's pairs of files, against bytes packed by hand."""

import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from receptance.data import TokenFiles
from receptance.data.binidx import binidx_writer, read_binidx, stem_of, unclosed

documents = st.lists(
    st.lists(st.integers(1, 65535), max_size=20).map(lambda ids: [*ids, 0]), max_size=8
)


def index(
    sizes: list[int],
    borders: list[int] | None = None,
    *,
    magic: bytes = b"MMIDIDX\0\0",
    version: int = 1,
    code: int = 8,
    pointers: list[int] | None = None,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """An .idx by hand."""
    borders = list(range(len(sizes) + 1)) if borders is None else borders
    pointers = [2 * sum(sizes[:i]) for i in range(len(sizes))] if pointers is None else pointers
    return (
        magic
        + struct.pack("<QB", version, code)
        + struct.pack("<QQ", *(counts or (len(sizes), len(borders))))
        + struct.pack(f"<{len(sizes)}i", *sizes)
        + struct.pack(f"<{len(pointers)}q", *pointers)
        + struct.pack(f"<{len(borders)}q", *borders)
    )


def decode(stem: Path) -> list[list[int]]:
    """The documents of a pair, read item by item."""
    about, numbers = Path(f"{stem}.idx").read_bytes(), Path(f"{stem}.bin").read_bytes()
    assert about[:9] == b"MMIDIDX\0\0"
    version, code, count, borders = struct.unpack_from("<QBQQ", about, 9)
    assert version == 1 and borders == count + 1
    letter = {8: "H", 4: "i"}[code]
    place, found = 34, []
    for i in range(count):
        (size,) = struct.unpack_from("<i", about, place + 4 * i)
        (pointer,) = struct.unpack_from("<q", about, place + 4 * count + 8 * i)
        (border,) = struct.unpack_from("<q", about, place + 12 * count + 8 * (i + 1))
        assert border == i + 1
        found.append(list(struct.unpack_from(f"<{size}{letter}", numbers, pointer)))
    assert len(about) == place + 12 * count + 8 * (count + 1)
    return found


def pair(folder: Path, about: bytes, tokens: list[int]) -> Path:
    (folder / "x.idx").write_bytes(about)
    (folder / "x.bin").write_bytes(struct.pack(f"<{len(tokens)}H", *tokens))
    return folder / "x"


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@given(texts=documents)
def test_what_is_written_is_what_it_should_be(texts, dtype):
    with tempfile.TemporaryDirectory() as folder:
        stem = Path(folder) / "ü.x"
        stream = np.array([id for text in texts for id in text], np.dtype(dtype))
        with binidx_writer(stem, np.dtype(dtype), end_of_text=0) as append:
            append(stream[:7])  # documents may lie across pieces
            append(stream[7:])
        assert decode(stem) == texts
        found = read_binidx(stem)
        assert found.tokens.tolist() == stream.tolist()
        assert found.ends.tolist() == np.cumsum([len(t) for t in texts]).tolist()


@pytest.mark.parametrize("name", ["x", "x.bin", "x.idx"])
def test_any_of_the_names_will_do(name, tmp_path):
    stem = pair(tmp_path, index([2, 1]), [5, 0, 0])
    assert stem_of(tmp_path / name) == stem
    assert read_binidx(tmp_path / name).tokens.tolist() == [5, 0, 0]


@pytest.mark.parametrize(
    ("code", "letter"), [(1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q"), (8, "H")]
)
def test_every_type_of_whole_numbers(code, letter, tmp_path):
    """Their codes are those of Megatron's enum DType, the letters those of struct."""
    size, ids = struct.calcsize(f"<{letter}"), [5, 127, 0, 1, 0]
    pointers = [0, 3 * size]
    (tmp_path / "x.idx").write_bytes(index([3, 2], code=code, pointers=pointers))
    (tmp_path / "x.bin").write_bytes(struct.pack(f"<5{letter}", *ids))
    found = read_binidx(tmp_path / "x")
    assert (found.tokens.tolist(), found.ends.tolist()) == (ids, [3, 5])


def test_documents_of_several_sequences(tmp_path):
    stem = pair(tmp_path, index([2, 3, 1], [0, 2, 3]), [1, 2, 3, 4, 0, 0])
    assert read_binidx(stem).ends.tolist() == [5, 6]


@pytest.mark.parametrize(
    ("sizes", "share", "train"),
    [
        ([10] * 10, 0.17, 80),
        ([50, 50], 0.1, 50),  # the end of all is nearer, but no border
        ([100], 0.1, 90),
        ([0, 100], 0.1, 90),
    ],
)
def test_the_last_documents_are_for_validation(sizes, share, train, tmp_path):
    corpus = TokenFiles.open(pair(tmp_path, index(sizes), list(range(100))), validation=share)
    assert (len(corpus.train), len(corpus.validation)) == (train, 100 - train)


@pytest.mark.parametrize(
    ("tokens", "closed"),
    [
        ([5, 0, 6, 7, 0, 8, 0], True),
        ([5, 0, 6, 7, 0, 8, 9], True),  # the end of all is a border in any case
        ([5, 0, 6, 7, 8, 8, 0], False),
        ([5, 4, 6, 7, 8, 8, 9], False),
    ],
)
def test_a_pair_knows_whether_its_documents_are_closed(tokens, closed, tmp_path):
    corpus = TokenFiles.open(pair(tmp_path, index([2, 0, 3, 2]), tokens), validation=0.2)
    assert corpus.closed == closed
    if closed:
        corpus.check_documents()
        return
    with pytest.raises(ValueError, match=r"x: its documents do not end .* token 0; .* data merge"):
        corpus.check_documents()


def test_of_many_documents_a_sample_is_looked_at(tmp_path):
    found = read_binidx(pair(tmp_path, index([2] * 100), [5, 6] * 100))
    assert unclosed(found, 0).tolist() == list(range(2, 200, 2))
    assert unclosed(found, 0, at_most=5).tolist() == [2, 50, 100, 150]


def test_an_end_without_end_of_text_is_a_sequence(tmp_path):
    with binidx_writer(tmp_path / "x", np.dtype("<u2"), end_of_text=0) as append:
        append(np.array([1, 0, 2]))
    assert decode(tmp_path / "x") == [[1, 0], [2]]


@pytest.mark.parametrize(
    ("about", "words"),
    [
        (b"", "not an .idx"),
        (index([3])[:20], "not an .idx"),
        (index([3], magic=b"TNTIDX\0\0\0"), "not an .idx"),
        (index([3], version=2), "version 2"),
        (index([3], code=0), "number type 0"),
        (index([3], code=6), "number type 6"),
        (index([3], code=7), "number type 7"),
        (index([3], code=9), "number type 9"),
        (index([3], counts=(2**60, 2)), "claims"),
        (index([3], counts=(1, 2**62)), "claims"),
        (index([3])[:-1], "claims"),
        (index([-3, 6]), "-3 tokens"),
        (index([3], pointers=[-8]), "do not follow"),
        (index([1, 2], pointers=[0, 0]), "do not follow"),
        (index([3], [0, 2]), "documents"),
        (index([3], [1, 1]), "documents"),
        (index([1, 2], [0, 2, 1]), "documents"),
        (index([3], [0, -1]), "documents"),
        (index([3], []), "documents"),
        (index([4]), "6 bytes"),
        (index([2]), "6 bytes"),
    ],
)
def test_damage_names_the_file(about, words, tmp_path):
    stem = pair(tmp_path, about, [1, 2, 0])
    with pytest.raises(ValueError, match=words) as caught:
        read_binidx(stem)
    assert str(stem) in str(caught.value)


@given(st.data())
def test_no_damaged_byte_is_more_than_a_refusal(data):
    """Whatever the header says: all of the file, or a ValueError that names it."""
    about = bytearray(index([2, 1]))
    about[data.draw(st.integers(0, len(about) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        stem = pair(Path(folder), bytes(about), [1, 2, 0])
        try:
            size = read_binidx(stem).tokens.nbytes
        except ValueError as error:
            named, size = str(stem) in str(error), 6
        else:
            named = True
        assert named and size == 6


def test_half_a_pair_is_none(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"\1\0")
    with pytest.raises(ValueError, match="both"):
        read_binidx(tmp_path / "x.bin")
    for name in ("x", "x.bin", "x.idx"):
        with pytest.raises(ValueError, match=f"{name}: no such pair; both a .bin and its .idx"):
            TokenFiles.open(tmp_path / name)
