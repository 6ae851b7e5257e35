"""From sources to a corpus: the same bits however the work was done."""

import os
from collections.abc import Callable

import filelock
import numpy as np
import pytest
from corpora import LINES, Stop, contents, documents, prepare_module, run, tokenized, write_lines
from tiny import TEXT, small_bpe

from receptance.data import PrepareOptions, TokenFiles, is_corpus
from receptance.data.files import choose
from receptance.tokenizer import ByteTokenizer


def test_text_is_divided_and_each_document_closed(tmp_path):
    texts = [TEXT[n * 50 : n * 70 + 40].encode() for n in range(1, 30)]
    for n, text in enumerate(texts):
        (tmp_path / f"{n:02}.txt").write_bytes(text)
    corpus = run(*sorted(tmp_path.glob("*.txt")), out=tmp_path / "out", tokenizer=small_bpe())
    chosen, cut = choose(np.array([len(text) for text in texts]), 0.1, seed=0)
    assert cut is None
    kept = [text for n, text in enumerate(texts) if n in chosen]
    others = [text for n, text in enumerate(texts) if n not in chosen]
    assert corpus.train.tolist() == tokenized(others, small_bpe())
    assert corpus.validation.tolist() == tokenized(kept, small_bpe())


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:280"])
def test_text_is_bytes_whatever_the_encoding(tokenizer, tmp_path):
    text = bytes(range(1, 256)) * 9
    (tmp_path / "latin.txt").write_bytes(text)
    corpus = run(tmp_path / "latin.txt", out=tmp_path / "out", tokenizer=tokenizer)
    sides = [
        corpus.tokenizer.decode_bytes(x[:-1].tolist()) for x in (corpus.train, corpus.validation)
    ]
    assert b"".join(sides) == text
    assert corpus.validation_bytes == len(sides[1])


@pytest.mark.usefixtures("small_pieces")
def test_every_kind_of_source(sources, tmp_path):
    corpus = run(*sources, out=tmp_path / "out")
    found = documents(corpus.train) + documents(corpus.validation)
    assert "" not in found, "empty files are left out"
    assert {"packed", "two"} | {r["text"] for r in LINES} <= set(found)
    wanted = TEXT + TEXT[:1000] + "ein anderer Text\n" * 20 + "packedtwo"
    wanted += "".join(r["text"] for r in LINES)
    assert len("".join(found)) == len(wanted)


def test_a_bpe_is_trained_on_the_training_text_alone(tmp_path):
    (tmp_path / "a.txt").write_text("abc abd\n" * 90 + "xyzzy " * 20)
    corpus = run(tmp_path / "a.txt", out=tmp_path / "out", tokenizer="bpe:280")
    assert corpus.tokenizer is not None
    assert len(corpus.tokenizer.encode(" abd")) == 1
    assert len(corpus.tokenizer.encode("xyzzy")) == 5


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("stops", [[0], [1], [3, 4], [9, 1, 1]])
def test_interruptions_change_nothing(sources, stops, tmp_path, monkeypatch):
    run(*sources, out=tmp_path / "whole")
    done: list[int] = []
    real = prepare_module.tokenize_piece

    def run_some(count: int) -> None:
        def stopping(piece, *rest):
            nonlocal count
            if count == 0:
                raise Stop
            count -= 1
            done.append(piece.index)
            return real(piece, *rest)

        monkeypatch.setattr(prepare_module, "tokenize_piece", stopping)
        run(*sources, out=tmp_path / "stopped")

    for stop in stops:
        with pytest.raises(Stop):
            run_some(stop)
        assert not (tmp_path / "stopped/data.json").exists()
    run_some(-1)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    assert len(done) == len(set(done)), "nothing was done twice"


@pytest.mark.usefixtures("small_pieces")
def test_a_damaged_part_is_done_again(sources, tmp_path, monkeypatch):
    run(*sources, out=tmp_path / "whole")
    monkeypatch.setattr(prepare_module, "assemble", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(*sources, out=tmp_path / "cut")
    monkeypatch.undo()
    parts = tmp_path / "cut/parts"
    os.truncate(parts / "00000001.tokens", 3)
    (parts / "00000002.json").write_text("{")
    monkeypatch.setattr("receptance.data.sources.PIECE_BYTES", 700)
    monkeypatch.setattr("receptance.data.plan.PIECE_BYTES", 700)
    run(*sources, out=tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("small_pieces")
def test_processes_change_nothing(sources, tmp_path):
    alone = run(*sources, out=tmp_path / "alone", tokenizer=small_bpe())
    together = run(*sources, out=tmp_path / "together", tokenizer=small_bpe(), workers=2)
    assert together.fingerprint == alone.fingerprint
    assert contents(tmp_path / "together") == contents(tmp_path / "alone")


def test_processes_are_as_many_as_usable_cpus(sources, tmp_path, monkeypatch):
    asked = []

    def in_this_process(pieces, job, workers):
        asked.append(workers)
        return map(job, pieces)

    monkeypatch.setattr(prepare_module, "in_processes", in_this_process)
    monkeypatch.setattr(prepare_module, "available_cpus", lambda: 3)
    run(*sources, out=tmp_path / "little", workers=None)
    monkeypatch.setattr(prepare_module, "_WORTH_WORKERS", 0)
    run(*sources, out=tmp_path / "much", workers=None)
    assert asked == [3], "little text is not worth processes"


def test_an_error_in_a_process_is_one_line(tmp_path):
    write_lines(tmp_path / "a.jsonl", [*LINES, {"txt": 1}])
    with pytest.raises(ValueError, match=r"a\.jsonl, line 51: no field 'text'; there are txt"):
        run(tmp_path / "a.jsonl", out=tmp_path / "out", workers=1)


def test_a_corpus_that_is_there_is_opened_not_made(sources, tmp_path):
    first = run(*sources, out=tmp_path / "out")
    before = (tmp_path / "out/train.npy").stat().st_mtime_ns
    assert run(*sources, out=tmp_path / "out").fingerprint == first.fingerprint
    assert (tmp_path / "out/train.npy").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="other sources or options"):
        run(*sources, out=tmp_path / "out", seed=1)


@pytest.fixture
def unfinished(sources, tmp_path, monkeypatch) -> Callable[..., TokenFiles]:
    """Go on, perhaps with other options, with work that only lacks the last step."""
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "assemble", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*sources, out=tmp_path / "out")
    return lambda *names, **options: run(*(names or sources), out=tmp_path / "out", **options)


class TestOtherWork:
    """Parts of one plan are never mixed with those of another."""

    @pytest.mark.parametrize(
        ("name", "before", "now"),
        [
            ("seed", 0, 1),
            ("text_field", "text", "content"),
            ("template", None, "world"),
            ("validation", 0.1, 0.2),
            ("format", "npy", "binidx"),
        ],
    )
    def test_options(self, name, before, now, unfinished):
        with pytest.raises(ValueError, match=f"work, but {name} was {before} and is {now}"):
            unfinished(**{name: now})

    def test_tokenizer(self, unfinished):
        with pytest.raises(ValueError, match="tokenizer was"):
            unfinished(tokenizer=small_bpe())

    def test_files(self, unfinished, sources):
        with pytest.raises(ValueError, match="sources are others"):
            unfinished(sources[0] / "a.txt")

    def test_a_changed_file(self, unfinished, sources):
        (sources[0] / "a.txt").write_text("new")
        with pytest.raises(ValueError, match=r"a\.txt has changed since"):
            unfinished()

    def test_a_damaged_plan(self, unfinished, tmp_path):
        (tmp_path / "out/parts/plan.json").write_text("[]")
        with pytest.raises(ValueError, match=r"plan\.json is damaged"):
            unfinished()

    def test_two_at_once(self, unfinished, tmp_path):
        with (
            filelock.FileLock(tmp_path / "out/parts/.lock"),
            pytest.raises(ValueError, match="in use by another process"),
        ):
            unfinished()


def test_a_file_that_shrinks_is_named(sources, tmp_path, monkeypatch):
    real = prepare_module.cut_pieces

    def shrinking(*args):
        pieces = real(*args)
        os.truncate(sources[0] / "a.txt", 10)
        return pieces

    monkeypatch.setattr(prepare_module, "cut_pieces", shrinking)
    with pytest.raises(ValueError, match=r"a\.txt changed while it was read: 10 bytes"):
        run(*sources, out=tmp_path / "out")


def test_a_folder_that_cannot_be_written_is_named(sources, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write .*file"):
        run(*sources, out=tmp_path / "file/out")


@pytest.mark.parametrize("name", ["train.npy", "validation.idx", "tokenizer.json"])
def test_files_that_are_in_the_way_are_left_alone(name, sources, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("precious")
    with pytest.raises(ValueError, match="in the way"):
        run(*sources, out=tmp_path / "out")
    assert contents(tmp_path / "out") == {name: b"precious"}


def test_tokens_are_no_text(sources, tmp_path):
    run(*sources, out=tmp_path / "out")
    assert is_corpus(tmp_path / "out")
    assert not is_corpus(sources[0])
    for name in (tmp_path / "out", tmp_path / "out/train.npy"):
        with pytest.raises(ValueError, match="receptance data merge"):
            run(*sources, name, out=tmp_path / "other")


def test_an_unknown_template_is_refused_at_once():
    with pytest.raises(ValueError, match="worlds"):
        PrepareOptions(template="worlds")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workers": -1}, "workers"),
        ({"validation": 0}, "between 0 and 1"),
        ({"format": "tar"}, "npy, binidx"),
        ({"seed": -1}, r"seed is -1; it must be at least 0 and less than 2\*\*32"),
        ({"seed": 1 << 32}, "seed is 4294967296"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(ValueError, match=words):
        PrepareOptions(**options)


def test_pairs_for_rwkv_lm(sources, tmp_path):
    plain = run(*sources, out=tmp_path / "plain")
    pairs = run(*sources, out=tmp_path / "pairs", format="binidx")
    assert np.array_equal(pairs.train, plain.train)
    assert np.array_equal(pairs.validation, plain.validation)
    names = {"train.bin", "train.idx", "validation.bin", "validation.idx", "data.json"}
    assert set(contents(tmp_path / "pairs")) == names
    assert TokenFiles.open(tmp_path / "pairs/train").tokenizer is None


@pytest.mark.parametrize(("format", "dtype"), [("npy", np.uint32), ("binidx", np.int32)])
def test_a_large_vocabulary_has_wider_numbers(format, dtype, tmp_path):
    class Large(ByteTokenizer):
        vocab_size = (1 << 16) + 1

    (tmp_path / "a.txt").write_text(TEXT)
    how = {"out": tmp_path / "out", "tokenizer": Large(), "format": format}
    assert run(tmp_path / "a.txt", **how).train.dtype == dtype


def test_the_same_command_goes_on_although_its_output_is_among_its_sources(sources, tmp_path):
    first = run(sources[0], out=sources[0] / "corpus")
    assert run(sources[0], out=sources[0] / "corpus").fingerprint == first.fingerprint


def test_a_bpe_without_a_size_leaves_nothing_behind(sources, tmp_path):
    with pytest.raises(ValueError, match="'bpe:many': say how many"):
        run(*sources, out=tmp_path / "out", tokenizer="bpe:many")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a disk that is full")
def test_a_full_disk_names_the_folder(sources, tmp_path):
    (tmp_path / "out/parts").mkdir(parents=True)
    (tmp_path / "out/parts/00000000.tokens.partial").symlink_to("/dev/full")
    with pytest.raises(ValueError, match=r"cannot write .*out: No space left"):
        run(*sources, out=tmp_path / "out")
    assert run(*sources, out=tmp_path / "out").fingerprint
