"""Token files of every kind, put together as one corpus."""

import functools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from receptance.data import TokenFiles, merge
from receptance.data.assemble import Division, Shard, assemble, document_ends
from receptance.data.binidx import _write_index, binidx_writer
from receptance.data.ondisk import blocks
from receptance.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()


def stream(*documents: str) -> np.ndarray:
    return np.frombuffer("".join(d + "\0" for d in documents).encode(), np.uint8)


def documents(tokens: np.ndarray) -> list[str]:
    assert len(tokens) == 0 or tokens[-1] == 0
    return bytes(tokens.astype(np.uint8)).decode().split("\0")[:-1]


@pytest.fixture
def shards(tmp_path) -> Path:
    """A folder with a pair, an array, and an array that lacks its last end of text."""
    folder = tmp_path / "shards"
    folder.mkdir()
    np.save(folder / "b.npy", stream(*(f"b {n}" for n in range(20))))
    np.save(folder / "c.npy", stream(*(f"c {n}" for n in range(20)))[:-1])
    with binidx_writer(folder / "a", np.dtype("<u2"), end_of_text=0) as append:
        append(stream(*(f"a {n}" for n in range(20))))
    return folder


def test_every_document_is_there_in_order(shards, tmp_path):
    corpus = merge([shards], tmp_path / "out", BYTES, validation=0.1)
    train, validation = documents(corpus.train), documents(corpus.validation)
    everything = [f"{letter} {n}" for letter in "abc" for n in range(20)]
    assert sorted(train + validation) == sorted(everything)
    assert train == [d for d in everything if d not in validation]
    assert 4 <= len(validation) <= 6
    assert corpus.train.dtype == np.uint16
    assert TokenFiles.open(tmp_path / "out").fingerprint == corpus.fingerprint


def test_corpora_keep_what_they_validate_on(shards, tmp_path):
    merge([shards / "b.npy"], tmp_path / "one", BYTES, validation=0.2)
    one = TokenFiles.open(tmp_path / "one")
    both = merge([tmp_path / "one", shards / "a.idx"], tmp_path / "two", BYTES)
    assert np.array_equal(both.validation[: len(one.validation)], one.validation)
    assert np.array_equal(both.train[: len(one.train)], one.train)
    again = merge([tmp_path / "two"], tmp_path / "three", BYTES, layout="binidx")
    assert np.array_equal(again.train, both.train)
    assert np.array_equal(again.validation, both.validation)


def test_what_is_there_is_not_replaced(shards, tmp_path):
    for taken in (shards, shards / "b.npy"):
        with pytest.raises(ValueError, match="not an empty folder"):
            merge([shards], taken, BYTES)


@pytest.mark.parametrize(("id", "dtype"), [(300, np.int32), (-1, np.int32), (2**63 + 5, np.uint64)])
def test_tokens_of_another_tokenizer(id, dtype, tmp_path):
    np.save(tmp_path / "x.npy", np.array([1, 2, id, 0], dtype))
    with pytest.raises(ValueError, match=f"a token id is {id} and the vocabulary 256"):
        merge([tmp_path / "x.npy"], tmp_path / "out", BYTES)
    assert list((tmp_path / "out").iterdir()) == []


def open_pair(folder: Path, texts: list[list[int]], dtype: str = "<u2") -> Path:
    """A pair with these documents, as Megatron's tools write it: nothing but the .idx divides."""
    np.array([id for text in texts for id in text], dtype).tofile(folder / "x.bin")
    _write_index(folder / "x.idx", np.dtype(dtype), np.array([len(text) for text in texts]))
    return folder / "x"


@pytest.mark.parametrize("closed", [set(), {1, 4, 19}, set(range(20))])
@pytest.mark.parametrize("layout", ["npy", "binidx"])
def test_documents_of_a_pair_are_closed(closed, layout, tmp_path, monkeypatch):
    monkeypatch.setattr("receptance.data.assemble.blocks", functools.partial(blocks, size=7))
    names = [f"a {n}" for n in range(20)]
    texts = [
        [*name.encode(), 0] if n in closed else [*name.encode()] for n, name in enumerate(names)
    ]
    pair = open_pair(tmp_path, [[], *texts[:9], [], [], *texts[9:]])
    corpus = merge([pair], tmp_path / "out", BYTES, validation=0.2, layout=layout)
    train, validation = documents(corpus.train), documents(corpus.validation)
    assert train == [name for name in names if name not in validation]
    assert sorted(train + validation) == sorted(names)
    assert 3 <= len(validation) <= 5
    corpus.check_documents()


class Large(ByteTokenizer):
    vocab_size, end_of_text = 301, 300


def test_an_end_of_text_that_the_numbers_of_a_pair_cannot_hold(tmp_path):
    pair = open_pair(tmp_path, [[1, 2], [3], [4, 5]], "i1")
    corpus = merge([pair], tmp_path / "out", Large(), validation=0.3)
    both = np.concatenate([corpus.train, corpus.validation]).tolist()
    assert sorted(both) == [1, 2, 3, 4, 5, 300, 300, 300]


def test_a_seed_beyond_all_generators(shards, tmp_path):
    with pytest.raises(ValueError, match="seed is 1000000000000000000000; it must be at least 0"):
        merge([shards], tmp_path / "out", BYTES, seed=10**21)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_tokens(tmp_path):
    with pytest.raises(ValueError, match=r"no \.npy or \.idx"):
        merge([tmp_path], tmp_path / "out", BYTES)


texts = st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=1, max_size=6)


@given(
    found=st.lists(texts, min_size=1, max_size=4),
    share=st.floats(0.05, 0.6),
    masked=st.booleans(),
)
def test_division_keeps_tokens_and_masks_together(found, share, masked, tmp_path_factory):
    """A mask that is a function of the tokens stays that function, however it was divided."""

    def shard(texts: list[list[int]]) -> Shard:
        tokens = np.array([id for text in texts for id in [*text, 0]], np.uint16)
        mask = (tokens % 2 == 0).astype(np.uint8) if masked else None
        return Shard("drawn", lambda: (tokens, mask))

    how = Division(
        end_of_text=0, vocab_size=256, masked=masked, validation=share, seed=0, layout="npy"
    )
    total = sum(len(text) + 1 for texts in found for text in texts)
    folder = tmp_path_factory.mktemp("out")
    corpus = assemble(folder, [shard(texts) for texts in found], how, BYTES, {})
    both = np.concatenate([corpus.train, corpus.validation])
    added = len(both) - total
    assert added in (0, 1), "at most one document is cut, and its front closed"
    wanted = [id for texts in found for text in texts for id in text]
    assert sorted(both[both > 0]) == sorted(wanted)
    if masked:
        masks = np.concatenate([corpus.train_mask, corpus.validation_mask])
        assert np.count_nonzero(masks != (both % 2 == 0)) == added


@given(st.lists(st.integers(0, 3), max_size=60))
def test_document_ends(ids):
    wanted = [n + 1 for n, id in enumerate(ids) if id == 0 or n + 1 == len(ids)]
    assert document_ends(np.array(ids, np.uint16), 0).tolist() == wanted
