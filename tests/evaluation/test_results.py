"""Results of measurements: what is written is read again, and nothing else is taken for one."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest

from receptance.evaluation.results import Curve, Figure, Result, Source, Subject, versions


def example() -> Result:
    return Result(
        kind="text",
        what="bits per byte of a text",
        models=[Subject(name="ours", fingerprint="ab" * 32, about={"parameters": 12})],
        data=[Source(name="a.txt", digest="cd" * 32, about={"bytes": 3})],
        figures=[
            Figure(
                name="bits per byte", value=1.5, model="ours", low=1.4, high=1.6, interval="95 %"
            )
        ],
        curves=[
            Curve(name="loss", x_name="position", x=[1.0, 2.0], y_name="nats", y=[3.0, 2.5]),
        ],
        options={"limit": 3},
        seed=7,
        notes=["née"],
    )


class TestResult:
    def test_what_is_saved_is_loaded(self, tmp_path):
        result = example()
        result.save(tmp_path / "result.json")
        assert dataclasses.asdict(Result.load(tmp_path / "result.json")) == dataclasses.asdict(
            result
        )

    def test_an_older_result_is_replaced(self, tmp_path):
        path = tmp_path / "result.json"
        example().save(path)
        dataclasses.replace(example(), seed=8).save(path)
        assert Result.load(path).seed == 8

    def test_another_file_is_not_replaced(self, tmp_path):
        path = tmp_path / "mine.json"
        path.write_text('{"mine": 1}')
        with pytest.raises(ValueError, match="not a result; choose another name"):
            example().save(path)
        assert path.read_text() == '{"mine": 1}'

    @pytest.mark.parametrize(
        "content",
        [
            *("", "{", "[1]", '{"format": "other"}', "\xff", "[" * 100_000),
            json.dumps({"format": "receptance-result", "schema": 1, "figures": [{"nmae": "x"}]}),
        ],
    )
    def test_other_content_is_refused_in_one_line(self, tmp_path, content):
        path = tmp_path / "a.json"
        path.write_bytes(content.encode("latin-1"))
        with pytest.raises(ValueError, match=r"a.json is not a result") as refused:
            Result.load(path)
        assert "\n" not in str(refused.value)

    @pytest.mark.parametrize(
        ("at", "value"),
        [
            *((("details",), [1]), (("what",), 5), (("kind",), ["a"]), (("seconds",), "x")),
            *((("machine",), "x"), (("versions",), None), (("notes",), "a text")),
            *((("figures", 0, "value"), None), (("figures", 0, "value"), "1")),
            *((("figures", 0, "about"), [1]), (("models", 0, "about"), [1])),
            *((("curves", 0, "x"), ["a", 1]), (("curves", 0, "y"), [None, 3])),
        ],
    )
    def test_fields_of_other_types_are_refused(self, tmp_path, at, value):
        path = tmp_path / "a.json"
        example().save(path)
        content = json.loads(path.read_text())
        place = content
        for step in at[:-1]:
            place = place[step]
        assert at[-1] in place
        place[at[-1]] = value
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"a.json is not a result: \w+ of a \w+ has another"):
            Result.load(path)

    def test_a_pipe_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "a.json")
        with pytest.raises(ValueError, match="it is no plain file"):
            Result.load(tmp_path / "a.json")

    def test_a_later_schema_is_refused(self, tmp_path):
        path = tmp_path / "a.json"
        example().save(path)
        path.write_text(path.read_text().replace('"schema": 1', '"schema": 2'))
        with pytest.raises(ValueError, match="schema 2"):
            Result.load(path)

    def test_it_says_the_machine_and_the_versions(self):
        assert example().machine["cpu"]
        assert set(versions("numpy")) == {"python", "receptance", "torch", "numpy"}


def test_a_curve_has_one_value_for_each_place():
    with pytest.raises(ValueError, match="2 places and 1 values of low"):
        Curve(name="c", x_name="x", x=[0.0, 1.0], y_name="y", y=[0.0, 1.0], low=[0.0])
