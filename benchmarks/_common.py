"""What the benchmarks share: repeated timing in turns, and the machine's name."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from receptance.measure import machine


def time_in_turns(
    candidates: dict[str, Callable[[], Any]], *, rounds: int, warmup: int = 1
) -> dict[str, float]:
    """Median seconds of each, A B C A B C ..., so that a machine that slows down slows all."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + rounds):
        for name, run in candidates.items():
            began = time.perf_counter()
            run()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def report(results: dict[str, Any]) -> None:
    """A line per figure, then everything as JSON."""
    results = results | {"machine": machine()}
    print()
    for name, value in results.items():
        print(f"{name:60} {f'{value:.4g}' if isinstance(value, float) else value}")
    print(json.dumps(results))
