"""receptance compare --task: from a word on the command line to a result and a page."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import call

from receptance.evaluation.results import Result

OPTIONS = (
    "--settings length=8 --widths 16 --layers 1 --learning-rates 1e-2 --beyond 1 --held-out 16 "
    "--steps 2 --batch 4 --warmup-steps 0 --device cpu --out out"
)
SMALL = OPTIONS.split()


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_task_gives_a_result_and_a_table():
    found = call("compare", "--task", "parity", *SMALL)
    assert found.code == 0, found.err
    result = Result.load(Path("out/result.json"))
    assert {figure.model for figure in result.figures} >= {
        "rwkv4 width 16",
        "transformer width 16",
    }
    for figure in result.figures:
        assert f"{figure.value:.4f}" in found.out
    assert call("report", "out", "--out", "page.html").code == 0
    assert "parity" in Path("page.html").read_text()


def test_what_was_run_is_not_run_again():
    assert call("compare", "--task=parity", *SMALL).code == 0
    runs = {path: path.stat().st_mtime_ns for path in Path("out/runs").rglob("*.json")}
    assert runs and call("compare", "--task=parity", *SMALL).code == 0
    assert {path: path.stat().st_mtime_ns for path in runs} == runs


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--task mqr", "no task 'mqr'; did you mean mqar?"),
        ("--task parity --models rwkv9", "rwkv9"),
        ("--task parity --context 64", "context is about text"),
        ("--task images", "images"),
        ("--task parity --widths 0", "widt"),
        ("--task parity text.txt", "a word too many"),
        ("--task", "--task wants a value"),
    ],
)
def test_mistakes_are_one_line(words, message):
    found = call("compare", *SMALL, *words.split())
    assert found.code == 2
    assert message in found.err and found.err.count("\n") == 1
