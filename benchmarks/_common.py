"""What the benchmarks share: timing in turns, progress, reports, and the machine's name."""

from __future__ import annotations

import json
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rich.progress
import torch
from rich.console import Console
from torch import Tensor

from receptance.config import ModelConfig
from receptance.formats.names import tensor_shapes
from receptance.inference.measure import machine

# An alarm, which ends only a measurement, before those that end everything.
_SIGNALS = (signal.SIGALRM, signal.SIGINT, signal.SIGTERM)


def time_in_turns(
    candidates: dict[str, Callable[[], Any]], *, rounds: int, warmup: int = 1
) -> dict[str, float]:
    """Median seconds of each, A B C A B C ..., so that a machine that slows down slows all."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + rounds):
        for name, run in candidates.items():
            began = time.perf_counter()
            run()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def gpu_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """Like inference.measure.random_tensors, but drawn on the GPU."""
    return {
        name: torch.randn(shape, device="cuda").div_(shape[-1] ** 0.5)
        if len(shape) == 2
        else torch.full(shape, 0.5, device="cuda")
        for name, shape in tensor_shapes(config).items()
    }


class Progress:
    """What is being done now: a spinner on a terminal, elsewhere a line every few seconds."""

    PATIENCE = 3.0
    """Seconds in which no line is printed about the same thing."""

    def __init__(self, console: Console) -> None:
        self.console, self._plain = console, not console.is_interactive
        columns = rich.progress.SpinnerColumn(), rich.progress.TextColumn("{task.description}")
        self._bar = rich.progress.Progress(
            *columns,
            rich.progress.TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=self._plain,
        )
        self._task = self._bar.add_task("")
        self._done, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._repeat, daemon=True)
        self.what, self._began, self._printed = "starting", time.monotonic(), -math.inf

    def __enter__(self) -> Progress:
        self._bar.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._bar.stop()

    def __call__(self, what: str) -> None:
        """Say what begins now; of many things in a second, the first is printed."""
        self._bar.reset(self._task, description=what)
        with self._lock:
            self.what, self._began = what, time.monotonic()
        self._line(patience=1.0)

    def _repeat(self) -> None:
        while not self._done.wait(0.5):
            self._line(self.PATIENCE)

    def _line(self, patience: float) -> None:
        with self._lock:
            now = time.monotonic()
            if self._plain and now - self._printed >= patience:
                self._printed = now
                line = f"  {self.what} ... {now - self._began:.0f} s"
                self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def stop_once() -> None:
    """From now on Ctrl-C and SIGTERM, which `timeout` sends, raise KeyboardInterrupt, but once.

    What they end is then cleaned up and reported in peace.
    """

    def stop(*_: object) -> None:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let signals that arrive in the block take effect at its end."""
    before, arrived = {}, []
    try:
        for number in _SIGNALS:
            before[number] = signal.signal(number, lambda number, _: arrived.append(number))
        yield
    finally:
        for number in reversed(before):
            signal.signal(number, before[number])
        for number in sorted(arrived, key=_SIGNALS.index, reverse=True):
            signal.raise_signal(number)


def report(results: dict[str, Any]) -> None:
    """A line per figure, then everything as JSON."""
    results = results | {"machine": machine()}
    print()
    for name, value in results.items():
        print(f"{name:60} {f'{value:.4g}' if isinstance(value, float) else value}")
    print(json.dumps(rounded(results)))


def report_as_found(found: Iterable[tuple[str, dict[str, Any]]], file: Path | None) -> None:
    """A line per measurement as it is made, then all as JSON, whatever made an end of them.

    The file is written anew after each.
    """
    stop_once()
    results: dict[str, Any] = {"machine": machine()}
    try:
        for title, figures in found:
            results[title] = rounded(figures)
            shown = (f"{name} {value}" for name, value in results[title].items())
            print(f"{title:36}", ", ".join(shown), flush=True)
            if file is not None:
                file.write_text(json.dumps(results))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        print(json.dumps(results), flush=True)


def rounded(value: Any) -> Any:
    """Floats to four significant digits, those in a dict as well."""
    if isinstance(value, dict):
        return {name: rounded(x) for name, x in value.items()}
    if isinstance(value, list):
        return [rounded(x) for x in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
