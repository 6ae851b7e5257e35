"""Sums of two numbers: a text to train a small model on, and questions that it does not hold.

    python benchmarks/sums.py sums.txt
    receptance train sums.txt --version 7 --width 128 --layers 2 --tokenizer bytes --context 128 \\
        --batch 16 --steps 3000 --learning-rate 3e-3 --final-learning-rate 1e-4 --schedule cosine \\
        --warmup-steps 50 --out runs/sums
    python benchmarks/quantization.py runs/sums --sums 2000

The digits of a sum are written in the order in which one adds, ones first: 586+27=316.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

NUMBERS = 1000  # from 0 up
HELD_OUT = 10  # one pair in so many is never trained on
LINES = 120_000


def line(a: int, b: int) -> tuple[str, str]:
    """A question and its answer."""
    return f"{a}+{b}=", str(a + b)[::-1]


def is_held_out(a: int, b: int) -> bool:
    """Whether a pair, in either order, is for questions alone."""
    return (min(a, b) * 7919 + max(a, b)) % HELD_OUT == 0


def questions(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """So many held-out questions with their answers."""
    return [line(a, b) for a, b in _pairs(count, seed, held_out=True)]


def text(lines: int = LINES, seed: int = 0) -> str:
    """Lines to train on."""
    pairs = _pairs(lines, seed, held_out=False)
    return "".join("".join(line(a, b)) + "\n" for a, b in pairs)


def _pairs(count: int, seed: int, *, held_out: bool) -> list[tuple[int, int]]:
    rng, found = np.random.default_rng(seed), list[tuple[int, int]]()
    while len(found) < count:
        drawn = rng.integers(NUMBERS, size=(count, 2)).tolist()
        found += [(a, b) for a, b in drawn if is_held_out(a, b) == held_out]
    return found[:count]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(text())
