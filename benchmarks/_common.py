"""What the benchmarks share: repeated timing in turns, reports, and the machine's name."""

from __future__ import annotations

import json
import signal
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from receptance.config import ModelConfig
from receptance.formats.names import tensor_shapes
from receptance.inference.measure import machine


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


def gpu_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """Like inference.measure.random_tensors, but drawn on the GPU."""
    return {
        name: torch.randn(shape, device="cuda").div_(shape[-1] ** 0.5)
        if len(shape) == 2
        else torch.full(shape, 0.5, device="cuda")
        for name, shape in tensor_shapes(config).items()
    }


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
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what `timeout` sends
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
    return float(f"{value:.4g}") if isinstance(value, float) else value
