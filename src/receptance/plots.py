"""Pictures of a run, for those who would rather look than read. Needs matplotlib (extra `plot`)."""

from __future__ import annotations

import json
import os
from pathlib import Path


def draw_losses(metrics: Path, picture: Path) -> None:
    """Training loss and validation bits per byte over tokens, from metrics.jsonl to a PNG.

    ValueError if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("no plot without matplotlib: pip install 'receptance[plot]'") from None
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    losses = [(r["tokens"], r["loss"]) for r in records if "loss" in r]
    validations = [
        (r["tokens"], r["validation_bits_per_byte"])
        for r in records
        if "validation_bits_per_byte" in r
    ]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    left = figure.subplots()
    left.plot(*zip(*losses, strict=True), color="tab:blue", alpha=0.35, linewidth=0.8)
    left.plot(*zip(*_smooth(losses), strict=True), color="tab:blue", label="training loss")
    left.set_xlabel("tokens read")
    left.set_ylabel("nats per token", color="tab:blue")
    if validations:
        right = left.twinx()
        right.plot(*zip(*validations, strict=True), "o-", color="tab:orange")
        right.set_ylabel("validation bits per byte", color="tab:orange")
    left.set_title(picture.parent.name)
    left.grid(alpha=0.3)
    partial = picture.with_name(picture.name + ".partial")
    figure.savefig(partial, format="png", dpi=120)
    os.replace(partial, picture)


def _smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """An exponential mean with a memory of a fiftieth of the run."""
    keep = 1 - 1 / max(1, len(points) // 50)
    mean, out = points[0][1], []
    for at, value in points:
        mean = keep * mean + (1 - keep) * value
        out.append((at, mean))
    return out
