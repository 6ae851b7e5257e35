"""A text, a finished run, and a short way to another one."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command import SMALL, Result, call
from tiny import TEXT


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A folder with a text and a run of 12 steps; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "text.txt").write_text(TEXT)
    options = ["--out", folder / "run", "--steps", 12, "--reports", 3, *SMALL.split()]
    result = call("train", folder / "text.txt", *options)
    assert result.code == 0, result.err
    return folder


@pytest.fixture
def folder(finished, tmp_path, monkeypatch) -> Path:
    """A copy of that folder to work in, where no pictures are drawn: they take longer than all
    the rest."""
    shutil.copytree(finished, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("receptance.plots.draw_losses", lambda metrics, picture: None)
    return tmp_path / "work"


@pytest.fixture
def train(folder) -> Callable[..., Result]:
    """`receptance train` on the text with a small model; later options replace earlier ones."""
    return lambda *argv: call("train", "text.txt", "--out", "new", *SMALL.split(), *argv)
