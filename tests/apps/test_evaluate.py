"""receptance evaluate: what is printed, written, refused, and kept after an interruption."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from command import call
from tiny import TEXT, make_model, small_bpe

from receptance import save
from receptance.evaluation.results import Result


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save(make_model(300), folder / "ours", small_bpe(300))
    save(make_model(300, seed=2), folder / "other", small_bpe(300))
    return folder


@pytest.fixture
def text(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    lines = (json.dumps({"text": TEXT[n : n + 400]}) for n in range(0, 2000, 400))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_text(TEXT[:300])
    return tmp_path


def test_text(model, text):
    words = ["--text", "a.jsonl", "--text", "b.txt", "--out", "found.json"]
    done = call("evaluate", model / "ours", model / "other", *words)
    assert (done.code, done.err) == (0, "")
    assert "each document by itself, with carried state" in done.out
    assert "95 % over 6 documents" in done.out and "written to found.json" in done.out
    result = Result.load(Path("found.json"))
    assert result.kind == "text" and [each.name for each in result.models] == ["ours", "other"]
    assert {each.name for each in result.data} == {"a.jsonl", "b.txt"}
    figures = {(each.model, each.name): each for each in result.figures}
    assert figures["ours", "bits per byte"].value != figures["other", "bits per byte"].value
    assert len(result.details["ours"]["by document"]["nats"]) == 6
    assert sorted(path.name for path in text.iterdir()) == ["a.jsonl", "b.txt", "found.json"]


def test_windows_are_labeled(model, text):
    done = call("evaluate", model / "ours", "--text", "b.txt", "--max-length", "16")
    assert done.code == 0 and "in windows of 16 tokens" in done.out


def test_positions_are_drawn(model, text):
    words = ["--text", "a.jsonl", "--positions", "100", "--plot", "p.png", "--out", "p.json"]
    done = call("evaluate", model / "ours", model / "other", *words)
    assert done.code == 0 and "5 documents have 100 tokens or more" in done.out
    assert Path("p.png").read_bytes().startswith(b"\x89PNG")
    result = Result.load(Path("p.json"))
    assert result.kind == "positions" and [each.model for each in result.curves] == [
        "ours",
        "other",
    ]


def test_lambada_says_its_protocols(model, text):
    Path("l.jsonl").write_text(json.dumps({"text": TEXT[:80].strip()}) + "\n")
    done = call("evaluate", model / "ours", "--lambada", "l.jsonl")
    assert done.code == 0
    for prefix in ("none", "newline", "token-0"):
        assert f"\n- {prefix}: " in done.out
    one = call("evaluate", model / "ours", "--lambada", "l.jsonl", "--prefix", "token-0")
    assert "newline" not in one.out and "token-0" in one.out


def test_recall_at_several_lengths(model, text):
    settings = [f"--settings=pairs=2,vocabulary=16,length={length}" for length in (16, 32)]
    words = ["--recall", "mqar", *settings, "--limit", "3", "--out", "r.json"]
    done = call("evaluate", model / "ours", *words)
    assert (done.code, done.err) == (0, "")
    assert "mqar, accuracy, pairs 2, length 32" in done.out
    result = Result.load(Path("r.json"))
    assert [each.x for each in result.curves] == [[16.0, 32.0]]
    assert {each.about["sequences"] for each in result.figures} == {3}


def test_tasks(model, text):
    pytest.importorskip("lm_eval")
    Path("task.yaml").write_text(
        "task: mine\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {text / 'a.jsonl'}}}}}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{text}}"\n'
        'doc_to_choice: ["fox", "dog"]\ndoc_to_target: 0\n'
    )
    words = ["--tasks", "task.yaml", "--out", "t.json", "--samples", "1"]
    for kept in (0, 10):
        done = call("evaluate", model / "ours", *words)
        assert (done.code, done.err) == (0, "")
        assert "mine, acc" in done.out and "were spared" in done.out
        assert "--- mine, document 0" in done.out
        result = Result.load(Path("t.json"))
        assert result.details["ours"]["answers kept from before"] == kept
    assert result.details["ours"]["harness"]["results"]["mine"]["sample_len"] == 5
    assert "lm_eval" in result.versions
    other = call("evaluate", model / "other", *words)
    assert other.code == 2 and "another model" in other.err


def test_ctrl_c_keeps_what_was_computed(model, text, monkeypatch):
    from receptance.evaluation.texts import scoring

    reader = scoring.Reader.step
    steps = []

    def stop(self):
        if len(steps) == 2:
            raise KeyboardInterrupt
        steps.append(1)
        return reader(self)

    words = ["evaluate", model / "ours", "--text", "a.jsonl", "--out", "found.json"]
    with monkeypatch.context() as patch:
        patch.setattr(scoring.Reader, "step", stop)
        done = call(*words)
    assert done.code == 130 and "the same command goes on" in done.err
    assert Path("found.json.progress").is_file() and not Path("found.json").exists()
    done = call(*words)
    assert done.code == 0
    whole = Result.load(Path("found.json")).figures[0].value
    call("evaluate", model / "ours", "--text", "a.jsonl", "--out", "again.json")
    assert Result.load(Path("again.json")).figures[0].value == pytest.approx(whole, rel=1e-6)
    assert not list(text.glob("*.progress*"))


def test_without_the_harness_one_line_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "receptance.evaluation.benchmarks.harness", raising=False)
    monkeypatch.delattr("receptance.evaluation.benchmarks.harness", raising=False)
    done = call("evaluate", model / "ours", "--tasks", "piqa")
    assert done.code == 2 and done.err.count("\n") == 1
    assert "pip install lm-eval==0.4.13" in done.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--text b.txt", "MODEL is missing"),
        ("ours", "nothing is to be measured; give one of --text"),
        ("ours --text b.txt --lambada l.jsonl", "--text and --lambada is to be measured"),
        ("ours --text none.txt", "no such file"),
        ("ours --text b.txt --num-fewshot 2", "--num-fewshot is for --tasks and --preset"),
        ("ours --text b.txt --plot p.png", "give --positions too"),
        ("ours --text b.txt --positions 1", "--positions is 1"),
        ("ours --text b.txt --positions 5000", "no document has 5,000 tokens"),
        ("ours --text b.txt --positions 9 --whole", "leave out --whole"),
        ("ours --text b.txt --max-length 0", "--max-length is 0"),
        ("ours --text b.txt --limit 0", "--limit is 0"),
        ("ours ours --text b.txt", "a model is named twice"),
        ("ours --text b.txt --out none/a.json", "there is no folder none"),
        ("ours --text b.txt --out b.txt", "not a result"),
        ("ours --text a.jsonl --text-field body", "no field 'body'"),
        ("ours --enwik8 b.txt", "bytes and enwik8 has 100,000,000"),
        ("ours --lambada b.txt", "line 1"),
        ("ours --tasks t.yaml", "no file t.yaml"),
        ("ours --recall mqa", "no task 'mqa'; did you mean mqar?"),
        ("ours --recall mqar --settings pair=2", "did you mean pairs?"),
        ("ours --recall passkey", "name a text file with --source"),
        ("ours --text b.txt --settings pairs=2", "--settings is for --recall"),
        ("ours --tasks a --prefix newline --prefix token-0", "tasks have one --prefix"),
        ("ours --tasks a --lambada b.txt", "add --tasks lambada_openai"),
        ("none --text b.txt", "none"),
    ],
)
def test_mistakes_are_one_line(model, text, words, said):
    if "--tasks t.yaml" in words:
        pytest.importorskip("lm_eval")
    first = [model / word if word in ("ours", "none") else word for word in words.split()]
    done = call("evaluate", *first)
    assert done.code == 2
    assert said in done.err and done.err.count("\n") == 1
    assert not list(text.glob("*.progress*"))
