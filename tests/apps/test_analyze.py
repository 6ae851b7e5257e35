"""receptance analyze: what it writes, and what it refuses before any work is done."""

import json
from pathlib import Path

import pytest
from command import call
from tiny import make_model

from receptance import save
from receptance.evaluation.results import Result
from receptance.tokenizer import ByteTokenizer


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save(make_model(), "m", ByteTokenizer())
    return tmp_path


def test_a_page_a_picture_and_figures(place):
    words = ["--subject", "Ei狐", "--answer", " Paris", "--samples", 2]
    result = call(
        *("analyze", "m", "The Ei狐 is", *words),
        *("--out", "p.html", "--plot", "t.png", "--json", "r.json"),
    )
    assert (result.code, result.err) == (0, "")
    size = Path("p.html").stat().st_size
    lines = result.out.splitlines()
    assert lines == [f"wrote p.html: 12 tokens, {size:,} bytes", "wrote t.png", "wrote r.json"]
    assert Path("t.png").read_bytes().startswith(b"\x89PNG")
    found = Result.load(Path("r.json"))
    assert found.details["answer"] == " "
    places = {c.about["place"] for c in found.curves if "place" in c.about}
    assert places == {"output", "time_shift", "channel_shift", "wkv", "output and state"}
    page = Path("p.html").read_text("utf-8")
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert data["trace"]["subject"] == [4, 5, 6, 7, 8]
    assert call("analyze", "m", "again", "--out", "p.html", "--no-effects").code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["m", "a", "--out", "p.html"], "the text has 1 tokens; wanted at least 2"),
        (["m", "a" * 300, "--out", "p.html"], "300 tokens, and a page shows at most 256"),
        (["m", "abc", "--out", "no/p.html"], "there is no folder no to write p.html into"),
        (["m", "abc", "--out", "m/config.json"], "what is there is not such a page"),
        (["m", "abc", "--out", "p", "--subject", "b"], "give --answer as well"),
        (["m", "abc", "--out", "p", "--plot", "t.png"], "--plot draws a trace; give --subject"),
        (["m", "abc", "--out", "p", "--subject", "d", "--answer", "e"], "not hold the subject 'd'"),
        (["m", "abc", "--out", "p", "--subject", "b", "--answer", ""], "the answer is empty"),
        (["none", "abc", "--out", "p"], "none"),
    ],
)
def test_mistakes(place, words, message):
    before = sorted(p.name for p in place.iterdir())
    result = call("analyze", *words)
    assert result.code == 2 and result.err.count("\n") == 1
    assert message in result.err, result.err
    assert sorted(p.name for p in place.iterdir()) == before
