"""Time series: the .ts files of the UCR and UEA archives, and windows of one long series.

A .ts file has a header of lines that begin with @ and, after @data, one example a line: dimensions
between colons, values between commas, the class or the number to predict last.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from receptance.data.batches import shuffled
from receptance.data.labeled import (
    Examples,
    LabeledBatch,
    Part,
    Problem,
    Split,
    StoredExamples,
    split_off,
)

_SHARES = {"validation": 0.1, "test": 0.2}  # of a long series, at its end, in this order
_SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class SeriesFile:
    """What a .ts file holds."""

    series: list[np.ndarray]
    """Each [T,D] float32; the lengths may differ."""
    labels: list[str]
    """The last field of each line."""
    classes: list[str]
    """The classes that the header names, in its order; none if the labels are numbers."""


def read_ts(file: Path) -> SeriesFile:
    """Read a .ts file; ValueError names the line that is not as the format wants it."""
    try:
        lines = file.read_text("utf-8", "replace").splitlines()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    header: dict[str, list[str]] = {}
    found = SeriesFile([], [], [])
    inside = False
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith(("#", "%")):
            continue
        if not inside:
            if not line.startswith("@"):
                raise ValueError(f"{file} line {number}: wanted a header line that begins with @")
            key, *values = line[1:].split()
            header[key.lower()] = values
            inside = key.lower() == "data"
            continue
        try:
            *dimensions, label = line.split(":")
            before = found.series[0].shape[1] if found.series else len(dimensions)
            found.series.append(_values(dimensions, before))
        except ValueError as error:
            raise ValueError(f"{file} line {number}: {error}") from None
        found.labels.append(label.strip())
    if header.get("timestamps", ["false"])[0].lower() == "true":
        raise ValueError(f"{file} has time stamps; this reader takes values at even steps")
    named = header.get("classlabel", ["false"])
    if named[0].lower() == "true":
        found.classes.extend(named[1:])
    if not found.series:
        raise ValueError(f"{file} has no example after @data")
    return found


def _values(dimensions: list[str], wanted: int) -> np.ndarray:
    """[T,D] of the fields of a line."""
    if not dimensions:
        raise ValueError("there is no colon, so there is no label")
    if len(dimensions) != wanted:
        raise ValueError(f"it has {len(dimensions)} dimensions, and those before it {wanted}")
    rows = [[float(word) for word in text.split(",")] for text in dimensions if "?" not in text]
    if len(rows) < len(dimensions):
        raise ValueError("a value is missing (?); fill it in, or leave the example out")
    if len({len(row) for row in rows}) > 1:
        raise ValueError("its dimensions have different lengths")
    values = np.array(rows).T
    if not (abs(values) <= np.finfo(np.float32).max).all():
        raise ValueError("a value is not finite in float32; fill it in, or leave the example out")
    return values.astype(np.float32)


def read_archive(
    file: Path,
    kind: Literal["classify", "regress"],
    *,
    validation: float = 0.2,
    seed: int = 0,
) -> tuple[StoredExamples, list[str]]:
    """A data set of the archives, by its NAME_TRAIN.ts, and the names of its classes.

    NAME_TEST.ts must lie beside it. Each dimension is scaled by the mean and the deviation of the
    training part. A share of that is kept for validation.
    """
    stem, mark, suffix = file.name.partition("_TRAIN")
    if not mark:
        raise ValueError(f"{file} must be called NAME_TRAIN.ts, with NAME_TEST.ts beside it")
    files = {"train": file, "test": file.with_name(f"{stem}_TEST{suffix}")}
    found = {split: read_ts(path) for split, path in files.items()}
    channels, others = (found[split].series[0].shape[1] for split in ("train", "test"))
    if channels != others:
        raise ValueError(f"{files['test']} has {others} dimensions, and {file.name} has {channels}")
    classes = found["train"].classes
    if kind == "classify" and not classes:
        raise ValueError(f"{file} names no classes in its header; it is for regression")
    if kind == "regress" and classes:
        raise ValueError(f"{file} has the classes {', '.join(classes)}; it is for classification")
    outputs = len(classes) or 1
    problem = Problem(kind=kind, outputs=outputs, channels=channels)
    joined = np.concatenate(found["train"].series)
    mean, deviation = joined.mean(axis=0), joined.std(axis=0) + 1e-8
    whole = {
        split: Part(
            [((x - mean) / deviation).astype(np.float32) for x in each.series],
            _targets(files[split], each, classes),
        )
        for split, each in found.items()
    }
    about: dict[str, Any] = {"task": stem}
    if kind == "regress":
        center, spread = whole["train"].targets.mean(), whole["train"].targets.std() + 1e-8
        whole = {
            split: Part(part.inputs, ((part.targets - center) / spread).astype(np.float32))
            for split, part in whole.items()
        }
        about |= {"answers' mean": float(center), "answers' deviation": float(spread)}
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files.values())).hexdigest()
    train, kept = split_off(whole["train"], validation, seed, problem)
    parts: dict[Split, Part] = {"train": train, "validation": kept, "test": whole["test"]}
    return StoredExamples(problem, parts, about | {"sha256": digest}), classes


def _targets(file: Path, found: SeriesFile, classes: list[str]) -> np.ndarray:
    try:
        if classes:
            return np.array([classes.index(label) for label in found.labels], np.int64)
        answers = np.array([[float(label)] for label in found.labels], np.float32)
        if not np.isfinite(answers).all():
            raise ValueError("an answer is not finite")
        return answers
    except ValueError as error:
        raise ValueError(f"{file} has a label that its header does not announce: {error}") from None


class SeriesWindows(Examples):
    """A long series to be forecast: after each position, how the next values differ from it.

    A row is a window of `history` positions, and the answer at each position has the next `horizon`
    values of all channels, less the value at the position: to answer zeros is to say that all stays
    as it is. Training learns all positions of a window; validation and test ask at the last
    position only. The last fifth of the series is for the test, the tenth before it for validation.
    Answers lie in their own part; what they are forecast from may reach into the part before.
    Channels are scaled by the mean and deviation of the training part.
    """

    def __init__(
        self, values: np.ndarray, *, history: int, horizon: int, about: Mapping[str, Any]
    ) -> None:
        """values [T,D]. ValueError if a part is shorter than a window and its horizon."""
        if history < 1 or horizon < 1:
            raise ValueError(f"history is {history} and horizon {horizon}; both are at least 1")
        if values.ndim != 2 or not np.isfinite(values).all():
            raise ValueError("the series has missing or infinite values; fill them in first")
        self.history, self.horizon = history, horizon
        count = len(values)
        test = count - int(_SHARES["test"] * count)
        validation = test - int(_SHARES["validation"] * count)
        self._ends = {"train": validation, "validation": test, "test": count}
        self._starts = {"train": 0, "validation": validation, "test": test}
        shortest = min(validation - history, test - validation, count - test) - horizon
        if shortest < 1:
            raise ValueError(
                f"the series has {count} values, too few for parts with a history of {history} "
                f"and a horizon of {horizon}; take shorter ones"
            )
        head = values[:validation]
        with np.errstate(over="ignore", invalid="ignore"):
            self.mean, self.deviation = head.mean(axis=0), head.std(axis=0) + 1e-8
            self.values = ((values - self.mean) / self.deviation).astype(np.float32)
        if not np.isfinite(self.values).all():
            raise ValueError("the series has values that are too large for float32; scale them")
        self._about = dict(about)

    @property
    def problem(self) -> Problem:
        """The next values of all channels, after each position."""
        channels = self.values.shape[1]
        return Problem(
            kind="regress", outputs=self.horizon * channels, channels=channels, every=True
        )

    @property
    def about(self) -> Mapping[str, Any]:
        """What the series is, and the lengths of its windows."""
        return self._about | {
            "history": self.history,
            "horizon": self.horizon,
            "values": len(self.values),
            "channels": self.values.shape[1],
        }

    def _origins(self, split: Split) -> range:
        """The positions after which a split's forecasts begin, so that all they need is there."""
        first = max(self.history - 1, self._starts[split] - 1)
        return range(first, self._ends[split] - self.horizon)

    def count(self, split: Split) -> int | None:
        """The number of windows whose answers lie in a part."""
        return len(self._origins(split))

    def train(self, step: int, size: int, seed: int) -> LabeledBatch:
        """Windows of the training part, each once per epoch, with every position asked about."""
        origins = self._origins("train")
        places = np.arange(step * size, (step + 1) * size, dtype=np.int64)
        epochs, places = np.divmod(places, len(origins))
        for epoch in np.unique(epochs):
            now = epochs == epoch
            places[now] = shuffled(places[now], len(origins), (seed, int(epoch)))
        return self._batch(origins.start + places, every=True)

    def held_out(self, split: Split, size: int) -> Iterator[LabeledBatch]:
        """All windows of a part, in their order; only their last position is asked about."""
        origins = np.array(self._origins(split))
        for at in range(0, len(origins), size):
            yield self._batch(origins[at : at + size], every=False)

    def _batch(self, origins: np.ndarray, *, every: bool) -> LabeledBatch:
        places = origins[:, None] + np.arange(1 - self.history, 1)
        inputs = self.values[places]
        ahead = self.values[places[..., None] + np.arange(1, self.horizon + 1)]
        targets = (ahead - inputs[:, :, None]).reshape(*places.shape, -1)
        asked = np.full(places.shape, every)
        asked[:, -1] = True
        tensors = (torch.from_numpy(x) for x in (inputs, targets, asked))
        rows, answers, mask = tensors
        return LabeledBatch(rows, answers, places=mask)


def read_columns(file: Path, columns: tuple[str, ...] = ()) -> tuple[np.ndarray, list[str]]:
    """The numeric columns of a .csv file with a header, [T,D], and their names.

    Without names all columns are taken but those in which no value is a number. ValueError names a
    column that is missing, or a value that is no number.
    """
    lines, header, rows = _table(file)
    if missing := [name for name in columns if name not in header]:
        raise ValueError(f"{file} has no column {missing[0]!r}; there are {', '.join(header)}")
    found, names = [], []
    for name, words in zip(header, zip(*rows, strict=True), strict=True):
        numbers = [_number(word) for word in words]
        if (columns and name not in columns) or (not columns and set(numbers) == {None}):
            continue
        if None in numbers:
            first = numbers.index(None)
            raise ValueError(
                f"{file} line {lines[first]}: {words[first]!r} in column {name!r} is no number; "
                "fill it in, or name the columns to read"
            )
        found.append(numbers)
        names.append(name)
    if not found:
        raise ValueError(f"{file} has no column of numbers")
    return np.array(found, np.float64).T, names


def _table(file: Path) -> tuple[list[int], list[str], list[list[str]]]:
    """The header and the rows of a .csv file, and the number of each row's line before both."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream)
            read = [(reader.line_num, row) for row in reader if row]
        (_, header), *others = read or [(0, [])]
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{file} is not a .csv file: {error}") from None
    if not header:
        raise ValueError(f"{file} is not a .csv file with a header: it is empty")
    if not others:
        raise ValueError(f"{file} has no column of numbers below its header")
    if any(_number(name) is not None for name in header):
        raise ValueError(f"{file} begins with numbers; wanted a header with the columns' names")
    if twice := [name for name in header if header.count(name) > 1]:
        raise ValueError(f"{file} has two columns {twice[0]!r}; give each a name of its own")
    for line, row in others:
        if len(row) != len(header):
            raise ValueError(f"{file} line {line} has {len(row)} fields, not {len(header)}")
    return [line for line, _ in others], header, [row for _, row in others]


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
