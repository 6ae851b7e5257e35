"""Recipes: named sets of training options, in TOML files that say where each figure comes from.

A recipe is a table of the options of `receptance train` by their names in Python. An option whose
name has a dot, such as lora.rank, stands in a section: `rank` in `[lora]`.
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
    """The options, by name, of a recipe of the package or of a TOML file.

    `rank` in the section [lora] gets the name lora.rank. ValueError if there is no such recipe,
    naming the nearest one, or if the file is not TOML.
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

    options is a dataclass, whose fields may be dataclasses as well. ValueError names a key that is
    no option, with the nearest one that is, or a value that its option does not take.
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
    """The names that a recipe may use: the fields of a dataclass and of the dataclasses in it."""
    names = []
    for name, value, inner in _fields(options, prefix):
        names += [name] if inner is None else option_names(value, inner)
    return names


def _fields(options: Any, prefix: str) -> Iterator[tuple[str, Any, str | None]]:
    """Name in a recipe and value of each field; of a dataclass also the prefix of the names in it.

    That prefix is the dataclass's own name if its field is marked as a section (options.SECTION).
    """
    for field in dataclasses.fields(options):
        value, inner = getattr(options, field.name), None
        if dataclasses.is_dataclass(value):
            inner = f"{prefix}{field.name}." if field.metadata.get("section") else prefix
        yield prefix + field.name, value, inner


def _replaced(options: Options, recipe: Mapping[str, Any], prefix: str) -> Options:
    """A copy of the options in which every field that the recipe names has the recipe's value."""
    hints, changes = get_type_hints(type(options)), {}
    for name, value, inner in _fields(options, prefix):
        field = name.removeprefix(prefix)
        if inner is not None:
            changes[field] = _replaced(value, recipe, inner)
        elif name in recipe:
            changes[field] = _fitted(name, recipe[name], hints[field])
    return dataclasses.replace(options, **changes)  # type: ignore[type-var]


def _fitted(name: str, value: Any, hint: Any) -> Any:
    """The value as its field holds it: TOML has no paths and no tuples, and 1 is no float."""
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
    """The end of the message that refuses a name: what may have been meant, or all there is."""
    known = list(known)
    if close := difflib.get_close_matches(name, known, 1):
        return f"; did you mean {close[0]}?"
    return f"; there are {', '.join(sorted(known))}"
