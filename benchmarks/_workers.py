"""Engines in processes of their own, each with so many seconds, timed in turns."""

from __future__ import annotations

import json
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import undisturbed

SERVER = Path(__file__).with_name("_engines.py")
TRIAL_TOKENS = {"decode": 12, "prefill": 256}  # at most, in the choice of an engine's best way

Answer = dict[str, Any]
Say = Callable[[str], None]


class Failed(Exception):
    """An engine ended by itself; the message is the last that it said."""


class OverBudget(Exception):
    """An engine has had its seconds."""


class Budget:
    """Seconds of an engine for a number of measurements, in equal parts of what is left."""

    def __init__(self, seconds: float, parts: int = 1) -> None:
        self.left, self.parts = seconds, parts

    @contextmanager
    def share(self) -> Iterator[Budget]:
        """The part of one measurement; what that leaves is for those after it."""
        part = Budget(self.left / self.parts)
        self.left, self.parts = self.left - part.left, self.parts - 1
        try:
            yield part
        finally:
            self.left += part.left

    @contextmanager
    def spend(self) -> Iterator[None]:
        """Charge the block for its time, and end it with OverBudget when there is none left."""

        def over(*_: object) -> None:
            raise OverBudget

        before, began = signal.signal(signal.SIGALRM, over), time.monotonic()
        try:
            signal.setitimer(signal.ITIMER_REAL, max(self.left, 1e-3))
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            self.left = max(0.0, self.left - (time.monotonic() - began))


@contextmanager
def noted(found: dict[str, Any], budget: Budget) -> Iterator[None]:
    """Charge the block; if it is stopped or fails, the reason is found["stopped"]."""
    try:
        with budget.spend():
            yield
    except OverBudget:
        found["stopped"] = "over budget"
    except Failed as failed:
        found["stopped"] = f"failed: {failed}"


@dataclass(frozen=True)
class Way:
    """One way in which an engine may be run: its model file, and what it is asked to do."""

    engine: str
    dtype: str
    path: Callable[[], str]  # makes the file if there is none
    command: dict[str, Any]
    library: str | None = None

    def spec(self, threads: int) -> dict[str, Any]:
        """What the process is told about its model."""
        fields = {"engine": self.engine, "dtype": self.dtype, "path": self.path()}
        return fields | {"library": self.library, "threads": threads}


class Worker:
    """A process that holds a model and works only when it is asked."""

    def __init__(self, way: Way, threads: int) -> None:
        self.way = way
        spec = json.dumps(way.spec(threads))
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        try:
            with undisturbed():  # else a process might begin that nobody ends
                self._process = subprocess.Popen(
                    [sys.executable, str(SERVER), spec],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._log,
                    text=True,
                    env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                    start_new_session=True,  # Ctrl-C is for who asked, who then closes this
                )
            self.loaded = self._read()
        except BaseException:
            self.close()
            raise

    def ask(self, command: dict[str, Any] | None = None) -> Answer:
        """Do it, and say how it went; None for the way's own command."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the reason is read below
            print(json.dumps(command or self.way.command), file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> Answer:
        assert self._process.stdout is not None
        # A signal that arrives just before a long system call is noticed after it.
        while not select.select([self._process.stdout], [], [], 0.2)[0]:
            pass
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            last = self._log.read().strip().rpartition("\n")[2]
            raise Failed(last or f"its process ended with {code}")
        answer: Answer = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process; its memory is free when this returns."""
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._log):
            file.close()


@contextmanager
def working(way: Way, threads: int) -> Iterator[Worker]:
    """A worker for as long as the block lasts."""
    worker = Worker(way, threads)
    try:
        yield worker
    finally:
        worker.close()


class Contestant:
    """An engine in one contest. `found` is always what is known of it, ready for JSON."""

    def __init__(
        self, title: str, ways: Sequence[Way], budget: Budget, found: Answer, say: Say
    ) -> None:
        self.title, self.ways, self.budget, self.found, self.say = title, ways, budget, found, say
        self.worker: Worker | None = None
        self.way = ways[0]

    def choose(self, threads: Sequence[int]) -> None:
        """Keep the process of the fastest way and number of threads, each tried alone."""
        self.found["rates"] = []
        with self._noted():
            for count in sorted(threads, reverse=True):
                # Ways that differ in the command alone share a process: loading takes longest.
                for dtype in dict.fromkeys(way.dtype for way in self.ways):
                    self._try([way for way in self.ways if way.dtype == dtype], count)

    def _try(self, ways: Sequence[Way], threads: int) -> None:
        how = f"{ways[0].dtype} with {threads} thread{'s' * (threads > 1)}".strip()
        self.say(f"{self.title}: loading {how}")
        loser = worker = Worker(ways[0], threads)
        try:
            self.say(f"{self.title}: trying {how}")
            worker.ask(_trial(ways[0].command))  # warms up
            for way in ways:
                answer = worker.ask(_trial(way.command))
                if answer["rate"] > self.found.get("rate", 0.0):
                    chosen = {"threads": threads, "dtype": way.dtype} | way.command
                    self.found.update(answer, chosen=chosen)
                    self.way = way
                    if self.worker is not worker:
                        self.worker, loser = worker, self.worker
        finally:
            if loser is not None:
                loser.close()

    def turn(self, number: int, rounds: int) -> None:
        """Measure once."""
        if "stopped" not in self.found and self.worker is not None:
            self.say(f"{self.title}: round {number} of {rounds}")
            with self._noted():
                answer = self.worker.ask(self.way.command)
                rates = [*self.found["rates"], answer["rate"]]
                self.found.update(answer, rates=rates, rate=statistics.median(rates))

    @contextmanager
    def _noted(self) -> Iterator[None]:
        with noted(self.found, self.budget):
            yield
        if "stopped" in self.found:
            self.close()

    def close(self) -> None:
        """End the process, if there is one."""
        if self.worker is not None:
            self.worker.close()
            self.worker = None


def _trial(command: dict[str, Any]) -> dict[str, Any]:
    """The same, but shorter."""
    if "tokens" not in command:
        return command
    return command | {"tokens": min(command["tokens"], TRIAL_TOKENS[command["do"]])}


def in_turns(contestants: Sequence[Contestant], *, rounds: int, threads: Sequence[int]) -> None:
    """Each in its best way and with its best number of threads, A B C A B C ..., side by side."""
    with ExitStack() as stack:
        for one in contestants:
            stack.callback(one.close)
            one.choose(threads)
        for number in range(1, 1 + rounds):
            for one in contestants:
                one.turn(number, rounds)
