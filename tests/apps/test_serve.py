"""receptance serve: its options, and a process that is asked, interrupted and started again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from command import call
from tiny import make_model

import receptance
from receptance.adapters import LoRAOptions, StateTuningOptions, make_adapter
from receptance.tokenizer import ByteTokenizer

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
        (["tiny-python", "--budget", "1"], "--budget is 1 MiB and tiny-python has 4."),
        (["tiny-python", "x=pyproject.toml"], "weights are read from"),
        (["tiny-python", "..=tiny-python"], "'..' cannot be the name of a model"),
        (["tiny-python", "--drain-seconds", "inf"], "--drain-seconds is inf"),
        (["tiny-python", "nowhere"], "no such file or directory: nowhere"),
        (["tiny-python", "--adapters", "a=none.safetensors"], "none.safetensors does not exist"),
        (["tiny-python", "--adapters", "a=pyproject.toml"], "choose their type with --dtype"),
        (
            ["tiny-python", "--adapters", "a=none.safetensors", "--dtype", "float32"],
            "none.safetensors does not exist",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(words, said, tmp_path, monkeypatch):
    pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    monkeypatch.chdir(tmp_path)
    Path("pyproject.toml").write_text("[project]")
    result = call("serve", *words)
    assert result.code == 2 and said in result.err and result.err.count("\n") == 1


@contextmanager
def process(
    folder: Path, *words: str, models: Sequence[str] = ("tiny-python",)
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server as a process of its own, and its address."""
    pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    command = [sys.executable, "-m", "receptance", "serve", *models, "--port", "0", *words]
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


def ask(url: str, prompt: str, model: str = "tiny-python") -> dict:
    body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=500).json()


def wait_for(true: Callable[[], bool]) -> None:
    """Wait for something that a server does."""
    for _ in range(5000):
        if true():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it never came")


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_restart_remembers_what_was_said(tmp_path, end):
    prompt = "class Queue:\n    def __init__(self, size):"
    with process(tmp_path, "--cache-dir", "states", "--quiet") as (url, running):
        first = ask(url, prompt)
        if end == signal.SIGKILL:  # what was written by then counts
            folder = tmp_path / "states" / "tiny-python"
            wait_for(lambda: len(list(folder.glob("*.state"))) == 2)
        running.send_signal(end)
        assert running.wait(500) in (0, 130, -end)
    with process(tmp_path, "--cache-dir", "states", "--quiet") as (url, _):
        second = ask(url, prompt)
    assert second["choices"][0]["text"] == first["choices"][0]["text"]
    usage = second["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1


@pytest.mark.slow
def test_after_sigkill_damaged_states_are_dropped_and_the_others_used(tmp_path):
    prompts = ["class Queue:\n    def __init__(self", "import os\n\n\ndef main("]
    folder = tmp_path / "states" / "tiny-python"
    options = ("--cache-dir", "states", "--quiet")
    with process(tmp_path, *options) as (url, running):
        first = ask(url, prompts[0])
        wait_for(lambda: len(list(folder.glob("*.state"))) == 2)
        theirs = set(folder.glob("*.state"))
        ask(url, prompts[1])
        wait_for(lambda: len(list(folder.glob("*.state"))) == 4)
        running.kill()
        running.wait(500)
    for path in set(folder.glob("*.state")) - theirs:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    (folder / ".begun.partial").write_bytes(b"a write that SIGKILL cut off")
    (folder / f"{'a' * 64}.state").write_bytes(b"a state without its text")
    with process(tmp_path, *options) as (url, _):
        assert not list(folder.glob(".*.partial")) and not list(folder.glob("aaaa*"))
        again = ask(url, prompts[0])
        assert again["choices"] == first["choices"]
        for answer, cached in ((again, -1), (ask(url, prompts[1]), None)):
            usage = answer["usage"]
            wanted = 0 if cached is None else usage["prompt_tokens"] + cached
            assert usage["prompt_tokens_details"]["cached_tokens"] == wanted
        metrics = httpx.get(f"{url}/metrics").text
        assert 'cache_lookups_total{model="tiny-python",outcome="damaged"} 1.0' in metrics


@pytest.mark.slow
def test_models_and_adapters_are_chosen_by_request_and_come_back(tmp_path):
    """Each answers as it does alone, with a budget that has room for one of them at a time."""
    model = make_model(width=256, layers=3)
    receptance.save(model, tmp_path / "model", ByteTokenizer())
    for kind, options in (
        ("lora", LoRAOptions(rank=2)),
        ("learned", StateTuningOptions(start_key=3.0)),
    ):
        adapter = make_adapter(model, options)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
        adapter.save(tmp_path / f"{kind}.safetensors", model.fingerprint())
    prompt, names = "class Queue:\n    def", ("m", "other", "m:lora", "m:learned")
    words = ["--cache-dir", "states", "--adapters", "lora=lora.safetensors"]
    words += ["--adapters", "learned=learned.safetensors"]
    words += ["--budget", str(int(model.weight_bytes * 1.5) >> 20)]
    with process(tmp_path, *words, models=["m=model", "other=model"]) as (url, _):
        listed = httpx.get(f"{url}/v1/models").json()["data"]
        assert [(one["id"], one["loaded"]) for one in listed] == [(n, n == "m") for n in names]
        first = {name: ask(url, prompt, name) for name in names}
        listed = httpx.get(f"{url}/v1/models").json()["data"]
        assert [one["id"] for one in listed if one["loaded"]] == ["m:learned"]
        texts = {name: found["choices"][0]["text"] for name, found in first.items()}
        for name in names:  # their states were kept on disk while they were away
            again = ask(url, prompt, name)
            assert again["choices"][0]["text"] == texts[name]
            usage = again["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1
        assert httpx.post(f"{url}/v1/unload/other").json()["loaded"] is False
        assert httpx.post(f"{url}/v1/load/m:lora", timeout=500).json()["loaded"] is True
    assert texts["m"] == texts["other"]
    assert len({texts[name] for name in names[1:]}) == 3
    for name in ("lora", "learned"):
        file = tmp_path / f"{name}.safetensors"
        alone, tokenizer = receptance.load_engine(tmp_path / "model", adapter=file)
        found = receptance.generate(alone, tokenizer, prompt, max_tokens=8, temperature=0)
        assert texts[f"m:{name}"] == found


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_stream_and_the_process(tmp_path, end):
    body = {"model": "tiny-python", "prompt": "x", "max_tokens": 16000, "ignore_eos": True}
    with process(tmp_path, "--drain-seconds", "0.3") as (url, running):
        options = {"json": {**body, "stream": True}, "timeout": 500}
        with httpx.stream("POST", f"{url}/v1/completions", **options) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(running.pid, end)
            said = [line for line in lines if line]
        assert said[-1] == "data: [DONE]" and "shutting down" in said[-2]
        assert running.wait(500) in (0, 130, -end)


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
