"""receptance train --task: labeled sequences on the command line."""

from __future__ import annotations

import json

import pytest
from command import call

from receptance.evaluation.results import Result
from receptance.storage.sequences import load_sequence_model

SMALL = "--width 16 --layers 1 --batch 4 --steps 4 --learning-rate 1e-2 --reports 1 --device cpu"
LISTOPS = "train=20,validation=4,test=4,min_length=3,max_length=20"


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Pictures take longer than these runs, and have tests of their own."""
    monkeypatch.setattr("receptance.plots.draw_losses", lambda *_: None)


@pytest.fixture
def records(tmp_path):
    """A file of labeled texts."""
    path = tmp_path / "a.jsonl"
    lines = [{"text": f"{'good' if n % 2 else 'bad'} {n}", "label": n % 2} for n in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def train(*words: object):
    return call("train", *words, *SMALL.split())


class TestTasks:
    def test_a_classifier(self, records, tmp_path):
        done = train(records, "--task", "classify", "--out", tmp_path / "run", "--bidirectional")
        assert done.code == 0, done.err
        assert "32 examples to train on, 4 for validation, 4 for the test" in " ".join(
            done.out.split()
        )
        (figure,) = Result.load(tmp_path / "run/result.json").figures
        assert figure.name == "accuracy" and f"test: accuracy {figure.value:.4f}" in done.out
        model, about = load_sequence_model(tmp_path / "run")
        assert about["names"] == ["0", "1"] and model.config.bidirectional

    def test_a_forecaster(self, tmp_path):
        (tmp_path / "a.csv").write_text("x,y\n" + "".join(f"{n % 7},{n}\n" for n in range(200)))
        words = ["--task", "forecast", "--history", "8", "--horizon", "2"]
        done = train(tmp_path / "a.csv", *words, "--out", tmp_path / "run")
        assert done.code == 0, done.err
        assert "test: mean squared error" in done.out
        model, about = load_sequence_model(tmp_path / "run")
        assert model.config.outputs == 4 and about["names"] == ["x", "y"]
        assert len(about["mean"]) == 2

    def test_a_benchmark_that_is_generated(self, tmp_path):
        words = ["--task", "classify", "--setting", LISTOPS, "--out", tmp_path / "run"]
        done = train("listops", *words)
        assert done.code == 0, done.err
        assert Result.load(tmp_path / "run/result.json").notes == ["Guessing gives 0.1."]


class TestGoingOn:
    def test_resuming_keeps_everything_but_the_end(self, records, tmp_path):
        run = tmp_path / "run"
        words = ["--task", "classify", "--pooling", "last", "--out", run]
        assert train(records, *words).code == 0
        done = call("train", "--resume", "--out", run, "--steps", 6)
        assert done.code == 0, done.err
        assert "resumed at step 4" in done.out
        assert load_sequence_model(run)[0].config.pooling == "last"
        for words, message in [
            (["--width", 32], "was started with width 16"),
            (["--pooling", "mean"], "keeps how it reads its sequences"),
            (["--task", "regress"], "was started with --task classify"),
        ]:
            assert message in call("train", "--resume", "--out", run, *words).err

    def test_data_that_has_changed_is_refused(self, records, tmp_path):
        run = tmp_path / "run"
        assert train(records, "--task", "classify", "--out", run).code == 0
        records.write_text(records.read_text().replace("good", "fine"))
        done = call("train", "--resume", "--out", run, "--steps", 6)
        assert "does not hold what the run was started with" in done.err

    def test_auto_resume_begins_and_goes_on(self, records, tmp_path):
        words = [records, "--task", "classify", "--out", tmp_path / "run", "--auto-resume"]
        assert train(*words).code == 0
        assert "resumed at step 4" in train(*words).out

    def test_a_second_run_in_a_folder_is_refused(self, records, tmp_path):
        words = [records, "--task", "classify", "--out", tmp_path / "run"]
        assert train(*words).code == 0
        assert "already holds a run" in train(*words).err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{} --task classify --tokenizer bytes", "tokenizer is about text"),
        ("{} --task classify --context 8", "context is about text"),
        ("{} --task classify --sample-prompt hi", "sample_prompt is about text"),
        ("{} --task classify --horizon 4", "horizon is for forecasts"),
        ("{} --task forecast --pooling last", "leave setting, pooling"),
        ("{} --task regress", ""),
        ("{} {} --task classify", "2 sources"),
        ("nothing --task classify", "there is nothing at nothing"),
        ("{} --task classify --setting train=3", "setting is for benchmarks"),
        ("listops --task regress", "listops has classes"),
        ("{} --pooling last", "name what to learn with --task"),
        ("{} --task classify --dry-run", "--dry-run is about text"),
        ("{} --task sort", "--task is 'sort'; it must be one of"),
    ],
)
def test_mistakes_are_one_line(records, tmp_path, words, message):
    (tmp_path / "labels.jsonl").write_text('{"text": "a", "label": "x"}\n')
    source = tmp_path / "labels.jsonl" if "regress" in words else records
    done = train(*words.format(source, source).split(), "--out", tmp_path / "run")
    assert done.code == 2 and message in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_a_run_is_no_language_model(records, tmp_path):
    assert train(records, "--task", "classify", "--out", tmp_path / "run").code == 0
    assert "no language model" in call("generate", tmp_path / "run", "hi").err
    assert "sequence model" in call("inspect", tmp_path / "run").out
    assert "no language model" in call("verify", tmp_path / "run").err
