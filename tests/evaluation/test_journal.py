"""Journals: what was added is there again, a torn line is not, and other files are refused."""

from __future__ import annotations

import os

import pytest

from receptance.evaluation.journal import Journal, journal_path

IDENTITY = {"model": "ab" * 32, "max_length": None}


def written(path, *records) -> None:
    with Journal(path, IDENTITY) as journal:
        for record in records:
            journal.add(record)


def records(path) -> list[dict]:
    with Journal(path, IDENTITY) as journal:
        return journal.records


def test_records_come_back_in_order(tmp_path):
    written(tmp_path / "a", {"key": "née 狐", "value": 1.5}, {"key": "\ud800"})
    written(tmp_path / "a", {"key": 3})
    assert [each["key"] for each in records(tmp_path / "a")] == ["née 狐", "\ud800", 3]


def test_wherever_the_file_was_torn_whole_records_are_kept_and_the_next_ones_too(tmp_path):
    written(tmp_path / "a", {"n": 1}, {"n": 2})
    content = (tmp_path / "a").read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for cut in range(len(content) + 1):
        (tmp_path / "b").write_bytes(content[:cut])
        kept = sum(end <= cut for end in ends[1:])
        assert len(records(tmp_path / "b")) == kept
        written(tmp_path / "b", {"n": 9})
        assert [each["n"] for each in records(tmp_path / "b")] == [*range(1, kept + 1), 9]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("model", "cd" * 32, "another model"), ("max_length", 5, "another max length")],
)
def test_records_of_something_else_are_refused_and_kept(tmp_path, name, value, said):
    written(tmp_path / "a", {"n": 1})
    before = (tmp_path / "a").read_bytes()
    with pytest.raises(ValueError, match=said):
        Journal(tmp_path / "a", IDENTITY | {name: value})
    assert (tmp_path / "a").read_bytes() == before


@pytest.mark.parametrize("content", [b"mine\n", b"mine", b'{"a": 1}\n', b"\xff\xfe\n", b"[]\n"])
def test_another_file_is_refused_and_kept(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match="not what an evaluation has kept"):
        Journal(tmp_path / "a", IDENTITY)
    assert (tmp_path / "a").read_bytes() == content


def test_a_journal_in_use_is_refused(tmp_path):
    pytest.importorskip("fcntl")
    with (
        Journal(tmp_path / "a", IDENTITY),
        pytest.raises(ValueError, match="in use by another process"),
    ):
        Journal(tmp_path / "a", IDENTITY)
    assert records(tmp_path / "a") == []


def test_a_folder_in_the_way_is_one_line(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="is no file"):
        Journal(tmp_path / "a", IDENTITY)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="has no full disk")
def test_a_full_disk_is_an_error(tmp_path):
    (tmp_path / "a").symlink_to("/dev/full")
    with pytest.raises((ValueError, OSError)):
        written(tmp_path / "a", {"n": 1})


def test_it_lies_beside_the_result(tmp_path):
    assert journal_path(tmp_path / "a.json") == tmp_path / "a.json.progress"
