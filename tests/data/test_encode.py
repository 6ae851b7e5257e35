"""Records to documents, whatever they come in, and every bad one named."""

from __future__ import annotations

import gzip
import json
import sys

import numpy as np
import pytest
from corpora import LINES, Stop, documents, prepare_module, run, write_lines
from tiny import TEXT

from receptance.data import ReadOptions, TokenFiles
from receptance.data.encode import _lines, tokenize_piece
from receptance.data.hub import read_stream
from receptance.data.sources import Range, cut_pieces, find_sources, read_range
from receptance.tokenizer import ByteTokenizer


def test_each_record_is_a_document(tmp_path):
    corpus = run(write_lines(tmp_path / "a.jsonl", LINES), out=tmp_path / "out")
    train, validation = documents(corpus.train), documents(corpus.validation)
    assert sorted(train + validation) == sorted(r["text"] for r in LINES)
    assert train == [r["text"] for r in LINES if r["text"] not in validation]  # in order
    assert 3 <= len(validation) <= 5


def test_few_long_records_are_cut(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"text": TEXT}, {"text": ""}, {"text": "b"}])
    corpus = run(tmp_path / "a.jsonl", out=tmp_path / "out")
    (front,), (short, end) = documents(corpus.train), documents(corpus.validation)
    assert front + end == TEXT or front + short == TEXT
    assert "b" in (short, end)
    assert 0.09 < len(corpus.validation) / (len(corpus.train) + len(corpus.validation)) < 0.11


BAD = [
    (b"{", "not JSON"),
    (b"[1]", "a list, not an object"),
    (b"{}", "no field 'text'; there are none"),
    (b'{"Text": "a"}', "no field 'text'; there are Text; set text_field to one of them"),
    (b'{"text": 5}', "field 'text' is int, not a text"),
    (b'{"text": null}', "NoneType"),
    (b'{"text": "\xff"}', "not UTF-8"),
    (b'{"prompt": "a", "response": "b"}', "say with template= how"),
    (b"[" * 100_000, "not JSON"),
]


@pytest.mark.parametrize(("line", "words"), BAD, ids=[words for _, words in BAD])
@pytest.mark.parametrize("packed", [False, True])
def test_a_bad_line_is_named_or_left_out(line, words, packed, tmp_path, monkeypatch):
    monkeypatch.setattr("receptance.data.sources.PIECE_BYTES", 100)
    good = b"".join(b'{"text": "line %d"}\n' % n for n in range(30))
    path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    content = good + b"\n" + line + b"\n" + good
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(ValueError) as caught:
        run(path, out=tmp_path / "out")
    assert f"{path}, line 32: " in str(caught.value)
    assert words in str(caught.value) and "set skip_bad to leave" in str(caught.value)
    corpus = run(path, out=tmp_path / "out", skip_bad=True)  # goes on with what was done
    assert len(documents(corpus.train)) + len(documents(corpus.validation)) == 60
    assert json.loads((tmp_path / "out/data.json").read_text())["skipped"] == 1


def test_nothing_but_bad_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text("{\n{\n")
    with pytest.raises(ValueError, match="no document was left"):
        run(tmp_path / "a.jsonl", out=tmp_path / "out", skip_bad=True)
    assert not (tmp_path / "out/data.json").exists()


def test_another_field(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"content": n, "text": 0} for n in "abcdefghijkl"])
    corpus = run(tmp_path / "a.jsonl", out=tmp_path / "out", text_field="content")
    assert sorted(documents(corpus.train) + documents(corpus.validation)) == list("abcdefghijkl")


def test_half_a_character_pair_is_text_as_elsewhere(tmp_path):
    """JSON can hold what UTF-8 cannot; tokenizers have an answer to it."""
    (tmp_path / "a.jsonl").write_text('{"text": "' + "\\ud800" * 100 + '"}\n')
    corpus = run(tmp_path / "a.jsonl", out=tmp_path / "out")
    assert bytes(corpus.train[:3].tolist()) == "\ud800".encode("utf-8", "surrogatepass")
    run(tmp_path / "a.jsonl", out=tmp_path / "bpe", tokenizer="bpe:258")


def test_examples_get_masks(tmp_path):
    records = [{"prompt": f"What is {n}?", "response": f"It is {n}."} for n in range(20)]
    path = write_lines(tmp_path / "a.jsonl", [*records, *LINES])
    corpus = run(path, out=tmp_path / "out", template="world")
    opened = TokenFiles.open(tmp_path / "out")
    for part in ("train", "validation"):
        tokens, mask = getattr(corpus, part), getattr(corpus, f"{part}_mask")
        assert mask.dtype == np.uint8 and len(mask) == len(tokens)
        assert np.array_equal(getattr(opened, f"{part}_mask"), mask)
        assert (mask[tokens == 0] == 1).all(), "where a document ends is learned"
        learned = bytes(np.where(mask, tokens, 32).astype(np.uint8)).decode()
        for n, text in enumerate(documents(tokens)):
            if "What is" in text:
                number = text.split("What is ")[1].split("?")[0]
                answer = learned.split("\0")[n]
                assert f"It is {number}." in answer and "What" not in answer


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_template_makes_examples_whatever_else_records_hold(ending, tmp_path):
    """As those of Alpaca, which have the whole in a field "text" as well."""
    pairs = [{"instruction": f"Add {n}.", "input": "", "output": f"{n}."} for n in range(20)]
    plain = run(write_lines(tmp_path / "a.jsonl", pairs), out=tmp_path / "a", template="world")
    full = [{"text": "Below is an instruction.", **pair} for pair in pairs]
    if ending == "jsonl":
        path = write_lines(tmp_path / "b.jsonl", full)
    else:
        pa = pytest.importorskip("pyarrow")
        path = tmp_path / "b.parquet"
        pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(full), path)
    corpus = run(path, out=tmp_path / "b", template="world")
    assert corpus.fingerprint == plain.fingerprint
    texts = run(path, out=tmp_path / "texts")
    assert set(documents(texts.train)) == {"Below is an instruction."}


def test_lines_as_windows_writes_them(tmp_path):
    """A byte order mark in front, carriage returns at the ends, and lines without text."""
    lines = [json.dumps(record).encode() for record in [*LINES, {"text": ""}]]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([*lines, b"", b"  "]))
    found = run(tmp_path / "a.jsonl", out=tmp_path / "out")
    wanted = run(write_lines(tmp_path / "b.jsonl", LINES), out=tmp_path / "lines")
    assert found.fingerprint == wanted.fingerprint


@pytest.mark.parametrize("name", ["a.json", "A.JSON", "a.json.gz"])
def test_a_list_in_json_holds_records(name, tmp_path):
    content = json.dumps([*LINES, {"text": ""}], indent=1).encode()
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    wanted = run(write_lines(tmp_path / "b.jsonl", LINES), out=tmp_path / "lines")
    for source in (path, tmp_path / "in", f"{tmp_path}/in/*"):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        assert run(source, out=out).fingerprint == wanted.fingerprint


@pytest.mark.parametrize(
    ("content", "words", "left"),
    [
        ('[{"text": "a"}, {"text": "b"}, 5]', r"a\.json, row 3: a int, not an object", 2),
        ('[{"text": "a"}, {"text": "b"}, {"text": 5}]', r"a\.json, row 3: field 'text' is int", 2),
        ('[{"text": "a"}', r"a\.json: not JSON", 0),
        ('[{"text": "a"}] 7', r"a\.json: not JSON", 0),
    ],
)
def test_a_list_that_is_damaged_is_named_or_left_out(content, words, left, tmp_path):
    (tmp_path / "a.json").write_text(content)
    write_lines(tmp_path / "b.jsonl", LINES)
    with pytest.raises(ValueError, match=words):
        run(tmp_path, out=tmp_path / "out")
    corpus = run(tmp_path, out=tmp_path / "out", skip_bad=True)
    assert len(documents(corpus.train)) + len(documents(corpus.validation)) == len(LINES) + left
    assert json.loads((tmp_path / "out/data.json").read_text())["skipped"] == 1


def test_a_packed_list_is_not_read_beyond_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("receptance.data.files.LIST_BYTES", 5000)
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(json.dumps(LINES * 9).encode()))
    with pytest.raises(ValueError, match=r"a\.json\.gz is a list .* more than 5,000 bytes"):
        run(path, out=tmp_path / "out")


class Block(bytes):
    """What is read of a file; it counts the bytes that are copied when it is added to others, and
    those that are searched."""

    handled = 0

    def __add__(self, other):
        return Block.counted(bytes(self) + other)

    def __radd__(self, other):
        return Block.counted(other + bytes(self))

    def __contains__(self, byte):
        Block.handled += len(self)
        return byte in bytes(self)

    @classmethod
    def counted(cls, content: bytes) -> Block:
        cls.handled += len(content)
        return cls(content)


def test_a_long_line_is_read_once(tmp_path, monkeypatch):
    """Its blocks are joined once, and not whenever one more has been read."""
    monkeypatch.setattr("receptance.data.sources.CHUNK_BYTES", 16)
    monkeypatch.setattr(Block, "handled", 0)
    monkeypatch.setattr("receptance.data.encode.read_range", lambda x: map(Block, read_range(x)))
    path = write_lines(tmp_path / "a.jsonl", [{"text": "狐" * 20_000}, {"text": "b"}])
    source = find_sources([str(path)])[0]
    rows = list(_lines(Range(source, 0, source.size, source.size)))
    assert b"\n".join(row.content for row in rows) + b"\n" == path.read_bytes()
    assert Block.handled <= 2 * source.size


# ---- parquet and data sets ----------------------------------------------------------------------


@pytest.mark.usefixtures("small_pieces")
def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pa.Table.from_pylist([{**r, "other": n} for n, r in enumerate(LINES)])
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=9)
    corpus = run(tmp_path, out=tmp_path / "out")
    lines = run(write_lines(tmp_path / "a.jsonl", LINES), out=tmp_path / "lines")
    assert np.array_equal(corpus.train, lines.train)
    table = pa.Table.from_pylist([*LINES, {"text": None}])
    parquet.write_table(table, tmp_path / "b.parquet", row_group_size=9)
    with pytest.raises(ValueError, match=r"b\.parquet, row 51: field 'text' is NoneType"):
        run(tmp_path / "b.parquet", out=tmp_path / "bad")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(ValueError, match=r"cannot read .*c\.parquet"):
        run(tmp_path / "c.parquet", out=tmp_path / "bad")


@pytest.mark.usefixtures("small_pieces")
def test_saved_data_sets(datasets, tmp_path):
    rows = datasets.Dataset.from_list(LINES)
    rows.save_to_disk(tmp_path / "rows")
    datasets.DatasetDict({"dev": rows}).save_to_disk(tmp_path / "dict")
    lines = run(write_lines(tmp_path / "a.jsonl", LINES), out=tmp_path / "lines")
    for n, name in enumerate(("rows", "rows:train", "dict:dev")):
        corpus = run(f"hf:{tmp_path}/{name}", out=tmp_path / f"out{n}")
        assert np.array_equal(corpus.train, lines.train)
    with pytest.raises(ValueError, match="no split 'train'; there are dev"):
        run(f"hf:{tmp_path}/dict", out=tmp_path / "bad")
    with pytest.raises(ValueError, match="no split 'dev'; there are train"):
        run(f"hf:{tmp_path}/rows:dev", out=tmp_path / "bad")


def test_a_saved_split_knows_its_name(datasets, tmp_path):
    datasets.Dataset.from_list(LINES, split="test").save_to_disk(tmp_path / "rows")
    found = [run(f"hf:{tmp_path}/rows{s}", out=tmp_path / f"out{s}") for s in ("", ":test")]
    assert found[0].fingerprint == found[1].fingerprint
    with pytest.raises(ValueError, match="no split 'train'; there are test"):
        run(f"hf:{tmp_path}/rows:train", out=tmp_path / "bad")


@pytest.mark.usefixtures("small_pieces")
def test_streamed_data_sets(datasets, tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    write_lines(tmp_path / "set/train.jsonl", LINES)
    lines = run(tmp_path / "set/train.jsonl", out=tmp_path / "lines")
    real = prepare_module.tokenize_piece

    def stopping(piece, *rest):
        if piece.index == 3:
            raise Stop
        return real(piece, *rest)

    monkeypatch.setattr(prepare_module, "tokenize_piece", stopping)
    with pytest.raises(Stop):
        run(f"hf:{tmp_path}/set", out=tmp_path / "out")
    monkeypatch.setattr(prepare_module, "tokenize_piece", real)
    monkeypatch.setattr("receptance.data.hub.read_stream", _counting(skipped := []))
    corpus = run(f"hf:{tmp_path}/set", out=tmp_path / "out")
    assert np.array_equal(corpus.train, lines.train)
    assert skipped == [21], "the rows of three pieces were not tokenized again"
    with pytest.raises(ValueError, match="cannot open hf:"):
        run(f"hf:{tmp_path}/set:nosplit", out=tmp_path / "bad")


GOOD = b'{"text": "a"}\n' * 3


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a.jsonl": b""}, "cannot open hf:.*: there are no records$"),
        ({"a.jsonl.gz": gzip.compress(GOOD)[:30]}, "cannot open hf:.*: Compressed file ended"),
        ({"a.parquet": b"PAR1 but no more"}, "cannot open hf:.*: Parquet"),
        (
            {"a.jsonl": GOOD, "b.jsonl": b'{"text": ["b"]}\n'},
            r"cannot read hf:.* after record 3: Couldn't cast .*; name the files themselves "
            r"\(.*/set/\) to have bad records named or left out$",
        ),
        (
            {"a.jsonl": GOOD + b"{\n"},
            "cannot read hf:.* after record 0: JSON parse error.*; name the files themselves",
        ),
    ],
    ids=["empty", "cut gz", "cut parquet", "another type", "a bad line"],
)
def test_what_the_library_raises_is_one_line(files, words, datasets, tmp_path):
    (tmp_path / "set").mkdir()
    for name, content in files.items():
        (tmp_path / "set" / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        run(f"hf:{tmp_path}/set", out=tmp_path / "out", skip_bad=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "advice"),
    [(ConnectionError("gone"), "gone; run again to continue"), (TypeError("odd"), "odd")],
)
def test_to_run_again_helps_against_the_network_alone(error, advice, monkeypatch):
    class Stream:
        column_names = None

        def __iter__(self):
            yield from ({"text": "a"}, {"text": "b"})
            raise error

    monkeypatch.setattr("receptance.data.hub._open_stream", lambda name: Stream())
    with pytest.raises(ValueError, match=f"^cannot read hf:a/b after record 2: {advice}$"):
        list(read_stream("hf:a/b", 0, None))


def test_a_library_that_is_missing_is_said_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"^hf: .* datasets library: pip install datasets$"):
        run(f"hf:{tmp_path}", out=tmp_path / "out")


def _counting(skipped: list[int]):
    def read(name: str, skip: int, field: str):
        skipped.append(skip)
        return read_stream(name, skip, field)

    return read


@pytest.mark.parametrize("name", ["hf:", "hf:a:b:c:d"])
def test_names_that_are_no_data_set(name, tmp_path):
    with pytest.raises(ValueError, match="a data set is written"):
        run(name, out=tmp_path / "out")


def test_progress_counts_bytes(tmp_path):
    content = (TEXT + TEXT).encode()
    (tmp_path / "a.txt").write_bytes(content)
    write_lines(tmp_path / "b.jsonl", LINES)
    pieces = cut_pieces(find_sources([str(tmp_path)]), 0.1, 0)
    done: list[int] = []
    for piece in pieces:
        tokenize_piece(piece, ByteTokenizer(), ReadOptions(), tmp_path, done.append)
    assert sum(done) == len(content) + (tmp_path / "b.jsonl").stat().st_size


def test_a_data_set_that_is_named_twice_is_taken_once(datasets, tmp_path):
    datasets.Dataset.from_list(LINES).save_to_disk(tmp_path / "rows")
    corpus = run(*[f"hf:{tmp_path}/rows"] * 2, out=tmp_path / "out")
    assert len(documents(corpus.train)) + len(documents(corpus.validation)) == len(LINES)


def test_text_in_parquet_that_is_not_utf_8(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [b"one", b"t\xff", *[b"%d" % n for n in range(300)], b"\xfe"]
    table = pa.table({"text": pa.array(texts, pa.binary()).view(pa.string())})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: not UTF-8 \(invalid start byte\)"):
        run(tmp_path / "a.parquet", out=tmp_path / "out")
    corpus = run(tmp_path / "a.parquet", out=tmp_path / "out", skip_bad=True)
    assert len(documents(corpus.train)) + len(documents(corpus.validation)) == 301
    assert json.loads((tmp_path / "out/data.json").read_text())["skipped"] == 2
