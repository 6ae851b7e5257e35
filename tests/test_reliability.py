"""A few of the many accidents of benchmarks/reliability.py, which has the full numbers."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

pytestmark = pytest.mark.skipif(
    not (BENCHMARKS / "reliability.py").exists() or sys.platform != "linux",
    reason="needs the sources and processes that can be killed",
)


@pytest.fixture
def reliability(monkeypatch) -> ModuleType:
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import reliability

    return reliability


def test_a_save_may_die_anywhere(reliability, tmp_path):
    found = reliability.crash_points(tmp_path, stride=12)
    assert found["touches of a file"] > 50
    assert len(found["left behind"]) >= 3


@pytest.mark.slow
def test_kills_at_random_moments(reliability, tmp_path):
    found = reliability.kills(tmp_path, count=6)
    assert sum(found["found"].values()) == 6


def test_every_damage_is_noticed(reliability, tmp_path):
    assert sum(reliability.damage(tmp_path, count=20).values()) == 20 + 5 + 3 + 5 + 3


def test_a_full_disk(reliability, tmp_path):
    found = reliability.full_disk(tmp_path, stride=20)
    if "not permitted here" in found:
        pytest.skip(f"no small disk to fill: {found['not permitted here']}")
    assert found["saves without space"] >= 5
    assert len(found["failed in"]) >= 4
