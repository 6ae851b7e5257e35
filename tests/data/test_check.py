"""What a dry run finds out about sources."""

import gzip
import json

import pytest
from corpora import LINES, write_lines

from receptance.data import PrepareOptions, check_sources

ODD = {"messages": [{"role": "critic", "content": "x"}]}
GOOD = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
CHATS = PrepareOptions(template="world")


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", lambda records: "".join(json.dumps(r) + "\n" for r in records).encode()),
        ("a.json", lambda records: json.dumps(records).encode()),
        ("a.json.gz", lambda records: gzip.compress(json.dumps(records).encode())),
    ],
)
def test_odd_records_are_named(name, write, tmp_path):
    (tmp_path / name).write_bytes(write([GOOD] * 9 + [ODD] * 10))
    with pytest.raises(
        ValueError, match=rf"{name}, (line|row) 10: messages\[1\] has role 'critic'"
    ):
        check_sources([str(tmp_path / name)], CHATS)
    check_sources([str(tmp_path / name)], CHATS, records=9)
    found = check_sources([str(tmp_path)], PrepareOptions(template="world", skip_bad=True))
    assert [source.path for source in found] == [str(tmp_path / name)]


def test_examples_without_a_template_are_named(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [GOOD])
    with pytest.raises(ValueError, match="line 1: it holds an example; say with template="):
        check_sources([str(path)], PrepareOptions())


def test_parquet_and_data_sets(datasets, tmp_path):
    rows = datasets.Dataset.from_list(LINES)
    rows.to_parquet(tmp_path / "a.parquet")
    rows.save_to_disk(tmp_path / "rows")
    (tmp_path / "set").mkdir()
    write_lines(tmp_path / "set/train.jsonl", LINES)
    names = [str(tmp_path / "a.parquet"), f"hf:{tmp_path}/rows", f"hf:{tmp_path}/set"]
    kinds = [source.kind for source in check_sources(names, PrepareOptions())]
    assert kinds == ["parquet", "rows", "stream"]
    for name in names:
        with pytest.raises(ValueError, match="row 1: no field 'content'; there are text"):
            check_sources([name], PrepareOptions(text_field="content"))


@pytest.mark.parametrize(
    ("names", "words"),
    [(["nope.txt"], "no such file"), (["hf:"], "is written"), (["x.npy"], "holds tokens already")],
)
def test_what_is_not_there_is_named(names, words):
    with pytest.raises(ValueError, match=words):
        check_sources(names, PrepareOptions())


def test_text_is_found_and_exclusions_hold(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    write_lines(tmp_path / "b.jsonl", [ODD])
    found = check_sources([str(tmp_path)], CHATS, exclude=("*.jsonl",))
    assert [source.kind for source in found] == ["text"]
