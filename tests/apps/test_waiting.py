"""What a terminal shows while a command has nothing else to show."""

import io
import sys
import threading

import pytest

from receptance.apps.waiting import until_first, waiting


class Terminal(io.StringIO):
    """Standard error that is a terminal, and tells when something is written."""

    def __init__(self) -> None:
        super().__init__()
        self.used = threading.Event()

    def isatty(self) -> bool:
        return True

    def flush(self) -> None:
        self.used.set()


def on_terminal(monkeypatch) -> Terminal:
    """Standard error as a terminal; pytest replaces it between a fixture and its test."""
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    return shown


def test_it_is_told_and_erased(monkeypatch):
    terminal = on_terminal(monkeypatch)
    with waiting("reading x", patience=0):
        assert terminal.used.wait(timeout=60)
    written = terminal.getvalue()
    assert "reading x ... 0 s" in written
    assert written.endswith("\r\x1b[K")


def test_what_is_quick_is_not_told(monkeypatch):
    terminal = on_terminal(monkeypatch)
    with waiting("reading x", patience=1000):
        pass
    assert terminal.getvalue() == ""


def test_an_error_ends_it_as_well(monkeypatch):
    terminal = on_terminal(monkeypatch)

    def fail() -> None:
        with waiting("reading x", patience=0):
            assert terminal.used.wait(timeout=60)
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_a_file_gets_nothing(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    with waiting("reading x", patience=0):
        pass
    assert written.getvalue() == ""


def test_pieces_pass_through(monkeypatch):
    on_terminal(monkeypatch)
    assert list(until_first("x", iter("abc"))) == ["a", "b", "c"]
    assert list(until_first("x", [])) == []
