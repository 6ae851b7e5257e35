"""The sections of reliability.py that need whole training runs, all through `receptance train`."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.progress import Progress, track

from receptance.sealed import MANIFEST
from receptance.storage.directories import newest_checkpoint, step_directories
from receptance.storage.manifest import verify

SMALL = "--tokenizer bytes --width 16 --layers 2 --batch 2 --context 32 --learning-rate 1e-2"
STEPS, REPORTS = 40, 20


class Run:
    """A training run in a folder, started by a command and watched from outside."""

    def __init__(self, out: Path, *, ranks: int = 1, steps: int = STEPS, reports: int = REPORTS):
        self.out, self.ranks, self.steps, self.reports = out, ranks, steps, reports
        self.log = out.with_name(f"{out.name}.log")
        self.text = out.with_name("text.txt")
        if not self.text.exists():
            shutil.copy(argparse.__file__, self.text)

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        """The command, in a process group of its own; it resumes if there is what to resume."""
        launch = ["receptance"]
        if self.ranks > 1:
            launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={self.ranks}"]
            launch += ["-m", "receptance"]
        resumed = self.out.exists() and step_directories(self.out)
        if not resumed:
            shutil.rmtree(self.out, ignore_errors=True)
        words = ["train", *(["--resume"] if resumed else [str(self.text)]), *SMALL.split()]
        words += ["--out", self.out, "--steps", self.steps, "--reports", self.reports, *options]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", *launch, *map(str, words)],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    def finish(self) -> str:
        """Go on to the end; the digest of what the run arrived at."""
        code = self.start().wait()
        assert code == 0, self.log.read_text()
        return self.digest()

    def digest(self) -> str:
        """Of the manifest, and so of every file, of the last step's checkpoint."""
        newest = step_directories(self.out)[-1]
        verify(newest)
        assert int(newest.name.removeprefix("step-")) == self.steps, newest
        return hashlib.sha256((newest / MANIFEST).read_bytes()).hexdigest()

    def recorded(self) -> int:
        """Bytes of metrics, which grow with every step."""
        metrics = self.out / "metrics.jsonl"
        return metrics.stat().st_size if metrics.exists() else 0


def stops(folder: Path, count: int = 100, ranks: int = 1) -> dict[str, Any]:
    """Stop at random moments, resume, stop again: the end is that of an undisturbed run."""
    shuffled = random.Random(0)
    wanted = Run(folder / "undisturbed", ranks=ranks).finish()
    kinds: Counter[str] = Counter()
    arrived, run = 0, Run(folder / "stopped", ranks=ranks)
    with Progress(transient=True) as bar:
        task = bar.add_task("stops", total=count)
        while kinds.total() < count or run.out.exists():
            kind = _stop_once(run, shuffled) if kinds.total() < count else "ended"
            if kind != "ended":
                kinds[kind] += 1
                bar.update(task, completed=kinds.total())
                continue
            assert run.finish() == wanted, run.log.read_text()[-2000:]
            arrived += 1
            shutil.rmtree(run.out)
    return {"stops": dict(kinds), "runs that ended as the undisturbed one": arrived, "ranks": ranks}


def _stop_once(run: Run, shuffled: random.Random) -> str:
    """Start or resume it and stop it somewhere; "ended" if it was faster."""
    before, process = run.recorded(), run.start()
    if early := shuffled.random() < 0.1:
        time.sleep(4 * shuffled.random())
    else:
        while process.poll() is None and run.recorded() == before:
            time.sleep(0.01)
        time.sleep(2 * shuffled.random())
    if process.poll() is not None:
        assert process.returncode == 0, run.log.read_text()[-2000:]
        return "ended"
    number = shuffled.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
    _stop(process, number)
    return f"{number.name} {'while starting' if early else 'while training'}"


def _stop(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal to a process, or to the ones that it launched if it is torchrun.

    Those are in sessions of their own, so a signal to torchrun's group would not reach them.
    """
    workers = _children(process.pid)
    if number == signal.SIGKILL or not workers:
        workers.append(process.pid)
    for one in workers:
        with suppress(ProcessLookupError):
            os.kill(one, number)
    process.wait()
    while any(map(_is_alive, workers)):
        time.sleep(0.05)


def _children(parent: int) -> list[int]:
    output = subprocess.run(
        ["ps", "-e", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    )
    found = (line.split(maxsplit=2) for line in output.stdout.splitlines())
    return [int(pid) for pid, its, *words in found if int(its) == parent and "train" in str(words)]


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def run_on_a_full_disk(disk: Path, logs: str) -> dict[str, Any]:
    """On a small disk that is full for a while, and on one that stays full."""
    home = Path(logs)
    wanted = Run(home / "undisturbed").finish()
    run = Run(disk / "run")
    run.log = home / "run.log"
    assert _fill_during(run, free_again=True) == 0, run.log.read_text()
    assert run.digest() == wanted
    shutil.rmtree(run.out)
    run.log = home / "again.log"
    code = _fill_during(run, free_again=False)
    assert code != 0, run.log.read_text()
    kept = newest_checkpoint(run.out)[0].name
    (disk / "ballast").unlink()
    assert run.finish() == wanted
    return {"full for a while": "went on to the same end", "stayed full": f"exit code {code}"} | {
        "kept": kept,
        "then": "resumed to the same end",
    }


def _fill_during(run: Run, *, free_again: bool) -> int:
    log, process = run.log, run.start()
    while not (run.out.exists() and step_directories(run.out)):
        assert process.poll() is None, log.read_text()
        time.sleep(0.001)
    ballast = run.out.parent / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    while process.poll() is None and b"not saved" not in log.read_bytes():
        time.sleep(0.01)
    assert b"not saved" in log.read_bytes()
    if free_again:
        ballast.unlink()
    return process.wait()


def memory(folder: Path, count: int = 10_000) -> dict[str, Any]:
    """Resident memory of a run after a tenth of its steps, and at the end of them."""
    warm, samples = count // 10, []
    run = Run(folder / "run", steps=count + 2 * warm, reports=1)
    process = run.start()
    line = 0
    for _ in track(itertools.count(), description="memory", transient=True, total=None):
        assert process.poll() is None, run.log.read_text()
        time.sleep(0.2)
        line = _steps_done(run)
        samples.append((line, _resident(process.pid)))
        if line > count + warm:
            break
    _stop(process, signal.SIGTERM)
    first = statistics.median(x for at, x in samples if warm <= at <= 2 * warm)
    last = statistics.median(x for at, x in samples if at >= count)
    growth = last / first - 1
    assert growth < 0.01, growth
    return {"steps": count, "MB early": first, "MB late": last, "growth": growth}


def _steps_done(run: Run) -> int:
    metrics = run.out / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def _resident(process: int) -> float:
    output = subprocess.run(
        ["ps", "-o", "rss=", "-p", str(process)], capture_output=True, text=True, check=True
    )
    return int(output.stdout) / 1024
