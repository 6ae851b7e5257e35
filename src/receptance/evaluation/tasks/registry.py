"""The tasks by name, and difficulties as they are written: "pairs=8,length=64"."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

from receptance.evaluation.tasks.base import Task
from receptance.evaluation.tasks.passkey import Passkey
from receptance.evaluation.tasks.recall import MQAR, Induction, SelectiveCopying
from receptance.evaluation.tasks.tracking import S5, Parity

DRAWN: dict[str, type[Task]] = {
    task.name: task for task in (MQAR, Induction, SelectiveCopying, Passkey, Parity, S5)
}
_KINDS = {int: "a whole number", float: "a number", bool: "true or false"}


def make_task(name: str, setting: str = "", source: str | None = None) -> Task:
    """The task of this name at a difficulty such as "pairs=8,length=64".

    What is left out has its default. source is the text that a task needs as a haystack.
    ValueError names what is unknown, with the nearest name that is known.
    """
    if name not in DRAWN:
        raise ValueError(f"no task {name!r}{nearest(name, DRAWN)}")
    kind = DRAWN[name]
    given: dict[str, Any] = parse_setting(name, setting, _numbers(kind))
    if kind is Passkey:
        given["text"] = _text(name, source)
    elif source is not None:
        raise ValueError(f"{name} reads no files; leave {source} out")
    return kind(**given)


def parse_setting(name: str, setting: str, known: Mapping[str, type]) -> dict[str, Any]:
    """The numbers in "pairs=8,length=64", by name; ValueError names one that the task lacks."""
    found: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in setting.split(","))):
        key, equals, word = part.partition("=")
        if not equals or key not in known:
            raise ValueError(f"{name} has no setting {part!r}{nearest(key, known)}")
        found[key] = _value(name, key, word, known[key])
    return found


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message that refuses a name: what may have been meant, and all there is."""
    known = list(known)
    close = difflib.get_close_matches(name, known, 1)
    meant = f"; did you mean {close[0]}?" if close else ";"
    return f"{meant} there are {', '.join(known)}" if known else "; it has none"


def _numbers(kind: type) -> dict[str, type]:
    """The settings of a task and their types."""
    hints = get_type_hints(kind)
    fields = dataclasses.fields(kind)
    return {field.name: hints[field.name] for field in fields if hints[field.name] in _KINDS}


def _value(name: str, key: str, word: str, kind: type) -> Any:
    if kind is bool:
        if word in ("true", "false"):
            return word == "true"
    else:
        try:
            return kind(word)
        except ValueError:
            pass
    raise ValueError(f"{key} of {name} is {word!r}; it must be {_KINDS[kind]}")


def _text(name: str, source: str | None) -> bytes:
    if source is None:
        raise ValueError(f"{name} hides its questions in real text; name a text file with source=")
    try:
        return Path(source).expanduser().read_bytes()
    except OSError as error:
        raise ValueError(f"{source} cannot be read: {error.strerror}") from None
