"""From sources to a corpus: the same bits however the work was done."""

import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import filelock
import numpy as np
import pytest
from corpora import LINES, Stop, contents, documents, prepare_module, run, tokenized, write_lines
from rich.console import Console
from tiny import TEXT, small_bpe

from receptance.data import PrepareOptions, TokenFiles, is_corpus, prepare
from receptance.data.assemble import merge
from receptance.data.files import choose
from receptance.storage.lock import RunLock
from receptance.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer

SHARED = Path(__file__).parents[3] / "shared/data"


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


@pytest.mark.parametrize("workers", [1, 2])
def test_what_ends_a_text_is_kept_with_the_corpus(tmp_path, workers):
    (tmp_path / "a.txt").write_text(TEXT)
    told = BPETokenizer(small_bpe()._content, end_of_text="!")
    corpus = run(tmp_path / "a.txt", out=tmp_path / "out", tokenizer=told, workers=workers)
    again = TokenFiles.open(tmp_path / "out")
    assert again.tokenizer.fingerprint == told.fingerprint != small_bpe().fingerprint
    assert corpus.train[-1] == again.end_of_text == told.end_of_text != small_bpe().end_of_text


def test_a_corpus_goes_with_its_tokenizer_in_other_bytes(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    corpus = run(tmp_path / "a.txt", out=tmp_path / "out", tokenizer=small_bpe())
    indented = BPETokenizer(json.dumps(json.loads(small_bpe()._content), indent=2).encode())
    merged = merge([tmp_path / "out"], tmp_path / "merged", indented)
    assert merged.train.tolist() == corpus.train.tolist()
    with pytest.raises(ValueError, match="was made with another tokenizer, a bpe"):
        merge([tmp_path / "out"], tmp_path / "other", small_bpe(290))


def test_the_tokenizer_of_bytes_takes_any_encoding(tmp_path):
    text = bytes(range(1, 256)) * 9
    (tmp_path / "latin.txt").write_bytes(text)
    corpus = run(tmp_path / "latin.txt", out=tmp_path / "out", skip_bad=True)
    sides = [
        corpus.tokenizer.decode_bytes(x[:-1].tolist()) for x in (corpus.train, corpus.validation)
    ]
    assert b"".join(sides) == text


@pytest.fixture(params=["bpe", "bpe:280", "world", "pile"])
def of_text(request) -> Tokenizer | str:
    """A tokenizer of text."""
    if request.param.startswith("bpe"):
        return small_bpe() if request.param == "bpe" else request.param
    name = "20B_tokenizer.json" if request.param == "pile" else "rwkv_vocab_v20230424.txt"
    if not (SHARED / name).exists():
        pytest.skip(f"{name} is not here")
    return load_tokenizer(SHARED / name)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("name", ["b.txt", "b.txt.gz"])
@pytest.mark.parametrize("size", [5, 3000], ids=["in one piece", "in many"])
def test_one_file_among_many_that_is_not_utf_8(name, size, of_text, tmp_path):
    """It is named, or left out as a whole, whatever bytes the vocabulary has tokens for."""
    for other in ("a.txt", "c.txt"):
        (tmp_path / other).write_text(TEXT)
    latin = b"line\n" * size + "ü".encode("latin-1")
    (tmp_path / name).write_bytes(gzip.compress(latin) if name.endswith("gz") else latin)
    with pytest.raises(
        ValueError, match=rf"{name} is not UTF-8: it has the byte 0xfc, .* skip_bad"
    ):
        run(tmp_path, out=tmp_path / "out", tokenizer=of_text)
    corpus = run(tmp_path, out=tmp_path / "out", tokenizer=of_text, skip_bad=True)
    found = [corpus.tokenizer.decode(x.tolist()) for x in (corpus.train, corpus.validation)]
    assert "line" not in "".join(found)
    text = "".join(found).replace("<|endoftext|>", "").replace("\0", "")
    assert sorted(text) == sorted(2 * TEXT)
    about = json.loads((tmp_path / "out/data.json").read_text())
    assert (about["skipped"], about["files_left_out"]) == (1, {"not UTF-8": 1})


@pytest.mark.usefixtures("small_pieces")
def test_a_text_that_was_left_out_is_not_left_out_when_nobody_asks_for_it(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_bytes(b"line\n" * 300 + b"\xfc")
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "assemble", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tmp_path, out=tmp_path / "out", tokenizer=small_bpe(), skip_bad=True)
    with pytest.raises(ValueError, match=r"b\.txt is not UTF-8"):
        run(tmp_path, out=tmp_path / "out", tokenizer=small_bpe())
    assert not (tmp_path / "out/data.json").exists()


def test_no_character_is_cut_in_half(tmp_path):
    """Where a text without lines is divided, for validation."""
    for n in range(3):
        (tmp_path / "a.txt").write_text("x" * n + "狐" * 400)
        corpus = run(tmp_path / "a.txt", out=tmp_path / f"out{n}", tokenizer=small_bpe())
        sides = [small_bpe().decode(x[:-1].tolist()) for x in (corpus.train, corpus.validation)]
        assert "".join(sides) == "x" * n + "狐" * 400 and "\ufffd" not in "".join(sides)


@pytest.mark.usefixtures("small_pieces")
def test_a_byte_order_mark_is_no_text(tmp_path):
    marked, plain = tmp_path / "marked", tmp_path / "plain"
    lines = "".join(json.dumps(record) + "\n" for record in LINES)
    files = {
        "a.txt": TEXT,
        "b.jsonl": lines,
        "c.json": json.dumps(LINES),
        "d.txt.gz": TEXT[:900],
        "e.jsonl.gz": lines,
        "f.json.gz": json.dumps(LINES),
    }
    for folder, mark in ((marked, b"\xef\xbb\xbf"), (plain, b"")):
        folder.mkdir()
        for name, text in files.items():
            content = mark + text.encode()
            (folder / name).write_bytes(gzip.compress(content) if "gz" in name else content)
    for tokenizer in ("bytes", small_bpe(), "bpe:280"):
        found, wanted = (
            run(folder, out=folder / f"out-{tokenizer}", tokenizer=tokenizer, validation=0.3)
            for folder in (marked, plain)
        )
        for side in ("train", "validation"):
            text = found.tokenizer.decode(getattr(found, side).tolist())
            assert "\ufeff" not in text
            assert wanted.tokenizer.vocab_size == found.tokenizer.vocab_size
        total = [len(corpus.train) + len(corpus.validation) for corpus in (found, wanted)]
        assert total[0] == pytest.approx(total[1], rel=0.01)


def test_files_that_are_no_text_are_said_and_counted(tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "a.txt").write_text(TEXT)
    (folder / "b.txt").write_text(TEXT, encoding="utf-16")
    (folder / "c.txt").write_text(TEXT, encoding="utf-16")
    (folder / "d.png").write_bytes(b"\x89PNG\0\0")
    (folder / "e.txt").symlink_to("nothing")
    (folder / "f.json").write_text('{"name": "package"}')
    (folder / "g").symlink_to(tmp_path, target_is_directory=True)
    os.mkfifo(folder / "h.txt")
    (folder / ".hidden").write_bytes(b"\0")
    console = Console(file=(said := io.StringIO()), width=1000)
    options = PrepareOptions(workers=0, validation=0.1)
    prepare([str(folder)], tmp_path / "out", "bytes", options, console)
    lines = [line for line in said.getvalue().splitlines() if "left out" in line]
    assert lines == [
        "files left out: 7 (UTF-16: 2, binary data: 1, a link to nothing: 1, a JSON document: 1, "
        f"a link to a folder: 1, a named pipe: 1), the first is {folder}/b.txt"
    ]
    about = json.loads((tmp_path / "out/data.json").read_text())
    assert about["skipped"] == 7 and about["files_left_out"]["UTF-16"] == 2


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


@pytest.mark.slow
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


def test_a_corpus_that_is_there_is_opened_not_made(sources, tmp_path, monkeypatch):
    first = run(*sources, out=tmp_path / "out")
    monkeypatch.setattr(prepare_module, "tokenize_piece", lambda *_: pytest.fail("it is there"))
    monkeypatch.setattr(prepare_module, "assemble", lambda *_: pytest.fail("it is there"))
    assert run(*sources, out=tmp_path / "out").fingerprint == first.fingerprint
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
def test_a_full_disk_names_the_file(sources, tmp_path, monkeypatch):
    def full(file: int) -> None:
        with open("/dev/full", "wb", buffering=0) as device:
            device.write(b"x")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ValueError, match=r"cannot write .*out/parts/plan.json: No space left"):
            run(*sources, out=tmp_path / "out")
    assert run(*sources, out=tmp_path / "out").fingerprint


class TestLeftovers:
    """The parts of a corpus that is there, left by a call that was killed at its very end."""

    @pytest.fixture
    def parts(self, sources, tmp_path) -> Path:
        run(*sources, out=tmp_path / "out")
        (tmp_path / "out/parts").mkdir()
        (tmp_path / "out/parts/00000000.tokens").write_bytes(b"x")
        return tmp_path / "out/parts"

    def test_they_are_removed(self, parts, sources, tmp_path):
        run(*sources, out=tmp_path / "out")
        assert not parts.exists()
        run(*sources, out=tmp_path / "new")
        assert contents(tmp_path / "out") == contents(tmp_path / "new")

    def test_not_while_another_process_holds_them(self, parts, sources, tmp_path):
        with filelock.FileLock(parts / ".lock"):
            assert run(*sources, out=tmp_path / "out").fingerprint
            assert (parts / "00000000.tokens").exists()

    def test_they_are_removed_inside_the_lock(self, parts, sources, tmp_path, monkeypatch):
        real, held = prepare_module.shutil.rmtree, []

        def watching(folder, **how):
            with pytest.raises(ValueError, match="in use"), RunLock(folder):
                pass
            held.append(folder)
            real(folder, **how)

        monkeypatch.setattr(prepare_module.shutil, "rmtree", watching)
        run(*sources, out=tmp_path / "out")
        run(*sources, out=tmp_path / "new")
        assert held == [parts, tmp_path / "new/parts"]


def test_a_corpus_that_another_process_has_just_made_is_opened(sources, tmp_path, monkeypatch):
    """It appears after this call looked for it and before it holds the lock."""
    wanted = run(*sources, out=tmp_path / "out")
    made = tmp_path / "out/data.json"
    content = made.read_bytes()
    made.unlink()
    monkeypatch.setattr(prepare_module, "_check_free", lambda folder: made.write_bytes(content))
    monkeypatch.setattr(prepare_module, "tokenize_piece", lambda *rest: 1 / 0)
    assert run(*sources, out=tmp_path / "out").fingerprint == wanted.fingerprint
    assert not (tmp_path / "out/parts").exists()


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_text_is_what_follows_its_byte_order_mark(name, tmp_path):
    content = b"\xef\xbb\xbf" + TEXT.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    corpus = run(tmp_path / name, out=tmp_path / "out")
    assert "".join(documents(corpus.train) + documents(corpus.validation)) == TEXT
    about = json.loads((tmp_path / "out/data.json").read_text())
    assert about["text_bytes"] == len(TEXT.encode())
