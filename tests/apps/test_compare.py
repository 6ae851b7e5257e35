"""receptance compare and receptance report: from a text to a page, stopped and repeated."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from command import Result, call
from tiny import TEXT

from receptance.apps import compare
from receptance.apps.compare import Options
from receptance.apps.options import parse
from receptance.evaluation import results
from receptance.evaluation.compare.comparing import make_plan
from receptance.evaluation.compare.costs import measure
from receptance.evaluation.compare.training import Stopped, Training
from receptance.training.recipes import apply_recipe

WORDS = (
    "--models rwkv4 --models llama --sizes 16x1 --tokenizer bytes --tokens 320 --context 16 "
    "--batch 4 --held-out 128 --points 2 --learning-rates 1e-2 --seeds 1 --validation 0.1 "
    "--contexts 8"
)
SMALL = WORDS.split()
PLANS = sorted((Path(__file__).parents[2] / "benchmarks").glob("compare-*.toml"))


@pytest.fixture
def text(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "_measured", lambda _, work: measure(work))  # in this process
    documents = (json.dumps({"text": part}) for part in TEXT.split("\n") if part)
    (tmp_path / "text.jsonl").write_text("\n".join(documents))
    return tmp_path / "text.jsonl"


def run(*more: object, without: str = "") -> Result:
    """Compare in the folder out, with these options in place of some of the usual ones."""
    assert without in WORDS
    words = WORDS.replace(without, "").split()
    return call("compare", "text.jsonl", "--out", "out", *words, *more)


def test_from_a_text_to_a_page(text):
    done = run("--seeds", 2, without="--seeds 1")
    assert (done.code, done.err) == (0, "")
    found = results.Result.load(Path("out/result.json"))
    losses = [x for x in found.figures if x.name == "held-out bits per byte"]
    assert {x.model for x in losses} == {"rwkv4 16x1", "llama 16x1"}
    assert all(0 < x.value < 9 and x.low <= x.value <= x.high for x in losses)
    assert all(x.model in done.out for x in losses)
    digests = {x["tokens digest"] for x in found.details["runs"] if "seed1" in x["name"]}
    assert len(digests) == 1
    assert {path.suffix for path in Path("out/pictures").iterdir()} == {".svg"}
    page = call("report", "out", "--out", "page.html")
    assert (page.code, page.err) == (0, "") and "rwkv4 16x1" in Path("page.html").read_text()


def test_the_same_command_runs_nothing_twice_and_finds_the_same(text, monkeypatch):
    assert run().code == 0
    before = results.Result.load(Path("out/result.json"))
    monkeypatch.setattr("receptance.evaluation.compare.training.Training", None)
    assert run().code == 0
    after = results.Result.load(Path("out/result.json"))
    assert (after.figures, after.curves) == (before.figures, before.curves)


@pytest.mark.parametrize("at", [3, 5, 7])
def test_a_stopped_comparison_goes_on(text, monkeypatch, at):
    """Also if the stop comes in the last step of a run."""
    steps, once = [], Training.run_step

    def interrupted(training: Training) -> float:
        steps.append(1)
        if len(steps) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return once(training)

    monkeypatch.setattr(Training, "run_step", interrupted)
    stopped = run("--no-costs")
    assert stopped.code == 130 and "the same command goes on with" in stopped.out
    assert not Path("out/result.json").exists()
    assert run("--no-costs").code == 0
    assert len(steps) == 10  # every step was made once


def test_a_stop_in_the_last_run_of_a_search_is_not_forgotten(text, monkeypatch):
    once = Training.run_step

    def interrupted(training: Training) -> float:
        assert training.job.search
        if training.job.name == "llama-16x1-search-lr0.02":
            os.kill(os.getpid(), signal.SIGINT)
        return once(training)

    monkeypatch.setattr(Training, "run_step", interrupted)
    monkeypatch.setattr("receptance.evaluation.compare.comparing._EXTENSIONS", 0)
    stopped = run("--learning-rates", "2e-2")
    assert stopped.code == 130


@pytest.mark.slow
def test_runs_side_by_side_find_what_one_after_the_other_finds(text):
    assert run().code == 0
    command = [sys.executable, "-m", "receptance", "compare", "text.jsonl", *SMALL]
    more = ["--out", "two", "--processes", "2"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in Path("out/runs").iterdir()}
    assert {path.name for path in Path("two/runs").iterdir()} == names
    for name in names:
        one, two = (json.loads(Path(x, "runs", name).read_text()) for x in ("out", "two"))
        assert (one["digest"], one["nats"]) == (two["digest"], two["nats"])


def test_a_worker_that_was_told_to_end_begins_nothing(monkeypatch, tmp_path):
    told = compare._told_to_end.__wrapped__()
    told.set()
    monkeypatch.setattr(compare, "_told_to_end", lambda: told)
    with pytest.raises(Stopped):
        compare._work(tmp_path, tmp_path, 0.1, 1, (None, "cpu"))


def test_a_dry_run_shows_sizes_and_time_and_writes_nothing(text):
    done = run("--dry-run", "--sizes", "16x2")
    assert (done.code, done.err) == (0, "")
    assert "llama 16x2" in done.out and "hours" in done.out
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sizes", "16"], "--sizes has '16'; wanted WIDTHxLAYERS, as in 128x4"),
        (["--models", "lama"], "--models has 'lama'; did you mean llama? there are"),
        (["--seeds", "2"], "--seeds has 2 numbers; give one"),
        (["--processes", "0"], "--processes is 0; it must be at least 1"),
        (["--quick", "--plan", "a.toml"], "--quick is a plan of its own; leave it out"),
        (["--plan", "none.toml"], "no recipe 'none.toml'"),
        (["--held-out", "8", "--context", "2048", "--tokens", "9000"], "are held out"),
        (["--sizes", "20x2"], "a width of 20 cannot be divided into heads"),
        (
            ["--match", "flops", "--context", "100000", "--tokens", "900000"],
            "cannot have the flops",
        ),
    ],
)
def test_mistakes_are_one_line(text, words, message):
    done = run(*words, without="--tokens 320" if "--tokens" in words else "")
    assert done.code == 2 and done.err.count("\n") == 1
    assert message in done.err, done.err


def test_missing_data_is_one_line(text):
    assert "no data; name a text file" in call("compare").err
    assert "no such file" in call("compare", "nothing.txt").err
    assert "no folder" in call("report", "nothing").err


def test_another_comparison_is_not_mixed_with_the_one_in_the_folder(text):
    assert run("--no-costs").code == 0
    other = run("--no-costs", "--clip", 0.5)
    assert other.code == 2 and "was made with clip 1.0, not 0.5" in other.err


def test_a_plan_is_options_that_the_command_line_replaces(text):
    Path("plan.toml").write_text('sizes = ["24x1"]\nseeds = [1]\ntokens = [900]\nbatch = 2\n')
    done = call(
        "compare",
        "text.jsonl",
        "--plan",
        "plan.toml",
        "--dry-run",
        *WORDS.replace("--sizes 16x1 ", "").split(),
    )
    assert done.code == 0 and "rwkv4 24x1" in done.out
    Path("plan.toml").write_text("size = 3\n")
    wrong = call("compare", "text.jsonl", "--plan", "plan.toml")
    assert "no option 'size'; did you mean sizes?" in wrong.err


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_a_plan_that_comes_with_the_project_can_be_made(path):
    options = apply_recipe(Options(), path).compare
    entries = make_plan(options, int(options.tokenizer.removeprefix("bpe:"))).entries
    sizes = [x.counts.non_embedding for x in entries if x.family == "rwkv4"]
    assert max(sizes) >= 4e6 and max(sizes) >= 8 * min(sizes)
    assert max(options.tokens) >= 10_000_000
    assert {*tomllib.loads(path.read_text())} >= {"sizes", "seeds", "tokens", "learning_rates"}


def test_quick_is_a_comparison_of_its_own_that_options_change():
    options = parse(Options, ["a", "--seeds", "1"], "", Options(compare=compare.QUICK))
    assert options.compare.sizes == compare.QUICK.sizes and options.compare.seeds == (1,)
