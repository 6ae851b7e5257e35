"""Sequences with answers: what a task asks, batches of examples, and examples kept in memory.

A classifier answers with a class, a regressor with numbers, about a whole sequence or about some of
its positions. Batches are a pure function of (seed, step), as those of text are, so a run that
stopped goes on with the very next batch.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from receptance.data.batches import shuffled

Split = Literal["train", "validation", "test"]

# Bytes, such as pixels, become numbers from -1 to 1.
_MIDDLE_OF_BYTES = 127.5


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What the sequences of a task hold, and what is asked about them."""

    kind: Literal["classify", "regress"]
    outputs: int
    """K, the number of classes, or of numbers in an answer."""
    vocab_size: int = 1
    """The number of token ids; 1 if the sequences hold vectors."""
    channels: int = 0
    """D, the size of each position's vector; 0 means token ids."""
    every: bool = False
    """Whether positions have answers, rather than whole sequences."""
    pairs: bool = False
    """Whether an example is two sequences, about which there is one answer."""

    @property
    def rows(self) -> int:
        """The number of sequences in an example."""
        return 2 if self.pairs else 1


@dataclass(frozen=True)
class LabeledBatch:
    """B examples, padded behind their ends to the length of the longest."""

    inputs: Tensor
    """[R,T] int64 ids or [R,T,D] float32 vectors; R is B, or 2B for pairs."""
    targets: Tensor
    """Classes int64 or numbers float32: [B] or [B,K]; with places [B,T] or [B,T,K]."""
    lengths: Tensor | None = None
    """[R] int64, the number of real positions of each row; None means all of them."""
    places: Tensor | None = None
    """[B,T] bool, true at the positions that have answers; None means one for each example."""

    @property
    def size(self) -> int:
        """B, the number of examples."""
        return len(self.targets)

    @property
    def learned(self) -> int:
        """How many answers there are."""
        return self.size if self.places is None else int(self.places.sum())

    @property
    def answers(self) -> Tensor:
        """The targets that count: [N] classes or [N,K] numbers."""
        return self.targets if self.places is None else self.targets[self.places]

    def part(self, examples: slice) -> LabeledBatch:
        """A batch of some of the examples."""
        each = len(self.inputs) // max(1, self.size)
        start, stop, _ = examples.indices(self.size)
        rows = slice(start * each, stop * each)
        return LabeledBatch(
            self.inputs[rows],
            self.targets[examples],
            None if self.lengths is None else self.lengths[rows],
            None if self.places is None else self.places[examples],
        )

    def arrays(self) -> dict[str, Any]:
        """The tensors by name, as arrays that numpy can save."""
        return {name: x.cpu().numpy() for name, x in vars(self).items() if x is not None}

    def to(self, device: torch.device) -> LabeledBatch:
        """The same batch on another device."""
        moved = {name: x.to(device) for name, x in vars(self).items() if x is not None}
        return replace(self, **moved)


class Examples(ABC):
    """Where the batches of a task come from."""

    @property
    @abstractmethod
    def problem(self) -> Problem:
        """What is asked."""

    @property
    @abstractmethod
    def about(self) -> Mapping[str, Any]:
        """What tells these examples from others: difficulty, or files and their digests."""

    @abstractmethod
    def train(self, step: int, size: int, seed: int) -> LabeledBatch:
        """The batch of a step, from 0, with so many examples."""

    @abstractmethod
    def held_out(self, split: Split, size: int) -> Iterator[LabeledBatch]:
        """All examples of "validation" or "test", in batches of at most so many."""

    @abstractmethod
    def count(self, split: Split) -> int | None:
        """The number of examples of a split; None if there is no end of them."""

    @property
    def chance(self) -> float | None:
        """The accuracy of guessing, where it is known; None where it is not."""
        return None


@dataclass(frozen=True)
class Part:
    """The examples of one split, in memory."""

    inputs: Sequence[np.ndarray]
    """Each [T] of ids, or [T,D] of numbers or of bytes; two in a row for each example of pairs."""
    targets: np.ndarray
    """[N] classes, or [N,K] numbers."""

    def digest(self) -> str:
        """The sha256 of inputs and targets."""
        digest = hashlib.sha256()
        for x in (*self.inputs, self.targets):
            x = np.ascontiguousarray(x)
            digest.update(f"{x.dtype.str}{x.shape}".encode() + x.tobytes())
        return digest.hexdigest()


class StoredExamples(Examples):
    """Examples in memory, which training reads once per epoch in a seeded order.

    ValueError if a part is empty, or has sequences or answers that do not fit the problem.
    """

    def __init__(
        self, problem: Problem, parts: Mapping[Split, Part], about: Mapping[str, Any]
    ) -> None:
        self._problem, self._parts, self._about = problem, dict(parts), dict(about)
        for name, part in parts.items():
            _check(problem, name, part)

    @property
    def problem(self) -> Problem:
        return self._problem

    @property
    def about(self) -> Mapping[str, Any]:
        return self._about

    def part(self, split: Split) -> Part:
        """The examples of a split; ValueError if there are none."""
        if split not in self._parts:
            raise ValueError(f"there is no {split} part; there are {', '.join(self._parts)}")
        return self._parts[split]

    def count(self, split: Split) -> int | None:
        return len(self._parts[split].targets) if split in self._parts else 0

    @property
    def chance(self) -> float | None:
        """The share of the most common class of the test part."""
        if self.problem.kind != "classify" or "test" not in self._parts:
            return None
        counts = np.bincount(self._parts["test"].targets.reshape(-1))
        return float(counts.max() / counts.sum())

    def train(self, step: int, size: int, seed: int) -> LabeledBatch:
        part = self.part("train")
        epochs, places = np.divmod(
            np.arange(step * size, (step + 1) * size, dtype=np.int64), len(part.targets)
        )
        chosen = np.empty_like(places)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            chosen[now] = shuffled(places[now], len(part.targets), (seed, int(epoch)))
        return self._batch(part, chosen)

    def held_out(self, split: Split, size: int) -> Iterator[LabeledBatch]:
        part = self.part(split)
        # Rows of like length stand together, so that little is computed for padding.
        rows = self.problem.rows
        lengths = [
            max(len(x) for x in part.inputs[rows * i : rows * (i + 1)])
            for i in range(len(part.targets))
        ]
        order = np.argsort(np.array(lengths), kind="stable")
        for at in range(0, len(order), size):
            yield self._batch(part, order[at : at + size])

    def _batch(self, part: Part, chosen: np.ndarray) -> LabeledBatch:
        each = self.problem.rows
        rows = [part.inputs[each * int(i) + k] for i in chosen for k in range(each)]
        inputs, lengths = padded(rows, self.problem)
        targets = torch.from_numpy(np.ascontiguousarray(part.targets[chosen]))
        if self.problem.every:
            places = torch.ones(inputs.shape[:2], dtype=torch.bool)
            return LabeledBatch(inputs, targets, lengths, places)
        return LabeledBatch(inputs, targets, lengths)


def padded(rows: Sequence[np.ndarray], problem: Problem) -> tuple[Tensor, Tensor | None]:
    """Rows [T] or [T,D] as one tensor [R,T] or [R,T,D], and their lengths unless all are equal."""
    lengths = [len(row) for row in rows]
    shape = (len(rows), max(lengths), *rows[0].shape[1:])
    out = np.zeros(shape, np.float32 if problem.channels else np.int64)
    for place, row in zip(out, rows, strict=True):
        bytes_ = problem.channels and row.dtype == np.uint8
        place[: len(row)] = row / _MIDDLE_OF_BYTES - 1 if bytes_ else row
    ragged = len(set(lengths)) > 1
    return torch.from_numpy(out), torch.tensor(lengths) if ragged else None


def split_off(
    part: Part, share: float, seed: int, problem: Problem, groups: np.ndarray | None = None
) -> tuple[Part, Part]:
    """Two parts of one: all but a share of the examples, and that share, in a seeded order.

    groups [N] says which examples belong together and may not be separated. ValueError if one of
    the parts would be empty.
    """
    groups = np.arange(len(part.targets)) if groups is None else groups
    names = np.unique(groups)
    order = np.random.default_rng(seed).permutation(len(names))
    taken = max(1, round(share * len(names)))
    if taken >= len(names):
        raise ValueError(
            f"{len(names)} examples are too few to keep {share:g} of them for validation"
        )
    kept = np.isin(groups, names[order[:taken]])
    return _chosen(part, np.flatnonzero(~kept), problem), _chosen(
        part, np.flatnonzero(kept), problem
    )


def _chosen(part: Part, chosen: np.ndarray, problem: Problem) -> Part:
    each = problem.rows
    inputs = [part.inputs[each * int(i) + k] for i in chosen for k in range(each)]
    return Part(inputs, part.targets[chosen])


def _check(problem: Problem, name: str, part: Part) -> None:
    """ValueError unless a part has examples, and these fit the problem."""
    count = len(part.targets)
    if not count:
        raise ValueError(f"the {name} part has no examples")
    if len(part.inputs) != count * problem.rows:
        raise ValueError(
            f"the {name} part has {len(part.inputs)} sequences and {count} answers; wanted "
            f"{problem.rows} for each answer"
        )
    for number, row in enumerate(part.inputs):
        where = f"sequence {number + 1} of the {name} part"
        if not len(row):
            raise ValueError(f"{where} is empty")
        wanted = (len(row), problem.channels) if problem.channels else (len(row),)
        if row.shape != wanted:
            raise ValueError(f"{where} is {list(row.shape)}; wanted {list(wanted)}")
        if row.dtype.kind == "f" and not np.isfinite(row).all():
            raise ValueError(f"{where} has missing or infinite numbers; fill them in, or leave it")
    if problem.kind == "classify":
        low, high = int(part.targets.min()), int(part.targets.max())
        if low < 0 or high >= problem.outputs:
            raise ValueError(
                f"the {name} part has classes from {low} to {high}; wanted 0 to "
                f"{problem.outputs - 1}"
            )
    elif not np.isfinite(part.targets).all():
        raise ValueError(f"the {name} part has an answer that is missing or infinite")
