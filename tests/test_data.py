"""Finding text, splitting it, its tokens on disk, and the order of training."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import small_bpe

from receptance.data import Batches, TokenFiles, find_files, read_documents, split, tokenize
from receptance.tokenizer import ByteTokenizer


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """Files of every kind; the working directory is its root."""
    for name, content in {
        "b.txt": b"b",
        "a.py": b"a",
        "sub/deep/c.txt": b"c",
        "sub/skip/d.txt": b"d",
        "sub/übung 1.txt": "ü".encode(),
        "sub/[x].txt": b"x",
        ".hidden.txt": b"h",
        ".git/config.txt": b"g",
        "image.png": b"\x89PNG\0\0",
        "latin.txt": b"caf\xe9",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(*sources: str, exclude: tuple[str, ...] = ()) -> list[str]:
    return [path.name for path in find_files(sources, exclude)]


class TestFindFiles:
    ALL = ("a.py", "b.txt", "latin.txt", "[x].txt", "c.txt", "d.txt", "übung 1.txt")

    @pytest.mark.usefixtures("tree")
    def test_a_folder_gives_its_text_files_in_order(self):
        found = find_files(["."])
        assert found == sorted(found)
        assert sorted(names(".")) == sorted(self.ALL)

    def test_absolute_paths_are_no_different(self, tree):
        assert sorted(names(str(tree))) == sorted(self.ALL)

    @pytest.mark.usefixtures("tree")
    def test_globs(self):
        assert names("*.txt") == ["b.txt", "latin.txt"]
        assert names("sub/*/c.txt") == ["c.txt"]
        assert sorted(names("**/*.txt")) == sorted(set(self.ALL) - {"a.py"})

    @pytest.mark.usefixtures("tree")
    def test_a_file_with_wildcards_in_its_name(self):
        assert names("sub/[x].txt") == ["[x].txt"]

    @pytest.mark.usefixtures("tree")
    def test_named_files_are_taken_whatever_they_are(self):
        named = ["image.png", ".hidden.txt", "sub/übung 1.txt"]
        assert names(*named, exclude=("*",)) == ["image.png", ".hidden.txt", "übung 1.txt"]

    @pytest.mark.usefixtures("tree")
    def test_excluded_components(self):
        assert "d.txt" not in names(".", exclude=("skip",))
        assert names("**/*.txt", exclude=("sub", "l*")) == ["b.txt"]

    def test_components_above_the_source_do_not_count(self, tree):
        inside = tree / ".cache" / "skip"
        inside.mkdir(parents=True)
        (inside / "e.txt").write_text("e")
        for source in (inside, inside / "*.txt"):
            assert names(str(source), exclude=("skip",)) == ["e.txt"]

    def test_each_file_comes_once(self, tree):
        os.symlink("b.txt", tree / "link.txt")
        assert names("b.txt", "./b.txt", str(tree / "b.txt"), "*.txt") == ["b.txt", "latin.txt"]

    def test_the_home_directory(self, tree, monkeypatch):
        monkeypatch.setenv("HOME", str(tree))
        assert names("~/b.txt", "~/a.*") == ["b.txt", "a.py"]

    @pytest.mark.usefixtures("tree")
    @pytest.mark.parametrize("source", ["nothing.txt", "*.md", "bare", "no/*.txt", "image*", ".h*"])
    def test_a_source_without_text_is_named(self, source):
        Path("bare").mkdir()
        with pytest.raises(ValueError, match=r"^no ") as caught:
            find_files(["b.txt", source])
        assert source in str(caught.value)


def test_documents_are_bytes_whatever_the_encoding(tree):
    assert read_documents([tree / "latin.txt", tree / "b.txt"]) == [b"caf\xe9", b"b"]


def test_empty_files_are_left_out(tmp_path):
    for name, content in (("empty", b""), ("full", b"text")):
        (tmp_path / name).write_bytes(content)
    assert read_documents([tmp_path / "empty", tmp_path / "full"]) == [b"text"]
    with pytest.raises(ValueError, match=r"text is empty.*empty"):
        read_documents([tmp_path / "empty"])


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read.*gone"):
        read_documents([tmp_path / "gone"])


texts = st.lists(st.binary(min_size=1, max_size=400), min_size=1, max_size=12)
shares = st.floats(0.01, 0.6)


class TestSplit:
    @given(texts, shares, st.integers(0, 9))
    def test_every_byte_is_on_one_side(self, documents, share, seed):
        training, validation = split(documents, share, seed)
        halves = Counter(b"".join(training)) + Counter(b"".join(validation))
        assert halves == Counter(b"".join(documents))
        cut = Counter(training) - Counter(documents)
        ends = Counter(validation) - Counter(documents)
        assert sum(cut.values()) <= 1 and sum(ends.values()) <= 1
        for front, end in zip(cut, ends, strict=False):
            assert front + end in documents

    @given(texts, shares, st.integers(0, 9))
    def test_there_is_always_something_to_train_on(self, documents, share, seed):
        training, _ = split(documents, share, seed)
        assert any(training)

    @given(texts, shares, st.integers(0, 9))
    def test_it_depends_on_nothing_but_its_arguments(self, documents, share, seed):
        torch.manual_seed(len(documents))
        before = torch.get_rng_state()
        assert split(documents, share, seed) == split(list(documents), share, seed)
        assert torch.equal(torch.get_rng_state(), before)

    def test_the_seed_decides(self):
        documents = [bytes([n]) * 10 for n in range(50)]
        assert split(documents, 0.2, seed=0)[1] != split(documents, 0.2, seed=1)[1]

    @pytest.mark.parametrize("seed", range(5))
    def test_the_share_holds_for_many_documents(self, seed):
        documents = [b"x" * (10 + n) for n in range(200)]
        _, validation = split(documents, 0.1, seed)
        size = len(b"".join(validation)) / len(b"".join(documents))
        assert 0.09 < size <= 0.1

    @pytest.mark.parametrize("seed", range(5))
    def test_a_large_document_beside_a_small_one_is_not_given_away(self, seed):
        training, validation = split([b"line\n" * 2000, b"read me\n"], 0.1, seed)
        assert 0.8 < len(b"".join(training)) / 10_008 < 0.95
        assert 0.05 < len(b"".join(validation)) / 10_008 < 0.11

    def test_one_document_is_cut_between_lines(self):
        text = b"".join(b"line %d\n" % n for n in range(100))
        (training,), (validation,) = split([text], 0.1, seed=0)
        assert training + validation == text
        assert training.endswith(b"\n")
        assert 0.08 < len(validation) / len(text) < 0.13

    def test_one_long_line_is_cut_anywhere(self):
        (training,), (validation,) = split([b"x" * 1000], 0.1, seed=0)
        assert (len(training), len(validation)) == (900, 100)

    @pytest.mark.parametrize("share", [0, 1, -1, float("nan")])
    def test_a_share_outside_0_and_1_is_refused(self, share):
        with pytest.raises(ValueError, match="between 0 and 1"):
            split([b"text"], share, seed=0)


class TestTokenize:
    def test_an_end_of_text_closes_each_document(self):
        tokens = tokenize([b"ab", b"\xff"], ByteTokenizer())
        assert tokens.tolist() == [97, 98, 0, 255, 0]
        assert tokens.dtype == np.uint16

    @given(texts)
    def test_tokens_spell_the_documents(self, documents):
        bpe = small_bpe()
        tokens = tokenize(documents, bpe)
        ends = np.flatnonzero(tokens == bpe.end_of_text)
        pieces = np.split(tokens, ends + 1)[:-1]
        assert [bpe.decode_bytes(piece[:-1].tolist()) for piece in pieces] == documents

    def test_progress_counts_bytes(self):
        done: list[int] = []
        tokenize([b"abc", b"de"], ByteTokenizer(), done.append)
        assert done == [3, 2]

    def test_large_vocabularies_need_wider_numbers(self):
        class Large(ByteTokenizer):
            vocab_size = (1 << 16) + 1

        assert tokenize([b"a"], Large()).dtype == np.uint32

    def test_nothing_gives_nothing(self):
        assert len(tokenize([], ByteTokenizer())) == 0


class TestTokenFiles:
    @pytest.fixture
    def written(self, tmp_path) -> TokenFiles:
        train, validation = (np.arange(n, dtype=np.uint16) for n in (100, 7))
        return TokenFiles.write(tmp_path / "data", train, validation, b"a text", ByteTokenizer())

    def test_round_trip(self, written, tmp_path):
        opened = TokenFiles.open(tmp_path / "data")
        assert np.array_equal(opened.train, written.train)
        assert np.array_equal(opened.validation, written.validation)
        assert opened.validation_bytes == written.validation_bytes == 6
        assert opened.fingerprint == written.fingerprint
        assert (tmp_path / "data/validation.txt").read_bytes() == b"a text"

    def test_the_fingerprint_knows_tokens_and_tokenizer(self, written, tmp_path):
        prints = {written.fingerprint}
        for tokens, tokenizer in (
            (written.train, small_bpe()),
            (written.train + 1, ByteTokenizer()),
        ):
            other = TokenFiles.write(tmp_path / "o", tokens, written.validation, b"", tokenizer)
            prints.add(other.fingerprint)
        assert len(prints) == 3

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

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a disk that is full")
    def test_a_full_disk_names_the_folder(self, written, tmp_path):
        (tmp_path / "new").mkdir()
        os.symlink("/dev/full", tmp_path / "new/train.npy")
        with pytest.raises(ValueError, match=r"cannot write the tokens to .*new"):
            TokenFiles.write(
                tmp_path / "new", written.train, written.validation, b"", ByteTokenizer()
            )


class TestBatches:
    @given(
        length=st.integers(2, 60),
        context=st.integers(1, 10),
        batch=st.integers(1, 40),
        seed=st.integers(0, 3),
    )
    def test_every_window_comes_once_per_epoch(self, length, context, batch, seed):
        if length <= context:
            return
        tokens = np.arange(length, dtype=np.uint16)
        batches = Batches(tokens, context=context, batch=batch, seed=seed)
        wanted = [list(range(s, s + context)) for s in range(0, length - context, context)]
        assert batches.windows == len(wanted)
        steps = -(-3 * len(wanted) // batch)
        rows = [row for step in range(steps) for row in batches.at(step)[0].tolist()]
        for epoch in range(3):
            seen = rows[epoch * len(wanted) : (epoch + 1) * len(wanted)]
            assert sorted(seen) == wanted

    def test_targets_are_the_next_tokens(self):
        batches = Batches(np.arange(50, dtype=np.uint16), context=7, batch=3, seed=0)
        inputs, targets = batches.at(0)
        assert inputs.shape == targets.shape == (3, 7)
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(targets, inputs + 1)

    def test_a_batch_depends_on_seed_and_step_alone(self):
        tokens = np.arange(100, dtype=np.uint16)
        forward = Batches(tokens, context=5, batch=4, seed=1)
        backward = Batches(tokens, context=5, batch=4, seed=1)
        there = [forward.at(step)[0] for step in range(12)]
        back = [backward.at(step)[0] for step in reversed(range(12))][::-1]
        assert all(map(torch.equal, there, back))
        other = Batches(tokens, context=5, batch=4, seed=2)
        assert not all(torch.equal(other.at(step)[0], there[step]) for step in range(12))

    def test_epochs_differ_in_order(self):
        batches = Batches(np.arange(101, dtype=np.uint16), context=5, batch=20, seed=0)
        assert not torch.equal(batches.at(0)[0], batches.at(1)[0])
        assert (batches.epoch(0), batches.epoch(1)) == (0, 1)

    def test_the_global_generator_is_left_alone(self):
        before = torch.get_rng_state()
        Batches(np.arange(100, dtype=np.uint16), context=5, batch=4, seed=1).at(3)
        assert torch.equal(torch.get_rng_state(), before)

    def test_a_text_shorter_than_the_context_is_refused(self):
        with pytest.raises(ValueError, match="8 tokens and the context is 8"):
            Batches(np.arange(8, dtype=np.uint16), context=8, batch=1, seed=0)
        Batches(np.arange(9, dtype=np.uint16), context=8, batch=1, seed=0)
