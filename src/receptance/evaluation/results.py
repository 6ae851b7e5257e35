"""One form for the results of every measurement: what was measured, on which model and data.

`evaluate`, `compare`, `reproduce` and the reports that are made of them share it. A result is a
JSON object, which is written whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from receptance.atomic import check_replaceable, written
from receptance.inference.measure import machine
from receptance.version import __version__

FORMAT = "receptance-result"
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model that was measured."""

    name: str
    """The name of the model in figures and curves."""
    fingerprint: str | None = None
    """The digest of its weights."""
    about: dict[str, Any] = field(default_factory=dict)
    """What else tells it from others: its architecture, sizes, parameters, training."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Data that was read."""

    name: str
    digest: str | None = None
    """The sha256 of its content."""
    about: dict[str, Any] = field(default_factory=dict)
    """Its size in bytes, documents or tokens, its origin, the part that was taken."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number that was measured, with its interval if there is one."""

    name: str
    value: float
    model: str | None = None
    """The name of the subject that it belongs to."""
    unit: str = ""
    low: float | None = None
    high: float | None = None
    interval: str = ""
    """What low and high are, such as "95 % over 120 documents"."""
    about: dict[str, Any] = field(default_factory=dict)
    """What tells it from figures of the same name: the task, the length, the number of pairs."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Numbers that were measured at many places, such as losses at positions."""

    name: str
    x_name: str
    x: list[float]
    y_name: str
    y: list[float]
    model: str | None = None
    low: list[float] | None = None
    high: list[float] | None = None
    interval: str = ""
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, values in (("y", self.y), ("low", self.low), ("high", self.high)):
            if values is not None and len(values) != len(self.x):
                raise ValueError(
                    f"the curve {self.name!r} has {len(self.x)} places and {len(values)} values "
                    f"of {name}"
                )


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one measurement found.

    kind is its name for programs, such as "text" or "compare"; what is a sentence for people.
    """

    kind: str
    what: str
    models: Sequence[Subject] = ()
    data: Sequence[Source] = ()
    figures: Sequence[Figure] = ()
    curves: Sequence[Curve] = ()
    options: dict[str, Any] = field(default_factory=dict)
    """The options that decide the result, by name."""
    seed: int | None = None
    seconds: float | None = None
    notes: Sequence[str] = ()
    """Sentences that a reader needs: a protocol, a limit, a claim of the paper."""
    details: dict[str, Any] = field(default_factory=dict)
    """Whatever else this kind records, such as the harness's own results."""
    machine: dict[str, Any] = field(default_factory=machine)
    versions: dict[str, str] = field(default_factory=lambda: versions())

    def save(self, path: Path) -> None:
        """Write the result as JSON. ValueError if something else than a result is at path."""
        check_result(path)
        content = {"format": FORMAT, "schema": SCHEMA, **dataclasses.asdict(self)}
        with written(path) as file:
            file.write(json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read a result. ValueError if the file is none, or of a later schema."""
        try:
            if not path.is_file():
                raise ValueError("it is no plain file")
            content = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a result: {error}") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{path} is not a result; it was not written by receptance")
        if content.get("schema") != SCHEMA:
            raise ValueError(
                f"{path} has the schema {content.get('schema')}, and this version of receptance "
                f"reads {SCHEMA}; measure again, or take the version that wrote it"
            )
        parts = {"models": Subject, "data": Source, "figures": Figure, "curves": Curve}
        try:
            for name, kind in parts.items():
                content[name] = [_checked(kind(**part)) for part in content.get(name, ())]
            fields = {k: v for k, v in content.items() if k not in ("format", "schema")}
            return _checked(cls(**fields))
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is not a result: {error}") from None


def _checked(part: Any) -> Any:
    """A part of a result whose fields have the types that they should have; else ValueError."""
    for name, kind in get_type_hints(type(part)).items():
        if not _fits(getattr(part, name), kind):
            raise ValueError(f"{name} of a {type(part).__name__.lower()} has another type")
    return part


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value that was read from JSON has a type as annotations write it."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(x, args[1]) for x in value.values())
    if origin is not None and isinstance(origin, type) and issubclass(origin, Sequence):
        return isinstance(value, list | tuple) and all(_fits(x, args[0]) for x in value)
    if args:
        return any(_fits(value, each) for each in args)
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    return kind is Any or isinstance(value, kind)


def check_result(path: Path) -> None:
    """ValueError if there is something at path that is not a result: it would be lost."""
    check_replaceable(path, "the result", "a result", is_result)


def versions(*packages: str) -> dict[str, str]:
    """The versions of Python, of this package and of those named, which decide a result."""
    found = {"python": platform.python_version(), "receptance": __version__}
    return found | {name: metadata.version(name) for name in ("torch", *packages)}


def is_result(path: Path) -> bool:
    """Whether the file at path looks like a result; OSError if it cannot be read."""
    with path.open("rb") as file:
        return FORMAT.encode() in file.read(100)
