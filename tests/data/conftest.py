"""Sources of every kind, work in small pieces, and the library of data sets."""

import gzip
from pathlib import Path
from types import ModuleType

import pytest
from corpora import LINES, write_lines
from tiny import TEXT


@pytest.fixture
def small_pieces(monkeypatch) -> None:
    """Many pieces of little text."""
    monkeypatch.setattr("receptance.data.sources.PIECE_BYTES", 700)
    monkeypatch.setattr("receptance.data.plan.PIECE_BYTES", 700)
    monkeypatch.setattr("receptance.data.sources._STREAM_ROWS", 7)


@pytest.fixture
def sources(tmp_path) -> list[Path]:
    """Every kind of file that needs no other library."""
    folder = tmp_path / "tëxt 狐"
    (folder / "in").mkdir(parents=True)
    (folder / "a.txt").write_text(TEXT)
    (folder / "in/b.txt").write_text("ein anderer Text\n" * 20)
    (folder / "in/empty.txt").touch()
    (folder / "c.txt.gz").write_bytes(gzip.compress(TEXT[:1000].encode()))
    write_lines(folder / "d.jsonl", LINES)
    (folder / "e.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}\n\n{"text": "two"}'))
    return [folder]


@pytest.fixture
def datasets(tmp_path, monkeypatch) -> ModuleType:
    """The library, which keeps nothing of what it read beyond a test."""
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return library
