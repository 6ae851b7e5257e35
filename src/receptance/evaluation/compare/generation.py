"""Seconds and memory per generated token, after contexts of different lengths."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from receptance.atomic import written
from receptance.errors import one_line
from receptance.evaluation.compare.families import Decoder
from receptance.evaluation.compare.table import family
from receptance.inference.measure import resident_bytes, seconds

GENERATION = "generation"
# A context is read in pieces of this many tokens, so that no scores of all pairs exist.
_PIECE = 512
# The median of so many steps is taken, after some to warm up.
_STEPS, _WARM_UP = 24, 4


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a generated token costs after one context."""

    context: int
    seconds: float
    """The median over some tokens."""
    remembered: int
    """The bytes of the state, or of the cache of keys and values."""
    resident: int | None
    """The bytes of the whole process in RAM; None where the system is not Linux."""


@dataclass(frozen=True)
class Measurement:
    """The model that is to be measured, in a process of its own."""

    name: str
    """The name of its run."""
    family: str
    models: Path
    """The folder with the models."""
    vocab_size: int
    contexts: tuple[int, ...]


def measure(work: Measurement) -> list[Cost]:
    """The costs at all contexts, in ascending order: the memory of a process rarely shrinks."""
    decoder = family(work.family).decoder(work.models / work.name)
    found, read = [], 0
    for context in sorted(work.contexts):
        _read(decoder, read, context, work.vocab_size)
        remembered = decoder.remembered_bytes
        for _ in range(_WARM_UP):
            decoder.step()
        middle = statistics.median(seconds(decoder.step) for _ in range(_STEPS))
        read = context + _WARM_UP + _STEPS
        found.append(
            Cost(
                context=context,
                seconds=middle,
                remembered=remembered,
                resident=resident_bytes(),
            )
        )
    return found


def _read(decoder: Decoder, start: int, stop: int, vocab_size: int) -> None:
    """Read tokens up to a context; they are far apart in the embedding, as those of a text are."""
    for at in range(start, stop, _PIECE):
        places = torch.arange(at, min(at + _PIECE, stop))
        decoder.read((places + 1) * 7919 % vocab_size)


def stored(out: Path, name: str, contexts: Sequence[int]) -> list[Cost] | None:
    """The costs that an earlier call measured at all of these contexts."""
    path = out / GENERATION / f"{name}.json"
    if not path.exists():
        return None
    try:
        found = [Cost(**cost) for cost in json.loads(path.read_bytes())]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to measure again") from None
    wanted = [cost for cost in found if cost.context in contexts]
    return wanted if len(wanted) == len(contexts) else None


def store(out: Path, name: str, costs: Sequence[Cost]) -> None:
    """Keep the costs for later calls."""
    path = out / GENERATION / f"{name}.json"
    with one_line(path, "the costs "):
        path.parent.mkdir(parents=True, exist_ok=True)
        with written(path) as file:
            file.write(json.dumps([asdict(cost) for cost in costs], indent=1).encode())
