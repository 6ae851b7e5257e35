"""The picture of a run: what is read of its metrics, however long, and that it is a picture."""

import itertools
import json
import math
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receptance import plots
from receptance.plots import draw_decays, draw_losses, panels


def step_line(step: int, **more: object) -> str:
    figures = {"loss": 2 + 8 / step, "learning_rate": 1e-3, "gradient_norm": 0.5}
    return json.dumps({"tokens": 100 * step, "step": step, **figures, **more}) + "\n"


def report_line(step: int) -> str:
    report = {"validation_bits_per_byte": 1 + 1 / step, "sample": f"step {step} " * 40}
    return json.dumps({"tokens": 100 * step, "step": step, **report}) + "\n"


def long_run(path: Path, steps: int, every: int) -> list[int]:
    """Metrics of so many steps with a report now and then, the last line half written."""
    reports = sorted(random.Random(0).sample(range(1, steps), steps // every))
    with path.open("w") as file:
        wanted = set(reports)
        for step in range(1, steps + 1):
            file.write(step_line(step))
            if step in wanted:
                file.write(report_line(step))
        file.write('{"tokens": 7, "step": 1, "loss')
    return reports


def size(picture: Path) -> tuple[int, int]:
    """Width and height out of the header of a PNG."""
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", content[16:24])


class TestThePicture:
    @pytest.fixture(autouse=True)
    def _needs_matplotlib(self):
        pytest.importorskip("matplotlib")

    @pytest.mark.parametrize(
        "lines",
        [
            [step_line(1)],
            [step_line(1), report_line(1), step_line(2), '{"tokens": 3, "step'],
            [step_line(1, gradient_norm=0.0), step_line(2, gradient_norm=None)],
            ['{"tokens": 1, "step": 1, "loss": NaN}\n', step_line(2)],
            ['{"tokens": 1, "step": 1, "loss": 3.5}\n', "\n", "[1]\n", "\x00\x00\n"],
        ],
        ids=["one step", "half written", "no gradient norm", "not a number", "only losses"],
    )
    def test_of_a_few_steps(self, lines, tmp_path):
        (tmp_path / "metrics.jsonl").write_text("".join(lines))
        draw_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
        assert size(tmp_path / "loss.png") == (960, 720)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]

    @pytest.mark.parametrize("content", ["", "{", report_line(1)])
    def test_needs_a_training_step(self, content, tmp_path):
        (tmp_path / "metrics.jsonl").write_text(content)
        (tmp_path / "loss.png").write_bytes(b"the last one")
        with pytest.raises(ValueError, match=r"no training step in .*metrics\.jsonl yet"):
            draw_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
        assert (tmp_path / "loss.png").read_bytes() == b"the last one"

    @pytest.mark.parametrize("content", [b"", b"weights", b"\x89PNG is how a PNG begins"])
    def test_only_a_png_is_replaced(self, content, tmp_path):
        picture = tmp_path / "loss.png"
        picture.write_bytes(content)
        (tmp_path / "metrics.jsonl").write_text(step_line(1))
        for draw in (
            lambda: draw_losses(tmp_path / "metrics.jsonl", picture),
            lambda: draw_decays({0: [0.9, 0.1]}, picture),
        ):
            picture.write_bytes(content)
            with pytest.raises(ValueError, match="what is there is not a PNG; choose another name"):
                draw()
            assert picture.read_bytes() == content
            picture.unlink()
            draw()
            draw()  # replaces the first
            assert size(picture)[0] > 0

    def test_what_is_drawn(self, tmp_path, monkeypatch):
        """Both panels, by what is on their axes."""
        import matplotlib.figure

        figures = []
        make = matplotlib.figure.Figure.__init__

        def remember(self, *args, **kwargs):
            figures.append(self)
            make(self, *args, **kwargs)

        monkeypatch.setattr(matplotlib.figure.Figure, "__init__", remember)
        text = step_line(1) + step_line(2) + report_line(2)
        (tmp_path / "metrics.jsonl").write_text(text)
        draw_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
        drawn = {
            axes.get_ylabel(): [[*map(float, line.get_ydata())] for line in axes.lines]
            for axes in figures[0].axes
        }
        assert drawn["training loss, nats per token"][0] == [10.0, 6.0]
        assert drawn["validation, bits per byte"] == [[1.5]]
        assert drawn["gradient norm"][0] == [0.5, 0.5]
        assert drawn["learning rate"] == [[1e-3, 1e-3]]

    def test_a_long_run_takes_no_longer(self, tmp_path, monkeypatch):
        """Only so many records are taken apart, whatever the number of steps."""
        parsed = []

        def counted(content: bytes) -> Iterator[dict[str, Any]]:
            parsed.append(content.count(b"\n"))
            return parse(content)

        parse = plots._parsed
        monkeypatch.setattr(plots, "_parsed", counted)
        lines = []
        for steps in (30_000, 100_000):
            parsed.clear()
            metrics = tmp_path / f"{steps}.jsonl"
            long_run(metrics, steps, steps // 100)
            draw_losses(metrics, tmp_path / "loss.png")
            lines.append(sum(parsed))
        assert 0 < lines[1] <= 1.1 * lines[0] < 10_000


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, list[int]]:
    """Metrics too long to be read whole, and the steps of their validations."""
    metrics = tmp_path_factory.mktemp("long") / "metrics.jsonl"
    return metrics, long_run(metrics, 30_000, 300)


class TestLongFiles:
    def test_no_validation_is_left_out(self, run):
        metrics, reports = run
        points = plots._points(plots._records(metrics), "validation_bits_per_byte")
        assert points == [(100 * step, 1 + 1 / step) for step in reports]

    def test_steps_come_from_everywhere(self, run):
        points = plots._points(plots._records(run[0]), "loss")
        places = [at / 100 for at, _ in points]
        assert places[0] == 1 and places[-1] == 30_000
        assert max(b - a for a, b in itertools.pairwise(places)) < 30_000 / 200
        assert all(loss == 2 + 8 / step for step, (_, loss) in zip(places, points, strict=True))

    def test_too_many_validations_are_thinned_out(self, run, monkeypatch):
        metrics, reports = run
        monkeypatch.setattr(plots, "_MOST_VALIDATIONS", 10)
        points = plots._points(plots._records(metrics), "validation_bits_per_byte")
        assert 5 < len(points) <= 10
        assert points[0][0] == 100 * reports[0]
        assert points[-1][0] > 100 * 30_000 * 0.8


def test_a_step_that_was_done_again_counts_once():
    lines = step_line(1) + step_line(2, loss=99.0) + step_line(3) + step_line(2, loss=5.0)
    assert plots._points(plots._parsed(lines.encode()), "loss") == [
        (100, 10.0),
        (200, 5.0),
        (300, 2 + 8 / 3),
    ]


@given(st.lists(st.floats(-1e6, 1e6), max_size=200))
def test_the_mean_lies_between_the_points(values):
    points = [(float(at), value) for at, value in enumerate(values)]
    smooth = plots._smooth(points)
    assert [at for at, _ in smooth] == [at for at, _ in points]
    for _, value in smooth:
        assert min(values) - 1e-6 <= value <= max(values) + 1e-6


@given(st.text(alphabet='{}[]":,0123456789enulabtokens\n', max_size=200))
def test_whatever_is_in_a_file_gives_objects(text):
    assert all(isinstance(record, dict) for record in plots._parsed(text.encode()))
    assert all(math.isfinite(y) for _, y in plots._points(plots._parsed(text.encode()), "n"))


@pytest.mark.parametrize(
    ("places", "labels"),
    [
        ([16, 32, 64, 128], ["16", "32", "64", "128"]),
        ([32, 64, 96, 128, 160, 192, 224, 256], ["20", "50", "100", "200", "500"]),
        ([1.69e8, 4.3e8, 1.5e9, 1.4e10], ["169M", "430M", "1.5G", "14G"]),
    ],
)
def test_ticks_of_a_logarithmic_axis_do_not_collide(places, labels):
    """Places that are few and apart name themselves; of others round numbers are named."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    panel = panels.Panel(title="", x="", y="", lines=[panels.Line("a", places, places)], log_x=True)
    axes = Figure().subplots()
    panels._draw_curves(axes, panel, {"a": "C0"})
    shown = [axes.xaxis.get_major_formatter()(x) for x in axes.xaxis.get_majorticklocs()]
    assert [x for x in shown if x in labels] == labels
    assert len(axes.xaxis.get_minorticklocs()) == 0


def test_a_label_has_the_same_color_in_all_panels():
    lines = [panels.Line(name, [1], [1]) for name in "abc"]
    some = [panels.Panel(title="", x="", y="", lines=x) for x in (lines, lines[2:])]
    assert panels._colors(some) == {"a": "C0", "b": "C1", "c": "C2"}
