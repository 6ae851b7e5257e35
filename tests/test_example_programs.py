"""The programs in examples/: each runs as it is, and what it says is true."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_model

import receptance
from receptance.adapters import load_adapter
from receptance.data import TokenFiles
from receptance.tokenizer import ByteTokenizer

ROOT = Path(__file__).parents[1]
PROGRAMS = sorted((ROOT / "examples").glob("*.py"))
WITH_MODEL = [path for path in PROGRAMS if path.stem != "custom_data_source"]

pytestmark = pytest.mark.skipif(not PROGRAMS, reason="the examples are not here")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder with a model of two layers that reads bytes."""
    folder = tmp_path_factory.mktemp("examples") / "model"
    receptance.save(make_model(width=32), folder, ByteTokenizer())
    return folder


def run(folder: Path, name: str, *arguments: object) -> str:
    """What a program prints when it is started in the folder, as a user starts it."""
    command = [sys.executable, ROOT / "examples" / name, *map(str, arguments)]
    # This very package, and one thread, since more would only wait for each other here.
    source = str(Path(receptance.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"^step \d+: loss (\S+)", output, re.M)]


def test_batch_generation(model, tmp_path):
    prompts = ["a", "a longer prompt", ""]
    output = run(tmp_path, "batch_generation.py", model, *prompts, "--max-tokens", 9)
    steps = output.partition("\n\nall rows together")[0].splitlines()
    assert steps[0].split() == ["row", "0", "row", "1", "row", "2"]
    assert len(steps) == 1 + 9
    for row, prompt in enumerate(prompts):
        assert re.search(
            rf"^row {row} alone: .* tokens, the same to the bit:\n{prompt}", output, re.M
        )


def test_state_as_a_value(model, tmp_path):
    (tmp_path / "long.txt").write_text("a long text, " * 100)
    arguments = (model, "--text", "long.txt", "--state", "long.state")
    output = run(tmp_path, "state_as_a_value.py", *arguments)
    engine, _ = receptance.load_engine(model)
    state = engine.load_state(tmp_path / "long.state")
    assert state.tokens.tolist() == [1300]
    assert f"read 1,300 tokens once, into a state of {state.nbytes:,} bytes" in output
    assert "the texts are equal each time, also from the file long.state" in output
    assert len(re.findall(r"^  '\\n\\n", output, re.M)) == 3


@pytest.mark.slow
def test_fine_tuning(model, tmp_path):
    output = run(tmp_path, "fine_tuning.py", model, "--steps", 20)
    first, last = losses(output)
    assert last < first - 0.3
    before, after = re.findall(r"^(?:before|after, .*adapter.safetensors): (.*)", output, re.M)
    assert before != after
    tuned = load_adapter(tmp_path / "fine-tuned", receptance.load(model)[0])
    assert any(
        parameter.abs().max() > 0 for name, parameter in tuned.tensors().items() if "_B" in name
    )


@pytest.mark.slow
def test_custom_data_source(tmp_path):
    output = run(tmp_path, "custom_data_source.py", "--steps", 30)
    first, last = losses(output)
    assert last < first < 2  # a uniform guess would be 5.5
    corpus = TokenFiles.open(tmp_path / "diary/corpus")
    ends = (corpus.train == corpus.end_of_text).sum() + (
        corpus.validation == corpus.end_of_text
    ).sum()
    assert ends == 2000
    assert re.search(r"^Day 1: 9 degrees and rainy, so take", output, re.M)


def test_serving_rows(model, tmp_path):
    output = run(tmp_path, "serving_rows.py", model)
    events = re.findall(r"^step (\d+): (\w+) (\w+)", output, re.M)
    assert [(int(step), *rest) for step, *rest in events][:5] == [
        (0, "Ann", "arrives"),
        (0, "Bob", "arrives"),
        (5, "Cid", "arrives"),
        (8, "Dot", "arrives"),
        (12, "Bob", "goes"),
    ]
    assert "Dot arrives and waits for a slot" in output
    assert {client for _, client, event in events if event == "is"} == {"Ann", "Cid", "Dot"}
    assert "every text is that of a solo run, and Bob's is the beginning of one" in output


def call(path: Path, *arguments: str) -> object:
    """The code, or the message, with which a program leaves; it runs in this process."""
    before, sys.argv = sys.argv, [str(path), *arguments]
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as leaving:
        return leaving.code
    finally:
        sys.argv = before
    return 0


def test_fine_tuning_on_own_data(model, tmp_path, monkeypatch, capsys):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 50)
    monkeypatch.chdir(tmp_path)
    path = ROOT / "examples/fine_tuning.py"
    assert call(path, str(model), "chats.jsonl", "--steps", "20", "--ask", "Hi") == 0
    first, last = losses(capsys.readouterr().out)
    assert last < first - 0.3
    (tmp_path / "text.jsonl").write_text('{"text": "no prompt"}\n' * 50)
    message = call(path, str(model), "text.jsonl", "--out", "other")
    assert message == "text.jsonl has no records of prompts and responses"


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_help(path, capsys):
    assert call(path, "--help") == 0
    title = runpy.run_path(str(path))["__doc__"].splitlines()[0]
    assert title in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("path", WITH_MODEL, ids=lambda path: path.stem)
def test_a_model_that_is_not_there_gives_one_line(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = call(path, "./no-model")
    assert isinstance(message, str) and "no-model" in message and "\n" not in message


def test_every_program_is_tested_and_named_in_the_docs():
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    for path in PROGRAMS:
        assert f"test_{path.stem}" in globals()
        assert f"(../examples/{path.name})" in index
        assert f"python examples/{path.name}\n" in path.read_text(encoding="utf-8")
