"""Recipes: named sets of training options, TOML files beside this one, with where they come from.

A recipe is a table of the options of `receptance train` by their names in Python. What has a dot
on the command line (--lora.rank) stands in a section ([lora], rank).
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Options = TypeVar("Options")

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def recipe_names() -> list[str]:
    """The recipes that come with the package, in alphabetical order."""
    files = resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def load_recipe(name_or_path: str | Path) -> dict[str, Any]:
    """Options by name, of a recipe of the package or of a TOML file; `rank` of [lora] is lora.rank.

    ValueError when there is none (naming the nearest), or when it is not TOML.
    """
    name, path = str(name_or_path), Path(name_or_path)
    file: Traversable = path
    if name in recipe_names():
        file = resources.files(__name__).joinpath(f"{name}.toml")
    elif not path.is_file():
        raise ValueError(f"no recipe {name!r}{_nearest(name, recipe_names())}")
    try:
        recipe = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"recipe {name}: {error}") from None
    if "recipe" in recipe:
        raise ValueError(f"recipe {name}: it names another recipe; copy that one's options into it")
    found: dict[str, Any] = {}
    for key, value in recipe.items():
        section = isinstance(value, dict)
        found |= {f"{key}.{k}": v for k, v in value.items()} if section else {key: value}
    return found


def apply_recipe(options: Options, name_or_path: str | Path) -> Options:
    """The options with a recipe's values in place of theirs.

    options is a dataclass, parts of which may be dataclasses as well. ValueError names a key that
    is no option, the nearest there is, and values that an option does not take.
    """
    recipe, known = load_recipe(name_or_path), option_names(options)
    for key in recipe:
        if key not in known:
            raise ValueError(f"recipe {name_or_path}: no option {key!r}{_nearest(key, known)}")
    try:
        return _replaced(options, recipe, "")
    except ValueError as error:
        raise ValueError(f"recipe {name_or_path}: {error}") from None


def option_names(options: Any, prefix: str = "") -> list[str]:
    """The fields of a dataclass, in place of those that are dataclasses their fields."""
    names = []
    for name, value, inner in _fields(options, prefix):
        names += [name] if inner is None else option_names(value, inner)
    return names


def _fields(options: Any, prefix: str) -> Iterator[tuple[str, Any, str | None]]:
    """Name in a recipe and value of each field, and what the names inside it begin with if it is a
    dataclass: nothing if it has the empty name on the command line (tyro.conf.arg(name=""))."""
    hints = get_type_hints(type(options), include_extras=True)
    for field in dataclasses.fields(options):
        value, inner = getattr(options, field.name), None
        if dataclasses.is_dataclass(value):
            notes = getattr(hints[field.name], "__metadata__", ())
            nameless = any(getattr(note, "name", None) == "" for note in notes)
            inner = prefix if nameless else f"{prefix}{field.name}."
        yield prefix + field.name, value, inner


def _replaced(options: Options, recipe: Mapping[str, Any], prefix: str) -> Options:
    """A copy with all values in it that it has fields for."""
    hints, changes = get_type_hints(type(options)), {}
    for name, value, inner in _fields(options, prefix):
        field = name.removeprefix(prefix)
        if inner is not None:
            changes[field] = _replaced(value, recipe, inner)
        elif name in recipe:
            changes[field] = _fitted(name, recipe[name], hints[field])
    return dataclasses.replace(options, **changes)  # type: ignore[type-var]


def _fitted(name: str, value: Any, hint: Any) -> Any:
    """The value as its field holds it: TOML has no paths, no tuples, and 1 is no float in it."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _fitted(name, value, next(kind for kind in inner if kind is not type(None)))
    if origin is tuple and isinstance(value, list):
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        if len(kinds) != len(value):
            raise ValueError(f"{name} has {len(value)} values; it takes {len(kinds)}")
        return tuple(
            _fitted(f"an item of {name}", *pair) for pair in zip(value, kinds, strict=True)
        )
    if origin is Literal and value in inner:
        return value
    if hint is Path and isinstance(value, str):
        return Path(value)
    if type(value) is hint or (hint is float and type(value) is int):
        return hint(value)
    raise ValueError(f"{name} is {value!r}; it must be {_described(hint)}")


def _described(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    return _WORDS.get(hint, "a list" if get_origin(hint) is tuple else "a text")


def _nearest(name: str, known: Iterable[str]) -> str:
    """What to add to the refusal of a name."""
    known = list(known)
    if close := difflib.get_close_matches(name, known, 1):
        return f"; did you mean {close[0]}?"
    return f"; there are {', '.join(sorted(known))}"
