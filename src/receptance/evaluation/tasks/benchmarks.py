"""The benchmarks of classification by name: generated, or read from the files of their release."""

from __future__ import annotations

from receptance.data.labeled import Examples

BENCHMARKS: dict[str, str] = {}


def benchmark(name: str, setting: str, source: str | None, seed: int) -> Examples:
    raise NotImplementedError


def published_rows(name: str) -> dict[str, float]:
    return {}
