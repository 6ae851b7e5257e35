"""`receptance reproduce`: the list, one experiment, and what it refuses."""

import pytest
from command import call

from receptance.evaluation.results import Result
from receptance.reproduce.registry import EXPERIMENTS


def test_the_list_says_what_everything_is():
    shown = call("reproduce", "--list")
    assert shown.code == 0
    words = " ".join(shown.out.split())
    for name, kind in EXPERIMENTS.items():
        assert f"{name}: {kind.SHOWS}" in words
        for text in (kind.CLAIM, kind.DOES, kind.NEEDS, f"quick {kind.TAKES[0]}"):
            assert " ".join(text.split()) in words


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_its_options(name):
    shown = call("reproduce", name, "--help")
    assert shown.code == 0 and "--quick" in shown.out and EXPERIMENTS[name].SHOWS in shown.out


def test_one_experiment_and_its_report(tmp_path):
    out = tmp_path / "out"
    done = call("reproduce", "decays", "--quick", "--out", out)
    assert done.code == 0, done.err
    assert "decays: Figure 10 of the paper, agrees" in done.out
    assert Result.load(out / "decays.json").details["experiment"] == "decays"
    assert (out / "decays.png").read_bytes().startswith(b"\x89PNG")
    assert "half-life" in (out / "decays.svg").read_text()
    assert call("report", out, "--out", tmp_path / "r.html").code == 0
    assert "Figure 10 of the paper, agrees" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["decay"], "unknown experiment 'decay'; there are "),
        (["--list", "--all"], "list or all: take one of them"),
        (["--quick"], "list or all: take one of them"),
        (["decays", "--model", "nowhere"], "nowhere"),
    ],
)
def test_refusals(words, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call("reproduce", *words)
    assert done.code == 2 and error in done.err and done.err.count("\n") == 1
