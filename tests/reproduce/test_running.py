"""Experiments: pieces are kept, results are not lost, and a verdict follows from the figures."""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
from rich.console import Console

from receptance.evaluation.report import find_results, page
from receptance.evaluation.results import Curve, Figure, Result, Subject
from receptance.reproduce.experiment import (
    AGREES,
    DIFFERS,
    NOT_SHOWN,
    Check,
    Experiment,
    Found,
    caption,
    verdict,
)
from receptance.reproduce.running import measure_here, run


@dataclass(frozen=True, kw_only=True)
class Squares(Experiment):
    """Squares of small numbers."""

    NAME: ClassVar[str] = "squares"
    SHOWS: ClassVar[str] = "Figure 0"
    CLAIM: ClassVar[str] = "Squares grow."
    DOES: ClassVar[str] = "multiplies"
    TAKES: ClassVar[tuple[str, str]] = ("no time", "no time")
    MEASURED: ClassVar[list[int]] = []

    count: int = 4
    breaks_at: ClassVar[int | None] = None

    def pieces(self):
        return [{"n": n} for n in range(self.count)]

    def cost(self, piece):
        return 1.0 + piece["n"]

    def measure(self, piece, work):
        if piece["n"] == type(self).breaks_at:
            raise KeyboardInterrupt
        work.note("halfway", 0.5)
        self.MEASURED.append(piece["n"])
        return {"square": piece["n"] ** 2}

    def conclude(self, found):
        x, y = zip(*((float(p["n"]), float(f["square"])) for p, f in found), strict=True)
        grows = all(b > a for a, b in itertools.pairwise(y))
        return Found(
            checks=[
                Check(claim="They grow.", rule="each is above the last.", found="", agrees=grows)
            ],
            models=[Subject(name="m", about={"parameters": 1234})],
            figures=[Figure(name="last", value=y[-1], model="m")],
            curves=[Curve(name="squares", x_name="n", x=[*x], y_name="n²", y=[*y], model="m")],
            caption="0 tokens",
        )


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(Squares, "MEASURED", [])


def go(out: Path, **options) -> Result:
    out.mkdir(exist_ok=True)
    return run(Squares(**options), out, measure_here, Console(quiet=True))


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(Squares, "breaks_at", 2)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path)
    assert Squares.MEASURED == [0, 1] and not (tmp_path / "squares.json").exists()
    monkeypatch.setattr(Squares, "breaks_at", None)
    found = go(tmp_path)
    assert Squares.MEASURED == [0, 1, 2, 3]
    assert found.curves[0].y == [0, 1, 4, 9]
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["squares.json", "squares.png", "squares.svg"]


def test_a_result_is_measured_once_and_its_pictures_come_back(tmp_path):
    go(tmp_path)
    svg = (tmp_path / "squares.svg").read_bytes()
    (tmp_path / "squares.svg").unlink()
    go(tmp_path)
    assert Squares.MEASURED == [0, 1, 2, 3]
    assert (tmp_path / "squares.svg").read_bytes() == svg
    with pytest.raises(
        ValueError, match=r"squares\.json is of an experiment with count 4, and now"
    ):
        go(tmp_path, count=5)


def test_what_is_written(tmp_path):
    go(tmp_path)
    found = Result.load(tmp_path / "squares.json")
    assert found.options == {"count": 4} and found.details["verdict"] == AGREES
    assert caption(found).startswith("m (1,234 parameters). 0 tokens. ")
    shown = page({"squares.json": found}, {})
    for said in ("Figure 0 of the paper, agrees", "Squares grow.", "agrees: They grow."):
        assert said in shown
    assert find_results(tmp_path)[0].keys() == {tmp_path / "squares.json"}


@pytest.mark.parametrize(
    ("answers", "wanted"),
    [
        ([True, True], AGREES),
        ([True, None], NOT_SHOWN),
        ([True, None, False], DIFFERS),
        ([], NOT_SHOWN),
    ],
)
def test_several_checks_make_one_verdict(answers, wanted):
    one = Check(claim="", rule="", found="", agrees=True)
    assert verdict([replace(one, agrees=answer) for answer in answers]) == wanted
