"""Examples drawn on the fly, each of which belongs to one split only.

What makes an example a question of its own, such as the pairs to recall, is hashed, and the hash
alone decides whether the example may be drawn for training, validation or testing. So no question
of the test was ever trained on, however few questions there are.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from receptance.data.labeled import Examples, LabeledBatch, Problem, Split

# A hash modulo 8: two of the remainders are held out.
_REMAINDERS, _TEST, _VALIDATION = 8, 0, 1
_SPLITS: dict[Split, int] = {"train": 0, "validation": 1, "test": 2}
# A split without a single example among so many draws is taken to be empty.
_DRAWS = 1 << 12


class Drawn(NamedTuple):
    """N sequences of token ids, and the answers at some of their positions."""

    tokens: np.ndarray
    """[N,T] int64."""
    targets: np.ndarray
    """[N,T] int64: the right token at the positions of the mask, 0 elsewhere."""
    mask: np.ndarray
    """[N,T] bool: where there is something to answer."""
    question: np.ndarray
    """[N,Q] int64: what tells one question from another; it decides the split."""


class Task(ABC):
    """A family of questions with a named difficulty. Its subclasses are frozen dataclasses."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The number of token ids in inputs and answers."""

    @abstractmethod
    def draw(self, rng: np.random.Generator, count: int, split: Split) -> Drawn:
        """Draw so many sequences. The questions may belong to any split."""

    @abstractmethod
    def at_length(self, length: int) -> Task:
        """The same task with sequences of another length."""

    @property
    @abstractmethod
    def chance(self) -> float:
        """The accuracy of guessing among the answers that are possible."""

    def spoken(self, drawn: Drawn) -> list[list[tuple[str, str]]]:
        """Each sequence as text for a language model: pieces to read, and the answer behind each.

        Tokens and answers are written as numbers. An answer belongs to the text that follows it.
        """
        sequences = []
        for tokens, targets, mask in zip(drawn.tokens, drawn.targets, drawn.mask, strict=True):
            pieces, read = [], ""
            for token, target, asked in zip(tokens, targets, mask, strict=True):
                read += f" {token}"
                if asked:
                    pieces.append((read, f" {target}"))
                    read = ""
            sequences.append(pieces)
        return sequences

    @property
    def problem(self) -> Problem:
        """A class for each position of the mask: the token that is the answer."""
        return Problem(
            kind="classify", outputs=self.vocab_size, vocab_size=self.vocab_size, every=True
        )

    @property
    def difficulty(self) -> dict[str, Any]:
        """The named numbers that the task was made with."""
        found = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {name: x for name, x in found.items() if isinstance(x, int | float | bool | str)}


class DrawnExamples(Examples):
    """Endless training examples of a task, and a fixed number of held-out ones."""

    def __init__(self, task: Task, *, held_out: int = 1000, seed: int = 0) -> None:
        """seed decides the held-out examples; training has a seed of its own."""
        if held_out < 1:
            raise ValueError(f"held_out is {held_out}; it must be at least 1")
        self.task, self._held_out, self._seed = task, held_out, seed

    @property
    def problem(self) -> Problem:
        return self.task.problem

    @property
    def about(self) -> Mapping[str, Any]:
        """The name of the task and its difficulty."""
        return {"task": self.task.name, **self.task.difficulty}

    def count(self, split: Split) -> int | None:
        """The number of held-out examples; there is no end of those for training."""
        return None if split == "train" else self._held_out

    @property
    def chance(self) -> float:
        return self.task.chance

    def train(self, step: int, size: int, seed: int) -> LabeledBatch:
        """New examples for every step."""
        return _batch(draw(self.task, "train", size, (seed, step)))

    def held_out(self, split: Split, size: int) -> Iterator[LabeledBatch]:
        """The held-out examples, always the same."""
        for number, at in enumerate(range(0, self._held_out, size)):
            count = min(size, self._held_out - at)
            yield _batch(draw(self.task, split, count, (self._seed, number)))


def draw(task: Task, split: Split, count: int, key: tuple[int, ...]) -> Drawn:
    """Draw so many examples of a split; the same key draws the same ones.

    ValueError if the split seems to have none, as a task with few questions may.
    """
    rng = np.random.default_rng(np.random.SeedSequence((*key, _SPLITS[split])))
    kept: list[Drawn] = []
    have = tried = 0
    while have < count:
        found = task.draw(rng, max(8, count), split)
        tried += len(found.tokens)
        chosen = _split_of(found.question) == _SPLITS[split]
        if chosen.any():
            kept.append(Drawn(*(part[chosen] for part in found)))
            have += int(chosen.sum())
        elif not kept and tried >= _DRAWS:
            raise ValueError(
                f"{task.name} has no {split} examples at this difficulty "
                f"({_named(task.difficulty)}): it has too few questions to divide; make it harder"
            )
    joined = (np.concatenate(parts)[:count] for parts in zip(*kept, strict=True))
    return Drawn(*joined)


def _split_of(question: np.ndarray) -> np.ndarray:
    """The split that each question belongs to: [N,Q] -> [N]."""
    remainder = hashed(question) % np.uint64(_REMAINDERS)
    splits = np.full(len(question), _SPLITS["train"])
    splits[remainder == _TEST] = _SPLITS["test"]
    splits[remainder == _VALIDATION] = _SPLITS["validation"]
    return splits


def hashed(rows: np.ndarray) -> np.ndarray:
    """A hash of each row of integers: [N,Q] -> [N] uint64, by the finalizer of splitmix64."""
    out = np.full(len(rows), rows.shape[1], np.uint64)
    for column in rows.T.astype(np.uint64):
        out = (out ^ column) + np.uint64(0x9E3779B97F4A7C15)
        out = (out ^ (out >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        out = (out ^ (out >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        out ^= out >> np.uint64(31)
    return out


def check_at_least(task: Task, **least: int) -> None:
    """ValueError if a number of a task's difficulty is too small."""
    for name, limit in least.items():
        if getattr(task, name) < limit:
            raise ValueError(
                f"{name} of {task.name} is {getattr(task, name)}; it must be at least {limit}"
            )


def distinct(rng: np.random.Generator, count: int, of: int, each: int) -> np.ndarray:
    """Rows of different numbers below `of`, in random order: [count,each] int64."""
    out = np.empty((count, each), np.int64)
    for row in out:
        row[:] = rng.choice(of, each, replace=False)
    return out


def _batch(drawn: Drawn) -> LabeledBatch:
    return LabeledBatch(
        torch.from_numpy(drawn.tokens),
        torch.from_numpy(drawn.targets),
        places=torch.from_numpy(drawn.mask),
    )


def _named(difficulty: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in difficulty.items())
