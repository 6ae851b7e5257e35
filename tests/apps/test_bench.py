"""receptance bench: what it measures, and what is left when it is stopped."""

import json
import math
import signal
import subprocess
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import make_model

from receptance import config
from receptance.apps import bench
from receptance.config import ModelConfig
from receptance.engine import load_engine
from receptance.formats.names import tensor_shapes
from receptance.inference import measure
from receptance.model import Model
from receptance.storage.checkpoint import save
from receptance.tokenizer import ByteTokenizer

QUICK = [
    "--seconds",
    "0.001",
    "--batches",
    "1",
    "--batches",
    "2",
    "--prefill",
    "5",
    "--threads",
    "1",
]
FIGURES = {"bandwidth", "load s", "first token s", "weights", "bytes per token", "resident"}
FIGURES |= {"batch 1 tokens/s", "batch 2 tokens/s", "prompt of 5 tokens/s"}


@pytest.fixture(autouse=True)
def small_bandwidth_buffer(monkeypatch):
    monkeypatch.setattr(measure, "_BANDWIDTH_BYTES", 1 << 16)


@pytest.fixture
def ticking(monkeypatch) -> None:
    """A clock that goes on by a second whenever somebody looks at it."""
    clock = SimpleNamespace(perf_counter=count().__next__)
    monkeypatch.setattr(measure, "time", clock)
    monkeypatch.setattr(bench, "time", clock)


@pytest.fixture
def model(tmp_path) -> str:
    save(make_model(), tmp_path / "model", ByteTokenizer())
    return str(tmp_path / "model")


@pytest.mark.slow
def test_every_type_is_measured_in_a_process_of_its_own(model, tmp_path, capsys):
    out = tmp_path / "figures.json"
    bench.main([model, *QUICK, "--dtypes", "float32", "--dtypes", "bfloat16", "--json", str(out)])
    shown = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["model"] == model and found["sizes"]["width"] == 16
    assert found["read bytes/s"] == max(x["bandwidth"] for x in found["results"].values())
    assert found["results"].keys() == {"float32", "bfloat16"}
    weights = [figures["weights"] for figures in found["results"].values()]
    assert weights[1] < weights[0]
    for dtype in ("float32", "bfloat16"):
        assert dtype in shown
        figures = found["results"][dtype]
        assert figures.keys() >= FIGURES
        assert all(math.isfinite(figures[name]) and figures[name] > 0 for name in FIGURES)
        engine, _ = load_engine(model, dtype=dtype)
        assert figures["weights"] == engine.weight_bytes
        assert figures["bytes per token"] == engine.bytes_per_token
        step = figures["batch 2 tokens/s"] / 2 * figures["bytes per token"]
        share = figures["batch 2 tokens/s, share of the memory limit"]
        assert share == pytest.approx(step / found["read bytes/s"])
    assert all(word in shown for word in ("GB/s", "batch 2", "memory limit", "prompt of 5"))


@pytest.mark.usefixtures("ticking")
def test_random_weights_of_a_published_size(monkeypatch):
    """Each figure by a clock on which everything takes a second."""
    small = ModelConfig(vocab_size=300, width=32, num_layers=2)
    monkeypatch.setitem(config.PUBLISHED_SIZES, "tiny", small)
    options = bench.Options(size="tiny", dtypes=("float32",), seconds=1e-3, prefill=(3,))
    with bench._model(options) as source:
        named = bench.Options(model=source, dtypes=("float32",), seconds=1e-3, prefill=(3,))
        found = {}
        for figures in bench.measure_one(named, "tiny"):
            found |= figures
    assert found["about"]["model"] == "random weights of tiny"
    assert found["about"]["sizes"] == small.to_dict()
    assert (found["load s"], found["first token s"]) == (1, 1)
    speeds = {name: figure for name, figure in found.items() if name.endswith("tokens/s")}
    assert speeds == {
        "batch 1 tokens/s": 8,
        "batch 4 tokens/s": 32,
        "batch 16 tokens/s": 128,
        "prompt of 3 tokens/s": 3,
    }


def test_ctrl_c_leaves_what_was_measured(model, tmp_path, monkeypatch, capsys):
    def stopped(options, source, dtype):
        if dtype == "int8":
            raise KeyboardInterrupt
        yield {"bandwidth": 1e9}
        about = {"model": "x", "machine": {"cpu": "y", "instructions": "z", "threads": 1}}
        yield {"load s": 0.25, "bytes per token": 10, "about": about}
        yield {"batch 1 tokens/s": 5e7}

    monkeypatch.setattr(bench, "_in_a_process", stopped)
    out = tmp_path / "figures.json"
    with pytest.raises(KeyboardInterrupt):
        bench.main([model, *QUICK, "--dtypes", "float32", "--dtypes", "int8", "--json", str(out)])
    assert "0.25" in (shown := capsys.readouterr().out) and "5e+07" in shown and " 50" in shown
    result = json.loads(out.read_text())["results"]["float32"]
    assert result["batch 1 tokens/s, share of the memory limit"] == 0.5
    assert result["batch 2 tokens/s, share of the memory limit"] is None


def test_a_measurement_that_nobody_waits_for_is_ended(tmp_path, monkeypatch):
    started = []

    class Process(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(bench.subprocess, "Popen", Process)
    endless = tmp_path / "endless"
    endless.write_text("#!/bin/sh\necho '{}'\nexec sleep 1000\n")
    endless.chmod(0o755)
    monkeypatch.setattr(bench.sys, "executable", str(endless))
    figures = bench._in_a_process(bench.Options(), "x", "float32")
    assert next(figures) == {}
    figures.close()
    assert [process.returncode for process in started] == [-signal.SIGKILL]


@pytest.mark.slow
def test_what_cannot_be_measured_is_said(model, tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="absent"):
        bench.main([str(tmp_path / "absent"), *QUICK])
    with pytest.raises(ValueError, match="the published sizes are 169m"):
        bench.main(["--size", "1t"])
    monkeypatch.setattr(bench.sys, "executable", "false")
    with pytest.raises(ValueError, match="measured float32 ended with 1; is there enough memory"):
        bench.main([model, *QUICK])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prefill": (4, 0)}, "0 rows or tokens; give at least 1"),
        ({"threads": -1}, "threads is -1; wanted 1 to 1024"),
        ({"threads": 10**20}, "wanted 1 to 1024"),
        ({"json": Path()}, "is a folder; give --json the name of a file"),
        ({"json": Path("no/where.json")}, "there is no folder no to write no/where.json into"),
        ({"seconds": float("nan")}, "seconds is nan"),
        ({"model": "run", "size": "7b"}, "--size is for random weights"),
    ],
)
def test_options_are_checked(fields, words):
    with pytest.raises(ValueError, match=words):
        bench._check(bench.Options(**fields))


@pytest.mark.parametrize("content", ["text", '{"width": 16}', "[]", "null", "["])
def test_only_figures_are_replaced(content, model, tmp_path, monkeypatch):
    """It is refused before anything is measured."""
    monkeypatch.setattr(bench, "_measure_all", lambda *_: pytest.fail("too late"))
    out = tmp_path / "figures.json"
    out.write_text(content)
    with pytest.raises(ValueError, match=r"figures\.json: what is there is not a file of figures"):
        bench.main([model, "--json", str(out)])
    assert out.read_text() == content


@pytest.mark.slow
@pytest.mark.parametrize("content", ["", '{"read bytes/s": 1.0, "results": {}}'])
def test_figures_are_replaced(content, model, tmp_path):
    out = tmp_path / "figures.json"
    out.write_text(content)
    bench.main([model, *QUICK, "--dtypes", "float32", "--json", str(out)])
    assert json.loads(out.read_text())["results"].keys() == {"float32"}


# ---- the measurements ---------------------------------------------------------------------------


def test_speeds_are_tokens_over_time(monkeypatch):
    """With a clock on which every call of the model takes two milliseconds, and nothing else."""
    calls = 0

    class Counted(Model):
        def features(self, *arguments, **options):
            nonlocal calls
            calls += 1
            return super().features(*arguments, **options)

    clock = SimpleNamespace(perf_counter=lambda: 2e-3 * calls)
    monkeypatch.setattr(measure, "time", clock)
    model = Counted(ModelConfig(vocab_size=64, width=4, num_layers=1)).eval()
    assert measure.decode_speed(model, 1, 0.02) == pytest.approx(500)
    assert measure.decode_speed(model, 3, 0.02) == pytest.approx(1500)
    assert measure.prefill_speed(model, 100, 0.02) == pytest.approx(50_000)
    assert measure.first_token(model) == pytest.approx(2e-3)


def test_bytes_of_a_token_are_those_of_all_but_the_embedding():
    model = make_model(300, width=16)
    every = sum(4 * x.numel() for x in model.parameters())
    assert model.weight_bytes == every
    assert model.bytes_per_token == every - 4 * 300 * 16


@pytest.mark.usefixtures("ticking")
def test_without_kernels_torch_reads_the_memory(monkeypatch):
    monkeypatch.setattr(measure.native, "library", lambda: None)
    assert measure.read_bandwidth() == (1 << 16, "torch.sum of int64")


def test_random_weights_are_those_of_a_model_in_use():
    sizes = ModelConfig(vocab_size=300, width=64, num_layers=3)
    tensors = measure.random_tensors(sizes, seed=1)
    assert {name: x.shape for name, x in tensors.items()} == tensor_shapes(sizes)
    assert all(x.isfinite().all() and x.all() for x in tensors.values())
    model = Model.from_tensors(sizes, tensors)
    with torch.no_grad():
        logits, _ = model(torch.arange(0, 300, 6)[None])
    assert 0.1 < logits.std() < 10
    again = measure.random_tensors(sizes, seed=1)
    assert all(torch.equal(x, again[name]) for name, x in tensors.items())


def test_numbered_tokens_are_a_vocabulary_of_any_size():
    tokenizer = measure.NumberedTokens(70_000)
    assert tokenizer.vocab_size == 70_000
    assert tokenizer.encode(tokenizer.decode([7, 69_999])) == [7, 69_999]


@pytest.mark.parametrize(("version", "narrow"), [(4, True), (5.0, False)])
def test_types_that_no_kernel_runs_are_left_out(version, narrow, tmp_path, monkeypatch):
    model = make_model(width=64, version=version)
    save(model, tmp_path / "model", ByteTokenizer())
    figures = {"about": {"sizes": model.config.to_dict()}, "load s": 1.0}
    monkeypatch.setattr(bench, "_in_a_process", lambda *_: iter([dict(figures)]))
    monkeypatch.setattr(bench.native, "is_available", lambda: True)
    findings = bench.Findings()
    bench._measure_all(bench.Options(), str(tmp_path / "model"), findings)
    assert list(findings.results) == ["float32", "bfloat16", *["int8", "int4"] * narrow]
