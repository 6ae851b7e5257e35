"""Engines in processes of their own, timed in turns."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SERVER = Path(__file__).with_name("_engines.py")
MEMORY_BUS = "memory bus"

Answer = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """One way in which an engine may be run: its model file, and what it is asked to do."""

    engine: str
    command: tuple[tuple[str, Any], ...]
    path: str = ""
    dtype: str = ""
    library: str | None = None

    @staticmethod
    def of(engine: str, command: dict[str, Any], **fields: Any) -> Way:
        """The command as a dict."""
        return Way(engine, tuple(command.items()), **fields)

    def spec(self, threads: int) -> dict[str, Any]:
        """What the process is told about its model."""
        fields = {"engine": self.engine, "path": self.path, "dtype": self.dtype}
        return fields | {"library": self.library, "threads": threads}


class Worker:
    """A process that holds a model and works only when it is asked."""

    def __init__(self, way: Way, threads: int) -> None:
        self.way, self.threads = way, threads
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, str(SERVER), json.dumps(way.spec(threads))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        self.loaded = self._read()

    def ask(self, command: dict[str, Any] | None = None) -> Answer:
        """Do it, and say how it went; None for the way's own command."""
        assert self._process.stdin is not None
        print(json.dumps(command or dict(self.way.command)), file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> Answer:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            raise SystemExit(f"{self.way} failed:\n{self._log.read()[-3000:]}")
        answer: Answer = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process; its memory is free when this returns."""
        self._process.communicate()
        self._log.close()


@contextmanager
def working(way: Way, threads: int) -> Iterator[Worker]:
    """A worker for as long as the block lasts."""
    worker = Worker(way, threads)
    try:
        yield worker
    finally:
        worker.close()


@dataclass(frozen=True)
class Found:
    """The rates of one contestant in all rounds, and what it did best with."""

    rates: tuple[float, ...]
    last: Answer
    way: Way
    threads: int

    @property
    def rate(self) -> float:
        """The median."""
        return statistics.median(self.rates)

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        chosen = {"threads": self.threads, "dtype": self.way.dtype} | dict(self.way.command)
        return {"rate": self.rate, "rates": self.rates, "chosen": chosen} | {
            name: value for name, value in self.last.items() if name != "rate"
        }


def in_turns(
    contestants: dict[str, Sequence[Way]], *, rounds: int, threads: Sequence[int]
) -> dict[str, Found]:
    """Each in its best way and with its best number of threads, A B C A B C ..., side by side.

    Among them always the memory bus, so that its rate is that of the same minutes.
    """
    contestants = {MEMORY_BUS: [Way.of(MEMORY_BUS, {"do": "read"})]} | dict(contestants)
    with ExitStack() as stack:
        chosen = {
            name: stack.enter_context(working(*_best(ways, threads)))
            for name, ways in contestants.items()
        }
        answers: dict[str, list[Answer]] = {name: [] for name in chosen}
        for turn in range(1 + rounds):
            for name, worker in chosen.items():
                answer = worker.ask()
                if turn:
                    answers[name].append(answer)
        return {
            name: Found(
                tuple(answer["rate"] for answer in answers[name]),
                answers[name][-1],
                worker.way,
                worker.threads,
            )
            for name, worker in chosen.items()
        }


def _best(ways: Sequence[Way], threads: Sequence[int]) -> tuple[Way, int]:
    """The fastest of all ways and numbers of threads, each tried alone."""
    if len(ways) * len(threads) == 1:
        return ways[0], threads[0]
    rates = {}
    for count in threads:
        # Ways that differ in the command alone share a process: loading takes longest.
        for model in dict.fromkeys(_model(way) for way in ways):
            same = [way for way in ways if _model(way) == model]
            with working(same[0], count) as worker:
                for way in same:
                    worker.ask(dict(way.command))
                    rates[way, count] = worker.ask(dict(way.command))["rate"]
    return max(rates, key=lambda one: rates[one])


def _model(way: Way) -> tuple[str, str, str]:
    return way.engine, way.path, way.dtype
