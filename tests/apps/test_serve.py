"""receptance serve: its options, and a process that is asked, interrupted and started again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from command import call

KEY = "0123456789abcdef"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "MODEL is missing"),
        (["tiny-python", "tiny-python"], "two models are named tiny-python"),
        (["tiny-python", "--host", "0.0.0.0"], "--keys"),
        (["tiny-python", "--keys", "none.txt"], "cannot read the keys in none.txt"),
        (["tiny-python", "--keys", "x", "--anyone"], "contradict"),
        (["tiny-python", "--port", "70000"], "--port is 70000"),
        (["tiny-python", "--slots", "0"], "--slots is 0"),
        (["tiny-python", "--cache", "-1"], "--cache is -1"),
        (["tiny-python", "--wait-seconds", "0"], "--wait-seconds is 0"),
        (["tiny-python", "--adapters", "x"], "NAME=PATH"),
        (["nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_told_in_one_line(words, said, tmp_path, monkeypatch):
    pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    monkeypatch.chdir(tmp_path)
    result = call("serve", *words)
    assert result.code == 2 and said in result.err and result.err.count("\n") == 1


@contextmanager
def process(folder: Path, *words: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server as a process of its own, and its address."""
    pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    command = [sys.executable, "-m", "receptance", "serve", "tiny-python", "--port", "0", *words]
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as running:
        try:
            assert running.stdout is not None
            found = re.search(r"http://\S+", running.stdout.readline())
            assert found is not None
            yield found[0], running
        finally:
            running.kill()


def ask(url: str, prompt: str) -> dict:
    body = {"model": "tiny-python", "prompt": prompt, "max_tokens": 8, "temperature": 0}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=500).json()


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_restart_remembers_what_was_said(tmp_path, end):
    prompt = "class Queue:\n    def __init__(self, size):"
    with process(tmp_path, "--cache-dir", "states", "--quiet") as (url, running):
        first = ask(url, prompt)
        if end == signal.SIGKILL:  # what was written by then counts
            folder = tmp_path / "states" / "tiny-python"
            while len(list(folder.glob("*.state"))) < 2:
                assert running.poll() is None
        running.send_signal(end)
        assert running.wait(500) in (0, 130, -end)
    with process(tmp_path, "--cache-dir", "states", "--quiet") as (url, _):
        second = ask(url, prompt)
    assert second["choices"][0]["text"] == first["choices"][0]["text"]
    usage = second["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1


@pytest.mark.slow
def test_ctrl_c_ends_a_stream_and_the_process(tmp_path):
    body = {"model": "tiny-python", "prompt": "x", "max_tokens": 16000, "ignore_eos": True}
    with process(tmp_path, "--drain-seconds", "0.3") as (url, running):
        options = {"json": {**body, "stream": True}, "timeout": 500}
        with httpx.stream("POST", f"{url}/v1/completions", **options) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(running.pid, signal.SIGINT)
            said = [line for line in lines if line]
        assert said[-1] == "data: [DONE]" and "shutting down" in said[-2]
        assert running.wait(500) in (0, 130, -signal.SIGINT)


@pytest.mark.slow
def test_one_cache_directory_has_one_server(tmp_path):
    with process(tmp_path, "--cache-dir", "states"):
        done = subprocess.run(
            [sys.executable, "-m", "receptance", "serve", "tiny-python", "--cache-dir", "states"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=500,
        )
    assert done.returncode == 2 and "in use" in done.stderr
