"""The paper's twelve tasks, and what it prints for its own models."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from receptance.evaluation.results import Figure

# By task of lm-evaluation-harness: the metric that the paper prints, and its column.
METRICS = {
    ("arc_easy", "acc"): "ARC-e",
    ("arc_challenge", "acc_norm"): "ARC-c",
    ("boolq", "acc"): "BoolQ",
    ("copa", "acc"): "COPA",
    ("headqa_en", "acc_norm"): "HeadQA",
    ("hellaswag", "acc_norm"): "HellaSwag",
    ("lambada_openai", "perplexity"): "LAMBADA, perplexity",
    ("lambada_openai", "acc"): "LAMBADA",
    ("openbookqa", "acc_norm"): "OBQA",
    ("piqa", "acc"): "PIQA",
    ("record", "em"): "ReCoRD",
    ("sciq", "acc"): "SciQ",
    ("winogrande", "acc"): "Winogrande",
}
TASKS = tuple(dict.fromkeys(task for task, _ in METRICS))

_COLUMNS = (
    *("PIQA", "HellaSwag", "Winogrande", "ARC-e", "ARC-c", "OBQA"),
    *("LAMBADA, perplexity", "LAMBADA", "HeadQA", "SciQ", "ReCoRD", "COPA"),
)
# Tables 3 and 4 of arXiv 2305.13048v1, by billions of parameters; the second version shows them in
# figures alone. BoolQ is in neither table.
_ROWS: dict[float, tuple[float, ...]] = {
    0.17: (65.07, 32.26, 50.83, 47.47, 24.15, 29.60, 29.33, 32.99, 25.78, 77.50, 62.03, 66.00),
    0.43: (67.52, 40.90, 51.14, 52.86, 25.17, 32.40, 13.04, 45.16, 27.32, 80.30, 70.48, 65.00),
    1.5: (72.36, 52.48, 54.62, 60.48, 29.44, 34.00, 7.04, 56.43, 27.64, 85.00, 76.97, 77.00),
    3.0: (74.16, 59.89, 59.59, 65.19, 33.11, 37.00, 5.25, 63.96, 28.45, 86.50, 80.87, 82.00),
    7.4: (76.06, 65.51, 61.01, 67.80, 37.46, 40.20, 4.38, 67.18, 31.22, 88.80, 83.68, 85.00),
    14.2: (77.48, 70.65, 63.85, 70.24, 38.99, 41.80, 3.86, 70.83, 32.64, 90.40, 85.67, 85.00),
}
# A model whose size differs by more than this factor has no row of its own.
_SAME_SIZE = 1.2


@dataclass(frozen=True)
class Compared:
    """A number of ours beside the paper's."""

    column: str
    ours: float
    """In percent, except for the perplexity."""
    printed: float | None
    """None where the paper prints no number."""

    @property
    def difference(self) -> float | None:
        """How much more ours is."""
        return None if self.printed is None else self.ours - self.printed


def printed_row(parameters: int) -> tuple[float, dict[str, float]]:
    """The billions of parameters and the numbers of the paper's model that is nearest in size."""
    size = min(_ROWS, key=lambda billions: abs(math.log(parameters / billions / 1e9)))
    return size, dict(zip(_COLUMNS, _ROWS[size], strict=True))


def size_note(parameters: int) -> str:
    """Which row of the paper stands beside ours."""
    size, _ = printed_row(parameters)
    row = f"the printed row is that of RWKV-4 with {size:g} B parameters"
    if max(parameters / size / 1e9, size * 1e9 / parameters) <= _SAME_SIZE:
        return row
    return f"{row}; this model has {parameters / 1e9:.2g} B, and no row has its size"


def compare(figures: Iterable[Figure], parameters: int) -> list[Compared]:
    """Our figures beside the printed row of the nearest size, in the order of METRICS."""
    _, printed = printed_row(parameters)
    ours = {(figure.about.get("task"), figure.name): figure.value for figure in figures}
    return [
        Compared(
            column,
            ours[key] * (1.0 if key[1] == "perplexity" else 100.0),
            printed.get(column),
        )
        for key, column in METRICS.items()
        if key in ours
    ]
