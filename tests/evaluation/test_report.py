"""The page of results and its charts: everything is on it, safe, and loads nothing."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receptance.evaluation.drawing import charts, file_names, number
from receptance.evaluation.report import find_results, page, write_report
from receptance.evaluation.results import Curve, Figure, Result, Source, Subject


def curve(model: str = "a", name: str = "loss", **changes) -> Curve:
    fields = {"x": [1.0, 10.0, 100.0], "y": [3.0, 2.5, 2.0], "low": [2.9, 2.4, 1.9]}
    fields |= {"high": [3.1, 2.6, 2.1], "interval": "95 % over 3 seeds"} | changes
    return Curve(name=name, x_name="tokens", y_name="bits", model=model, **fields)


def result(**changes) -> Result:
    fields = {
        "kind": "compare",
        "what": "two models on a text",
        "models": [Subject(name="a", fingerprint="ab" * 32, about={"parameters": 12345})],
        "data": [Source(name="a.txt", digest="cd" * 32, about={"bytes": 3})],
        "figures": [
            Figure(name="loss", value=1.23456, model="a", low=1.23, high=1.24, interval="95 %"),
            Figure(name="speed", value=20000, model="a", unit="tokens/s"),
            Figure(name="accuracy", value=0.5, model="a", about={"task": "mine"}),
        ],
        "curves": [curve("a"), curve("b")],
        "options": {"tokens": 7},
        "notes": ["a note"],
        "seed": 3,
        "seconds": 600.0,
    }
    return Result(**fields | changes)


class Reader(HTMLParser):
    """The elements of a page, its text, and everything that it would load."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: list[str] = []
        self.loads: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "data", "xlink:href") or name.startswith("on"):
                self.loads.append(f"{name}={value}")
            if name == "href" and not value.startswith("#"):
                self.loads.append(value)

    def handle_startendtag(self, tag, attrs):
        self.names.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    return reader


def test_everything_of_a_result_is_on_the_page():
    text = " ".join(read(page({"a.json": result()}, {})).words)
    for word in (
        *("two models on a text", "a note", "seed 3", "10.0 minutes", "a.json", "compare"),
        *("1.2346", "1.2300 … 1.2400", "loss: interval 95 %", "speed, tokens/s", "20,000"),
        *("task", "mine", "accuracy", "12,345", "abababababababab", "cdcdcdcdcdcdcdcd"),
        *("Intervals in the charts: loss: 95 % over 3 seeds", '"tokens": 7'),
    ):
        assert word in text, word


def test_the_page_loads_nothing_and_has_no_scripts():
    written = page({"a.json": result(), "b.json": result()}, {Path("c"): "c is damaged"})
    reader = read(written)
    assert reader.loads == []
    assert not {"script", "link", "img", "iframe", "object"} & set(reader.names)
    assert "default-src 'none'" in written
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", written)
    assert 'name="viewport"' in written and "prefers-color-scheme: dark" in written
    assert reader.names.count("svg") == 2 and "c is damaged" in "".join(reader.words)


def test_text_of_results_is_no_markup():
    evil = "<script>alert(1)</script>&\"'"
    made = result(
        what=evil,
        notes=[evil],
        models=[Subject(name=evil, about={evil: evil})],
        figures=[Figure(name=evil, value=1, model=evil, unit=evil, about={evil: [evil]})],
        curves=[curve(evil, evil), curve("b", evil, about={evil: evil})],
        options={evil: evil},
    )
    reader = read(page({evil: made}, {Path("x"): evil}))
    assert "script" not in reader.names and reader.loads == []
    assert "".join(reader.words).count(evil) >= 8
    for chart in charts(made):
        ElementTree.fromstring(chart.svg(alone=True))


@pytest.mark.parametrize(
    ("figure", "shown"),
    [
        ({"value": 2.123456, "low": 2.1, "high": 2.15}, "2.123<small>2.100 … 2.150"),
        ({"value": 1234.5, "low": 1200.0, "high": 1270.0}, "1,234<small>1,200 … 1,270"),
        ({"value": 0.5, "low": 0.5, "high": 0.5}, "0.5<small>0.5 … 0.5"),
        ({"value": 12345678.0}, ">12,345,678<"),
        ({"value": 0.0001234567}, ">0.00012346<"),
        ({"value": math.nan}, ">nan<"),
        ({"value": 122_502_505_957_376_336.0}, ">1.225e+17<"),
        ({"value": 2.0 + 1e-15, "low": 2.0 - 1e-15, "high": 2.0 + 2e-15}, "2<small>2 … 2<"),
        ({"value": -1e-4, "low": -0.05, "high": 0.05}, ">0.000<small>-0.050 … 0.050"),
        ({"value": math.inf}, ">inf<"),
    ],
)
def test_numbers_have_as_many_digits_as_make_sense(figure, shown):
    made = result(figures=[Figure(name="loss", model="a", **figure)], curves=[])
    assert shown in page({"a": made}, {})


class TestFolder:
    def test_results_are_found_at_any_depth_and_other_files_are_not(self, tmp_path):
        (tmp_path / "deep").mkdir()
        result().save(tmp_path / "deep/one.json")
        (tmp_path / "other.json").write_text('{"a": 1}')
        (tmp_path / "cut.json").write_text('{"format": "receptance-result", "sch')
        found, unread = find_results(tmp_path)
        assert list(found) == [tmp_path / "deep/one.json"]
        assert list(unread) == [tmp_path / "cut.json"]

    def test_a_single_file_is_a_report_as_well(self, tmp_path):
        result().save(tmp_path / "one.json")
        write_report(tmp_path / "one.json", tmp_path / "page.html")
        assert "two models" in (tmp_path / "page.html").read_text()

    @pytest.mark.parametrize("name", ["empty", "missing"])
    def test_without_results_there_is_no_page(self, tmp_path, name):
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match=r"no folder|no result"):
            write_report(tmp_path / name, tmp_path / "page.html")
        assert not (tmp_path / "page.html").exists()

    def test_a_page_is_replaced_and_another_file_is_not(self, tmp_path):
        result().save(tmp_path / "one.json")
        for _ in range(2):
            write_report(tmp_path, tmp_path / "page.html")
        (tmp_path / "mine.html").write_text("<p>mine")
        with pytest.raises(ValueError, match="not a report; choose another name"):
            write_report(tmp_path, tmp_path / "mine.html")


class TestCharts:
    def test_curves_of_one_kind_share_a_chart(self):
        (chart,) = charts(result())
        assert chart.labels == ["a", "b"] and chart.title == "loss"

    def test_many_curves_are_divided_by_what_they_are_about(self):
        several = [
            curve(f"{model} {size}", about={"size": size, "same": 1})
            for size in ("small", "large", "huge")
            for model in "abc"
        ]
        found = charts(result(curves=several))
        assert [chart.title for chart in found] == [
            f"loss (size {size})" for size in ("small", "large", "huge")
        ]
        assert {len(chart.curves) for chart in found} == {3}

    def test_curves_of_the_same_model_are_told_apart(self):
        several = [curve("a", about={"task": task}) for task in ("one", "two")]
        (chart,) = charts(result(curves=several))
        assert chart.labels == ["a, task one", "a, task two"]

    def test_places_without_a_number_are_left_out(self):
        odd = curve("a", y=[math.nan, 2.0, math.inf], low=None, high=None, interval="")
        (chart,) = charts(result(curves=[odd]))
        assert "nan" not in chart.svg() and "inf" not in chart.svg()
        assert charts(result(curves=[curve("a", y=[math.nan] * 3)])) == []

    def test_a_curve_runs_where_its_numbers_are(self):
        falling = curve("a", x=[1.0, 2.0, 3.0], low=None, high=None)
        (chart,) = charts(result(curves=[falling]))
        path = re.findall(r'class="curve s0" d="M([^"]+)"', chart.svg())[0]
        points = [tuple(map(float, pair.split())) for pair in path.split("L")]
        xs, ys = zip(*points, strict=True)
        assert xs[0] < xs[1] < xs[2] and ys[0] < ys[1] < ys[2]  # y points down in SVG
        assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.11)

    def test_wide_ranges_are_logarithmic(self):
        (chart,) = charts(result(curves=[curve("a", low=None, high=None)]))
        path = re.findall(r'class="curve s0" d="M([^"]+)"', chart.svg())[0]
        xs = [float(pair.split()[0]) for pair in path.split("L")]
        assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.11)

    @given(
        st.lists(
            st.tuples(
                st.floats(-1e9, 1e9, allow_subnormal=False),
                st.floats(-1e9, 1e9, allow_subnormal=False),
            ),
            min_size=1,
            max_size=30,
        )
    )
    def test_any_numbers_make_a_picture_inside_its_frame(self, points):
        x, y = map(list, zip(*points, strict=True))
        drawn = Curve(name="c", x_name="x", x=x, y_name="y", y=y)
        (chart,) = charts(result(curves=[drawn]))
        tree = ElementTree.fromstring(chart.svg(alone=True))
        width, height = map(float, tree.attrib["viewBox"].split()[2:])
        path = next(p.attrib["d"] for p in tree.iter() if p.attrib.get("class") == "curve s0")
        for pair in path[1:].split("L"):
            at = [float(word) for word in pair.split()]
            assert 0 <= at[0] <= width and 0 <= at[1] <= height

    def test_every_chart_has_a_file_name_of_its_own(self):
        found = charts(result(curves=[curve(), curve("a", "Loss!"), curve("a", "x/../y")]))
        assert file_names(found) == ["loss.svg", "loss-2.svg", "x-y.svg"]

    @pytest.mark.parametrize(
        ("value", "shown"), [(0, "0"), (1500, "1.5k"), (2e7, "20M"), (0.002, "0.002")]
    )
    def test_ticks_are_short(self, value, shown):
        assert number(value) == shown
