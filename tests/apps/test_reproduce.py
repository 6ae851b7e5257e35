"""`receptance reproduce`: the list, one experiment, and what it refuses."""

import base64
import re
from dataclasses import replace
from pathlib import Path

import pytest
from command import call

from receptance.analysis import EVERYTHING
from receptance.apps import reproduce
from receptance.apps.gallery import BEGIN, ELSEWHERE, END, _plain, command, gallery
from receptance.apps.options import parse
from receptance.apps.paper import PaperPage, _form
from receptance.apps.reproduce import COMMANDS
from receptance.evaluation.report import write_report
from receptance.evaluation.results import Curve, Result
from receptance.reproduce.experiment import Work
from receptance.reproduce.registry import EXPERIMENTS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/reproduce.md"


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


def test_runs_side_by_side_take_all_cores_and_what_is_timed_has_them_alone(monkeypatch):
    for cores, wanted in ((1, 1), (2, 2), (64, 8)):
        monkeypatch.setattr(reproduce, "usable_threads", lambda cores=cores: cores)
        for name, kind in EXPERIMENTS.items():
            found = reproduce._Work(kind.quick(), 0).processes
            assert found == (wanted if kind.PARALLEL else 1), name
    assert reproduce._Work(EXPERIMENTS["scaling"].quick(), 3).processes == 3
    refused = call("reproduce", "scaling", "--processes", -1)
    assert refused.code == 2 and "--processes is -1; it must be at least 0" in refused.err


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


def test_the_page_has_the_pictures_and_loads_nothing(tmp_path):
    made = {}
    for name in ("trace", "decays", "sizes"):
        made[name] = result = Result(
            kind="reproduce",
            what=f"{name} of the paper",
            options=_plain(EXPERIMENTS[name]()),
            curves=[
                Curve(
                    name="x" if name != "trace" else "log p(answer)",
                    x_name="a",
                    x=[1.0, 2.0],
                    y_name="b",
                    y=[1.0, 2.0],
                    about={"place": EVERYTHING, "token": "t", "layer": 0, "when": "after"},
                )
            ],
            details={
                "experiment": name,
                "verdict": "agrees",
                "caption": "7 tokens",
                "checks": [
                    {"claim": "<b>", "found": "1 & 2", "rule": "r", "verdict": "agrees"},
                ],
            },
            notes=["claim", "said", "a remark"],
        )
        result.save(tmp_path / f"{name}.json")
    other = replace(made["sizes"], options={"old": 1}, what="of an older version")
    other.save(tmp_path / "old.json")
    replace(made["sizes"], kind="text", what="something else").save(tmp_path / "other.json")
    write_report(tmp_path, tmp_path / "r.html", PaperPage())
    page = (tmp_path / "r.html").read_text()
    titles = re.findall("<h2>([a-z ]+)</h2>", page)
    wanted = [f"{name} of the paper" for name in ("sizes", "decays", "trace")]
    assert titles == [*wanted, "of an older version", "something else"]
    assert page.count('src="data:image/svg+xml;base64,') == 3 and page.count("<img") == 3
    svg = base64.b64decode(re.findall(r"base64,([^\"]+)", page)[0])
    assert b"<svg" in svg and b"<script" not in svg
    assert "<b>" not in page and page.count('<td data-head="what was measured">1 &amp; 2</td>') == 3
    for said in ("7 tokens", "a remark", "prompts (Appendix L", "complexity (Table 1): it was not"):
        assert said in page
    assert "<li>said</li>" not in page.partition("of an older version</h2>")[0]
    assert "<script" not in page and 'src="http' not in page


def test_the_page_says_which_form_it_was():
    kind = EXPERIMENTS["complexity"]
    details = {"experiment": "complexity"}
    for one, said in ((kind.quick(), "quick form (--quick)"), (kind(), "full form, or one of")):
        made = Result(kind="reproduce", what="", options=_plain(one), details=details)
        assert said in _form(made)


def test_the_gallery_is_made_of_results(tmp_path):
    page, out = tmp_path / "page.md", tmp_path / "out"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    experiment = EXPERIMENTS["decays"]()
    found = [(piece, experiment.measure(piece, Work(out))) for piece in experiment.pieces()]
    out.mkdir()
    experiment.result(found, 0.0).save(out / "decays.json")
    done = call("reproduce", "--gallery", page, "--out", out)
    assert done.code == 0, done.err
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "\nold\n" not in text
    assert "| [decays](#decays) | Figure 10 | agrees |" in text
    assert "| [sizes](#sizes) | Table 2 | no result here yet |" in text
    assert (tmp_path / "images/reproduce/decays.svg").is_file()
    assert all(other.command in text for other in ELSEWHERE)
    assert call("reproduce", "--gallery", page, "--out", out).code == 0
    assert page.read_text() == text
    page.write_text("nothing")
    assert "does not hold the lines" in call("reproduce", "--gallery", page, "--out", out).err


def test_a_command_names_the_options_that_differ():
    kind = EXPERIMENTS["complexity"]
    result = Result(kind="reproduce", what="", options=_plain(kind.quick()))
    assert command("complexity", kind, result) == "receptance reproduce complexity --quick"
    result = Result(kind="reproduce", what="", options=_plain(kind(widths=(8, 16, 32))))
    words = "receptance reproduce complexity --widths 8 --widths 16 --widths 32"
    assert command("complexity", kind, result) == words
    parse(COMMANDS["complexity"], words.split()[3:], "")


@pytest.mark.skipif(not PAGE.is_file(), reason="the sources are not here")
def test_the_page_is_made_of_the_results_that_are_there():
    found = {x.stem: Result.load(x) for x in (ROOT / "results/reproduce").glob("*.json")}
    made = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert made == f"\n\n{gallery(found)}\n"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["decay"], "unknown experiment 'decay'; there are "),
        (["--list", "--all"], "list, all or gallery: take one of them"),
        (["--quick"], "list, all or gallery: take one of them"),
        (["decays", "--model", "nowhere"], "nowhere"),
    ],
)
def test_refusals(words, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call("reproduce", *words)
    assert done.code == 2 and error in done.err and done.err.count("\n") == 1
