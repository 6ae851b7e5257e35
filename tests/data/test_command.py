"""receptance data, called in-process, and a process of it that is stopped."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command import call
from tiny import TEXT, make_model, small_bpe

from receptance.apps.data import length_histogram
from receptance.data import TokenFiles
from receptance.storage.checkpoint import save
from receptance.tokenizer import load_tokenizer


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "[ü] text.txt").write_text(TEXT)
    return tmp_path / "[ü] text.txt"


def test_prepare_and_inspect(text, tmp_path):
    done = call("data", "prepare", text, "--out", tmp_path / "out", "--tokenizer", "bpe:300")
    assert (done.code, done.err) == (0, "")
    corpus = TokenFiles.open(tmp_path / "out")
    assert f"{len(corpus.train):,} training and {len(corpus.validation):,}" in done.out
    assert load_tokenizer(tmp_path / "out").vocab_size == 300
    seen = call("data", "inspect", tmp_path / "out")
    assert (seen.code, seen.err) == (0, "")
    assert f"{len(corpus.train):,} tokens in 1 document" in seen.out
    assert "begins with  '0 little foxes" in seen.out and "bpe, 300 ids" in seen.out


def test_inspect_needs_a_tokenizer_to_decode_bare_files(tmp_path):
    np.save(tmp_path / "x.npy", np.frombuffer(b"a text\0" * 200, np.uint8))
    assert "97 32 116" in call("data", "inspect", tmp_path / "x.npy").out
    seen = call("data", "inspect", tmp_path / "x.npy", "--tokenizer", "bytes")
    assert "'a text\\x00'" in seen.out and "7 █ 7 tokens per document, median 7" in seen.out


@pytest.mark.parametrize("place", [3, -1])  # training, validation
def test_inspect_finds_tokens_of_another_tokenizer(place, tmp_path):
    tokens = np.full(200, 65, np.uint16)
    tokens[place] = 300
    np.save(tmp_path / "x.npy", tokens)
    seen = call("data", "inspect", tmp_path / "x.npy", "--tokenizer", "bytes")
    assert (seen.code, seen.err.count("\n")) == (2, 1)
    assert "a token id is 300 and the vocabulary 256" in seen.err


def test_merge_reads_what_prepare_wrote_for_others(text, tmp_path):
    small_bpe().save(tmp_path)
    tokenizer = ("--tokenizer", tmp_path / "tokenizer.json")
    made = call("data", "prepare", text, "--out", tmp_path / "one", *tokenizer,
                "--format", "binidx")  # fmt: skip
    assert (made.code, made.err) == (0, "")
    done = call("data", "merge", tmp_path / "one", "--out", tmp_path / "two", *tokenizer)
    assert (done.code, done.err) == (0, "")
    one, two = (TokenFiles.open(tmp_path / name) for name in ("one", "two"))
    assert np.array_equal(one.train, two.train)
    assert not (tmp_path / "two/train.idx").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prepare", "--out", "x", "--tokenizer", "bytes"], "no sources"),
        (["prepare", "none.txt", "--out", "x", "--tokenizer", "bytes"], "no such file"),
        (["prepare", "TEXT", "--out", "x", "--tokenizer", "bpe:no"], "say how many"),
        (["prepare", "TEXT", "--out", "x", "--tokenizer", "none.json"], "none.json"),
        (["prepare", "TEXT", "--out", "TEXT", "--tokenizer", "bytes"], "is a file; name a folder"),
        (["merge", "--out", "x", "--tokenizer", "bytes"], "no shards"),
        (["merge", "TEXT", "--out", "x", "--tokenizer", "bytes"], "is not a whole .npy"),
        (["inspect", "none"], "no readable token files"),
    ],
)
def test_refusals_are_one_line(words, message, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call("data", *(text if word == "TEXT" else word for word in words))
    assert done.code == 2
    assert message in done.err and done.err.count("\n") == 1


def test_a_checkpoint_is_no_place_for_tokens(text, tmp_path):
    save(make_model(300), tmp_path / "model", small_bpe(300))
    before = sorted((tmp_path / "model").rglob("*"))
    for out in ("model", "model/tokens"):
        done = call("data", "prepare", text, "--out", tmp_path / out, "--tokenizer", "bytes")
        assert done.code == 2 and done.err.count("\n") == 1
        assert "is a model or checkpoint, which files added to it would spoil" in done.err
    assert sorted((tmp_path / "model").rglob("*")) == before


def test_the_histogram_counts_powers_of_two():
    assert length_histogram(np.array([1])) == "1 █ 1 tokens per document, median 1"
    lengths = np.array([2] * 8 + [4, 5] * 2 + [40])
    assert length_histogram(lengths) == "2 █▄  ▁ 40 tokens per document, median 2"


# Small pieces, of which the first is finished when the signal comes.
STOPPED = """
import os
import sys
from receptance.__main__ import main
from receptance.data import plan, prepare, sources

# The function hides the module of its name.
shown = sys.modules[prepare.__module__]._Shown

if __name__ == "__main__":
    number = int(sys.argv.pop())
    plan.PIECE_BYTES = sources.PIECE_BYTES = 20_000
    shown.finished = lambda self, report: os.kill(os.getpid(), number)
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no kill -9 here")
@pytest.mark.parametrize(("end", "code"), [("SIGINT", 130), ("SIGKILL", -9)])
def test_a_stopped_run_goes_on(end, code, tmp_path, monkeypatch):
    """What comes out in the end is what would have come out, and no process is left."""
    lines = "".join(json.dumps({"text": f"{n} {TEXT[n : n + 900]}"}) + "\n" for n in range(1000))
    (tmp_path / "a.jsonl").write_text(lines)
    small_bpe().save(tmp_path)
    arguments = [
        "data",
        "prepare",
        tmp_path / "a.jsonl",
        "--tokenizer",
        tmp_path / "tokenizer.json",
    ]
    script = tmp_path / "script.py"
    script.write_text(STOPPED)
    words = [*arguments, "--workers", 1, "--out", tmp_path / "out", int(getattr(signal, end))]
    command = [sys.executable, str(script), *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=600)  # until all have ended
    assert done.returncode == code
    assert ("the same command goes on" in done.stdout.decode()) == (end == "SIGINT")
    assert (tmp_path / "out/parts/00000000.json").exists()
    assert not (tmp_path / "out/data.json").exists()
    for name in ("out", "whole"):
        monkeypatch.setattr("receptance.data.sources.PIECE_BYTES", 20_000)
        monkeypatch.setattr("receptance.data.plan.PIECE_BYTES", 20_000)
        done = call(*arguments, "--workers", 0, "--out", tmp_path / name)
        assert done.code == 0, done.err
    assert len({TokenFiles.open(tmp_path / name).fingerprint for name in ("out", "whole")}) == 1
