"""Corpora on disk: opened as they were written, or refused."""

import os
from pathlib import Path

import numpy as np
import pytest
from tiny import small_bpe

from receptance.data import TokenFiles
from receptance.data.assemble import Division, Shard, assemble
from receptance.data.tokens import fingerprint
from receptance.tokenizer import ByteTokenizer, Tokenizer

TRAIN, VALIDATION = (np.arange(n, dtype=np.uint16) for n in (100, 7))


def write(folder: Path, train: np.ndarray, tokenizer: Tokenizer | None = None) -> TokenFiles:
    """A corpus folder with VALIDATION."""
    shards = [
        Shard("train", lambda: (train, None)),
        Shard("validation", lambda: (VALIDATION, None)),
    ]
    how = Division(end_of_text=0, vocab_size=256, masked=False, validation=0.1, seed=0)
    folder.mkdir(exist_ok=True)
    return assemble(folder, shards, how, tokenizer or ByteTokenizer(), {})


@pytest.fixture
def written(tmp_path) -> TokenFiles:
    return write(tmp_path / "data", TRAIN)


class TestTokenFiles:
    def test_round_trip(self, written, tmp_path):
        opened = TokenFiles.open(tmp_path / "data")
        assert np.array_equal(opened.train, TRAIN)
        assert np.array_equal(opened.validation, VALIDATION)
        assert opened.fingerprint == written.fingerprint
        assert opened.tokenizer is not None and opened.tokenizer.kind == "bytes"
        assert opened.train_mask is opened.validation_mask is None
        assert np.array_equal(np.load(tmp_path / "data/train.npy"), TRAIN)

    def test_the_fingerprint_knows_tokens_and_tokenizer(self, written, tmp_path):
        others = (write(tmp_path / "o", TRAIN, small_bpe()), write(tmp_path / "o", TRAIN + 1))
        assert len({corpus.fingerprint for corpus in (written, *others)}) == 3

    def test_the_fingerprint_of_much_is_that_of_samples(self):
        tokens = np.arange(5_000_000, dtype=np.uint32)
        whole = fingerprint([tokens], None)
        assert fingerprint([tokens[:-1]], None) != whole
        assert fingerprint([tokens.astype(np.int32)], None) != whole
        for place in (0, len(tokens) - 1):
            other = tokens.copy()
            other[place] += 1
            assert fingerprint([other], None) != whole

    @pytest.mark.usefixtures("written")
    def test_a_file_of_another_corpus_is_noticed(self, tmp_path):
        write(tmp_path / "other", TRAIN + 1)
        os.replace(tmp_path / "other/train.npy", tmp_path / "data/train.npy")
        with pytest.raises(ValueError, match=r"not the one that was written"):
            TokenFiles.open(tmp_path / "data")

    @pytest.mark.usefixtures("written")
    @pytest.mark.parametrize("name", ["train.npy", "validation.npy", "data.json"])
    @pytest.mark.parametrize("size", [None, 0, 5, 130])
    def test_damage_is_one_line(self, name, size, tmp_path):
        file = tmp_path / "data" / name
        if size is None:
            file.unlink()
        else:
            os.truncate(file, min(size, file.stat().st_size - 1))
        with pytest.raises(ValueError, match=r"^no readable token files in .*data") as caught:
            TokenFiles.open(tmp_path / "data")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "array", [np.zeros((2, 2), np.uint16), np.zeros(3), np.array([None]), np.array(["a"])]
    )
    def test_arrays_that_are_no_tokens_are_refused(self, array, tmp_path):
        np.save(tmp_path / "x.npy", array, allow_pickle=True)
        with pytest.raises(ValueError, match=r"x\.npy"):
            TokenFiles.open(tmp_path / "x.npy")

    def test_a_bare_array_is_divided_at_its_end(self, tmp_path):
        np.save(tmp_path / "x.npy", np.arange(1000, dtype=np.uint16))
        corpus = TokenFiles.open(tmp_path / "x.npy", validation=0.1, end_of_text=3)
        assert (len(corpus.train), len(corpus.validation), corpus.end_of_text) == (900, 100, 3)
        assert corpus.tokenizer is None
        assert np.concatenate([corpus.train, corpus.validation]).tolist() == list(range(1000))
        assert isinstance(corpus.train, np.memmap)
