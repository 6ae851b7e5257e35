"""How benchmarks/cpu_inference.py treats engines that are slow, broken or absent, and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

pytestmark = pytest.mark.skipif(
    not (BENCHMARKS / "cpu_inference.py").exists() or sys.platform != "linux",
    reason="needs the sources and processes that can be killed",
)

# Stands for every engine. It answers at once, unless the table says that it dies, or hangs and
# sends a signal to the benchmark: in its start (0), or in its first, second ... command. The
# signal is that of Ctrl-C, of `kill`, or of the end of the time that the engine has.
SERVER = """
import json, os, signal, sys, time

spec = json.loads(sys.argv[1])
open({pids!r}, "a").write(f"{{os.getpid()}}\\n")
table = {table!r}.get(spec["engine"], {{}})

def act(number):
    what = table.get(number)
    if what == "die":
        sys.exit("the library is broken")
    if what:
        os.kill(os.getppid(), signal.Signals[what])
        time.sleep(600)

act(0)
print(json.dumps({{"load s": 1, "bare": 1}}), flush=True)
for number, line in enumerate(sys.stdin, start=1):
    act(number)
    logits = [1.0, 3.0 if table.get("wrong") else 2.0]
    answer = {{"rate": 10.0 * spec["threads"], "logits": logits, "bytes per token": 1}}
    print(json.dumps(answer | {{"skipped": 0.0, "resident": 5, "weights": 2}}), flush=True)
"""


class Files:
    """Model files that nobody reads."""

    def __init__(self, folder: Path, size: str, *_: object) -> None:
        self.size = size

    def ours(self, *_: object, **__: object) -> str:
        return ""

    pth = ggmf = gguf = ours


Engines = Callable[[dict[str, dict[Any, Any]]], None]


@pytest.fixture
def benchmark(monkeypatch) -> ModuleType:
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import cpu_inference

    monkeypatch.setattr(cpu_inference, "Files", Files)
    monkeypatch.setattr(cpu_inference, "find_spec", lambda name: name)
    return cpu_inference


@pytest.fixture
def engines(benchmark, tmp_path, monkeypatch) -> Iterator[Engines]:
    """A function that sets what engines do; afterwards none of their processes may be left."""
    import _workers

    server, pids = tmp_path / "server.py", tmp_path / "pids"
    monkeypatch.setattr(_workers, "SERVER", server)
    handlers = {x: signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}

    def behave(table: dict[str, dict[Any, Any]]) -> None:
        server.write_text(SERVER.format(pids=str(pids), table=table))

    behave({})
    yield behave
    for number, handler in handlers.items():
        signal.signal(number, handler)
    left = [pid for pid in pids.read_text().split() if Path("/proc", pid).exists()]
    assert left == []


def run(benchmark: ModuleType, capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    """What the benchmark reports, with its exit code and its output."""
    words = ["--sizes", "tiny", "--sections", "decode", "--rounds", "2", "--threads", "1"]
    words += ["--budget", "600", *argv]
    with pytest.raises(SystemExit) as leaving:
        benchmark.main(words)
    out = capsys.readouterr().out
    report = json.loads(out.splitlines()[-1])
    return report["results"][found_size(words)] | {
        "report": report,
        "code": leaving.value.code,
        "out": out,
    }


def found_size(words: Sequence[str]) -> str:
    """The size that was asked for last."""
    return words[len(words) - words[::-1].index("--sizes")]


def test_budgets_are_shared(benchmark):
    from _workers import Budget

    budget = Budget(60, 2)
    with budget.share() as part:
        assert part.left == 30
        part.left = 10
    with budget.share() as part:
        assert part.left == 40


def test_a_budget_ends_a_block(benchmark):
    from _workers import Budget, OverBudget

    budget, before = Budget(0.05), signal.getsignal(signal.SIGALRM)
    with pytest.raises(OverBudget), budget.spend():
        threading.Event().wait(600)
    assert budget.left == 0
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_everybody_is_measured(benchmark, engines, capsys, tmp_path):
    file = tmp_path / "found.json"
    found = run(benchmark, capsys, "--json", str(file))
    contest = found["decode"]["float32"]
    assert found["code"] == 0 and found["report"]["complete"]
    assert list(contest) == ["memory bus", "receptance", "rwkv", "transformers"]
    assert [x["rates"] for x in contest.values()] == [[10, 10]] * 4
    assert json.loads(file.read_text()) == found["report"]
    assert "tiny checking the logits of torch float32" in found["out"]


def contest(*names: str, threads: Sequence[int] = (1,)) -> dict[str, Any]:
    """What three rounds of engines find."""
    from _workers import Budget, Contestant, Way, in_turns

    found: dict[str, Any] = {name: {} for name in names}
    running = []
    for name in names:
        way = Way(name, "float32", str, {"do": "decode", "tokens": 1})
        running.append(Contestant(name, [way], Budget(600), found[name], lambda _: None))
    in_turns(running, rounds=3, threads=threads)
    return found


def test_the_best_number_of_threads_is_kept(benchmark, engines):
    found = contest("one", threads=[1, 3, 2])["one"]
    assert found["chosen"]["threads"] == 3
    assert found["rates"] == [30, 30, 30]


def test_a_slow_engine_is_stopped_while_it_loads(benchmark, engines):
    engines({"slow": {0: "SIGALRM"}})
    found = contest("slow", "quick")
    assert found["slow"] == {"rates": [], "stopped": "over budget"}
    assert found["quick"]["rates"] == [10, 10, 10] and "stopped" not in found["quick"]


def test_making_a_model_file_is_charged(benchmark):
    from _workers import Budget, Contestant, Way

    found: dict[str, Any] = {}
    way = Way("slow", "float32", lambda: str(threading.Event().wait(600)), {"do": "logits"})
    Contestant("slow", [way], Budget(0.05), found, lambda _: None).choose([1])
    assert found == {"rates": [], "stopped": "over budget"}


def test_a_slow_engine_keeps_what_was_measured(benchmark, engines):
    engines({"slow": {4: "SIGALRM"}})  # after two trials and one round
    found = contest("slow", "quick")
    assert found["slow"]["rates"] == [10] and found["slow"]["rate"] == 10
    assert found["slow"]["stopped"] == "over budget"
    assert found["quick"]["rates"] == [10, 10, 10]


def test_a_peer_may_be_too_slow_for_its_check(benchmark, engines, capsys):
    engines({"transformers": {1: "SIGALRM"}})
    found = run(benchmark, capsys)
    checked = found["logits, relative error"]
    assert checked["transformers float32"] == {"stopped": "over budget"}
    assert checked["rwkv float32"] == 0
    assert found["decode"]["float32"]["transformers"] == {"stopped": "not checked: over budget"}
    assert found["code"] == 0
    assert "logits: transformers float32 (over budget)\n" in found["out"]


def test_a_broken_peer_is_reported(benchmark, engines, capsys):
    engines({"rwkv": {0: "die"}})
    found = run(benchmark, capsys)
    checked = found["logits, relative error"]
    assert checked["rwkv float32"] == {"stopped": "failed: the library is broken"}
    assert found["decode"]["float32"]["transformers"]["rates"] == [10, 10]
    assert found["code"] == 1


@pytest.mark.parametrize("engine", ["rwkv", "receptance"])
def test_nothing_is_timed_that_is_wrong(benchmark, engines, capsys, engine):
    engines({engine: {"wrong": True}})
    found = run(benchmark, capsys, "--peers", "rwkv")
    assert "logits are off by" in found["code"]
    assert "decode" not in found


@pytest.mark.parametrize("what", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("moment", [0, 1, 4])
def test_what_was_measured_survives_an_interrupt(
    benchmark, engines, capsys, tmp_path, what, moment
):
    """While the peer loads or computes its logits, and in its second round."""
    engines({"rwkv": {moment: what}})
    file = tmp_path / "found.json"
    found = run(benchmark, capsys, "--peers", "rwkv", "--json", str(file))
    assert found["code"] == 130 and not found["report"]["complete"]
    assert "receptance int4" in found["logits, relative error"]
    if moment == 4:
        contest = found["decode"]["float32"]
        assert contest["receptance"]["rates"] == [10, 10] and contest["rwkv"]["rates"] == [10]
        assert "decode float32 / memory limit" in {x["what"] for x in found["report"]["bars"]}
    assert json.loads(file.read_text()) == found["report"]


def test_peers_are_chosen(benchmark, engines, capsys):
    found = run(benchmark, capsys, "--peers", "transformers")
    assert "rwkv" not in found["decode"]["float32"]
    assert "transformers" in found["decode"]["bfloat16"]
    assert benchmark.parsed(["--peers"])[0].peers == []


def test_peers_take_part_in_the_versions_that_they_run(benchmark, engines, capsys):
    sections = ["--sections", "decode", "prefill", "batches"]
    found = run(benchmark, capsys, "--sizes", "rwkv7-tiny", *sections)
    assert list(found["decode"]["int8"]) == ["memory bus", "receptance", "llama.cpp"]
    assert found["logits, relative error"]["llama.cpp Q4_0"] == 0
    bars = {x["what"]: x["wanted"] for x in found["report"]["bars"]}
    assert bars["decode int4 / llama.cpp Q4_0"] == ">= 1.3"
    assert bars["decode int4 / memory limit"] == ">= 0.85"
    assert bars["prompt of 512 / llama.cpp"] == ">= 1.5"
    assert bars["decode int8, batch 16 / batch 1"] == ">= 4"
    assert "llama.cpp" not in run(benchmark, capsys)["decode"]["int8"]


@pytest.mark.parametrize(("instructions", "wanted"), [("avx2", 3.5), ("avx512", 6)])
def test_bars_depend_on_instructions(benchmark, instructions, wanted):
    from _bars import bars

    rates = {"rates": [1.0], "rate": 1.0}
    sections = {"sizes": {"version": 4}, "instructions": instructions}
    sections["batches"] = {"int8": {"1": rates, "16": rates}}
    (found,) = bars({"tiny": sections})
    assert found["wanted"] == f">= {wanted:g}" and not found["passed"]


def test_an_unknown_peer_is_refused(benchmark, capsys):
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["--peers", "llama"])
    error = capsys.readouterr().err
    assert "llama" in error and "'rwkv.cpp', 'rwkv', 'transformers', 'llama.cpp'" in error


def test_an_absent_peer_is_named(benchmark, engines, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "find_spec", {"rwkv": "here"}.get)
    found = run(benchmark, capsys)
    assert "transformers is left out, because it is not here: pip install" in found["out"]
    assert "rwkv.cpp is left out, because it is not here: build" in found["out"]
    assert set(found["report"]["left out"]) == {"rwkv.cpp", "transformers"}
    assert "rwkv" in found["decode"]["float32"]


def test_progress_is_never_silent_for_long(benchmark, capsys, monkeypatch):
    from _common import Progress

    monkeypatch.setattr(Progress, "PATIENCE", 0.1)
    with Progress(Console(width=100)) as say:
        say("making weights")
        out = ""
        for _ in range(6000):
            out += capsys.readouterr().out
            if out.count("making weights ... ") > 1:
                break
            threading.Event().wait(0.01)
    assert out.startswith("  making weights ... 0 s\n  making weights ... ")


@pytest.mark.slow
def test_real_engines(benchmark, capsys, tmp_path, monkeypatch):
    """The tiny model in Receptance alone; the check and one section."""
    monkeypatch.undo()
    monkeypatch.syspath_prepend(BENCHMARKS)
    handlers = {x: signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)}
    folder = ["--folder", str(tmp_path), "--sections", "memory"]
    try:
        found = run(benchmark, capsys, "--peers", *folder)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert found["code"] == 0
    assert set(found["memory"]) == {"float32", "bfloat16", "float16", "int8", "int4"}
    assert all(x["resident"] > 1e6 for x in found["memory"].values())
    assert sorted(os.listdir(tmp_path / "tiny")) == ["dense-float32", "dense-int4", "dense-int8"]
