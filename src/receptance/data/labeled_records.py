"""Labeled examples of one's own: lines of JSON with a text or with values, and a label.

{"text": "a sentence", "label": "positive"}
{"values": [[0.1, 2.0], [0.3, 1.5]], "label": 3.5}
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from receptance.data.labeled import Part, Problem, Split, StoredExamples, split_off

_SHARE = 0.1  # of the records, each for validation and for the test


def read_labeled_records(
    file: Path, kind: Literal["classify", "regress"], *, max_length: int = 0, seed: int = 0
) -> tuple[StoredExamples, list[str]]:
    """The examples of a .jsonl file, and the names of their classes in alphabetical order.

    Texts are read as bytes, values as vectors, [T] or [T,D]; a file has one or the other. Sequences
    are cut to max_length positions, if that is not 0. Without a file of its own name with .test
    before the suffix, a tenth of the records is the test part; equal sequences are never divided
    between parts. ValueError names the line that is no example.
    """
    test_file = file.with_name(f"{file.stem}.test{file.suffix}")
    files = [file, *([test_file] if test_file.is_file() else [])]
    found = [_read(path, kind, max_length) for path in files]
    channels = {row.shape[1] if row.ndim > 1 else 0 for rows, _ in found for row in rows}
    if len(channels) > 1:
        raise ValueError(
            f"{file} has sequences of different kinds (channels: {sorted(channels)}; 0 means "
            "text); wanted one kind"
        )
    width = channels.pop()
    kinds = {type(label).__name__ for _, labels in found for label in labels}
    if kind == "classify" and len(kinds) > 1:
        raise ValueError(
            f"{file} has labels of the kinds {' and '.join(sorted(kinds))}; wanted one kind"
        )
    classes = sorted({label for _, labels in found for label in labels}, key=_name)
    classes = classes if kind == "classify" else []
    problem = Problem(
        kind=kind,
        outputs=len(classes) or 1,
        vocab_size=1 if width else 256,
        channels=width,
    )
    number = {label: n for n, label in enumerate(classes)}
    wholes = [
        Part(
            rows,
            np.array([number[label] for label in labels], np.int64)
            if classes
            else np.array([[float(label)] for label in labels], np.float32),
        )
        for rows, labels in found
    ]
    train, test = wholes if len(wholes) > 1 else _split_off(wholes[0], seed, problem)
    train, validation = _split_off(train, seed, problem)
    parts: dict[Split, Part] = {"train": train, "validation": validation, "test": test}
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    names = [_name(label) for label in classes]
    about = {"task": file.name, "sha256": digest, "classes": ", ".join(names)}
    return StoredExamples(problem, parts, about), names


def _split_off(part: Part, seed: int, problem: Problem) -> tuple[Part, Part]:
    """All but a tenth of the examples, and that tenth; equal sequences stay together."""
    names: dict[bytes, int] = {}
    groups = [names.setdefault(row.tobytes(), len(names)) for row in part.inputs]
    return split_off(part, _SHARE, seed, problem, np.array(groups))


def _read(file: Path, kind: str, max_length: int) -> tuple[list[np.ndarray], list[Any]]:
    """The sequences of a file and their labels."""
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    rows, labels = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row, label = _example(line, kind)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} line {number}: {error}") from None
        rows.append(row[: max_length or None])
        labels.append(label)
    if not rows:
        raise ValueError(f"{file} has no examples")
    return rows, labels


def _example(line: bytes, kind: str) -> tuple[np.ndarray, Any]:
    record = json.loads(line)
    if not isinstance(record, dict) or "label" not in record:
        raise ValueError('wanted an object with "label", and with "text" or "values"')
    if "text" in record and "values" in record:
        raise ValueError('there are "text" and "values"; wanted one of them')
    return _sequence(record), _label(record["label"], kind)


def _label(label: Any, kind: str) -> Any:
    """A label of the kind that the problem wants."""
    shown = repr(label)[:80]
    if kind == "classify":
        if not isinstance(label, str | int):
            raise ValueError(f"the label is {shown}; a class is a string or a whole number")
    elif isinstance(label, bool) or not isinstance(label, int | float):
        raise ValueError(f"the label is {shown}; a regression wants numbers")
    elif not abs(label) <= float(np.finfo(np.float32).max):
        raise ValueError(f"the label is {shown}; a regression wants numbers within float32")
    return label


def _sequence(record: dict[str, Any]) -> np.ndarray:
    """The bytes of a text [T], or values [T,D]."""
    if isinstance(text := record.get("text"), str) and text:
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
    try:
        values = np.array(record.get("values", []))
    except ValueError:  # lists of different lengths
        values = np.array(None)
    if values.ndim not in (1, 2) or not values.size or values.dtype.kind not in "iuf":
        raise ValueError('wanted "text" that is not empty, or "values" of numbers, [T] or [T,D]')
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError('"values" has a number that is not finite in float32')
    return values.reshape(len(values), -1)


def _name(label: Any) -> str:
    return label if isinstance(label, str) else json.dumps(label)
