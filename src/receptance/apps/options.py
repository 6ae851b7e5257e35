"""Parsing the arguments of a command into a dataclass of options, with one line for each mistake.

tyro makes help texts and values of the dataclasses. The arguments, called words here, are checked
before tyro sees them, for two reasons: its errors are boxes of several lines, and its options for
lists take every word that follows, even a prompt. Here an option for a list takes one value and can
be repeated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import types
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from receptance.apps.help import help_text

Parsed = TypeVar("Parsed")

_WORDS = {int: "a whole number", float: "a number", Path: "a path, . for the current folder"}
_METAVARS = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH"}
# The characters of the box that tyro draws around an error.
_BOX = re.compile(r"[╭╮╰╯│─]+")


def parse(cls: type[Parsed], argv: Sequence[str], prog: str, default: Any = None) -> Parsed:
    """Parse the words into a dataclass; options that are not given come from the default.

    -h and --help print a help text and leave with 0: that of the options that the class names in
    COMMON, with its EXAMPLES, or that of all if it names none or after --help-all. ValueError says
    in one line what is wrong. An option for a list (`tuple[X, ...]`) takes one value and may be
    repeated; the values that are given replace the default.
    """
    words = _Words(cls, prog, complete=default is not None)
    rest = words.check(argv)
    given: dict[str, Any] = {} if default is None else {"default": default}
    said, shown = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(shown), _registry():
            parsed = tyro.cli(cls, args=rest, prog=prog, config=(tyro.conf.DisallowNone,), **given)
        for option, values in words.lists.items():
            parsed = _replaced(parsed, option.path, tuple(values))
    except SystemExit as leaving:
        if leaving.code == 0:
            common = "" if words.wants_all else getattr(cls, "COMMON", "")
            examples = getattr(cls, "EXAMPLES", ())
            print(help_text(shown.getvalue(), prog, examples, common), end="")
            raise
        cause = _cause(leaving)
        message = _unboxed(said.getvalue()) if cause is None else words.named(cause)
        raise ValueError(message) from None
    except ValueError as error:
        raise ValueError(words.named(error)) from None
    return parsed


def flags(cls: type) -> dict[str, str]:
    """The flags of a dataclass of options by the names of its fields, without positionals."""
    return {option.path[-1]: option.flag for option, place in _fields(cls) if not place}


@dataclasses.dataclass(frozen=True)
class _Option:
    """One field of a dataclass of options, or of a dataclass inside it."""

    flag: str
    """The name of the option with its dashes; for a positional the name that help shows."""
    path: tuple[str, ...]
    """The names of the fields that lead to it from the outermost dataclass."""
    owner: type
    kind: Any
    """The type of one value."""
    count: int = 1
    """The number of values that the option takes at once."""
    many: bool = False
    """Whether the field is a list of any length."""
    required: bool = False

    def converted(self, word: str) -> Any:
        """The word as a value of the option's type; ValueError if it is not one."""
        if get_origin(self.kind) is Literal:
            by_word = {str(choice): choice for choice in get_args(self.kind)}
            if word in by_word:
                return by_word[word]
            wanted = f"one of {', '.join(by_word)}"
        else:
            try:
                if self.kind is Path and not word:
                    raise ValueError("an empty path would mean the current folder")
                return self.kind(word)
            except ValueError:
                wanted = _WORDS.get(self.kind, "a value")
        raise ValueError(f"{self.flag} is {word!r}; it must be {wanted}")

    def accepts(self, word: str) -> bool:
        """Whether the option takes other values than text, and the word could be one of them."""
        try:
            self.converted(word)
        except ValueError:
            return False
        return self.kind not in (str, Path)


class _Words:
    """The words of one call, checked against the fields of a dataclass."""

    def __init__(self, cls: type, prog: str, complete: bool) -> None:
        self._prog, self._complete = prog, complete
        self._by_flag: dict[str, _Option] = {}
        self._by_field: dict[tuple[type, str], _Option] = {}
        self._places: list[_Option] = []
        self.lists: dict[_Option, list[Any]] = {}
        self.wants_all = False
        for option, positional in _fields(cls):
            self._by_field[option.owner, option.path[-1]] = option
            if positional:
                self._places.append(option)
                continue
            self._by_flag[option.flag] = option
            if option.kind is bool:
                parent, dot, name = option.flag[2:].rpartition(".")
                self._by_flag[f"--{parent}{dot}no-{name}"] = option

    def check(self, argv: Sequence[str]) -> list[str]:
        """The words without options for lists, whose values go to `lists`.

        ValueError for mistakes that tyro would refuse. A request for help ends the check.
        """
        left, rest, seen, places = deque(argv), list[str](), set[_Option](), 0
        while left:
            word = left.popleft()
            if word in ("-h", "--help", "--help-all"):
                self.wants_all = word == "--help-all"
                return ["--help"]
            if word == "--":
                places += len(left)
                return self._complete_words([*rest, word, *left], seen, places)
            if not _is_flag(word):
                places += 1
                self._check_place(word, places)
                rest.append(word)
                continue
            option, values = self._taken(word, left)
            seen.add(option)
            if option.many:
                self.lists.setdefault(option, []).extend(map(option.converted, values))
                self._check_next(option, left, places)
            else:
                rest += [word, *values[1 if "=" in word else 0 :]]  # --flag=value is one word
        return self._complete_words(rest, seen, places)

    def named(self, error: ValueError) -> str:
        """The text of an error that begins with a field's name, with that name as a flag."""
        text = str(error)
        name = re.match(r"\w*", text)
        option = self._by_field.get((_refusing(error), name[0])) if name else None
        return text if option is None else option.flag + text[len(option.path[-1]) :]

    def _taken(self, word: str, left: deque[str]) -> tuple[_Option, list[str]]:
        """The option that a word names, and its values, which are taken off the words left."""
        name, equals, value = word.partition("=")
        option = self._by_flag.get(name.replace("_", "-"))
        if option is None:
            raise ValueError(f"unknown option {name}{self._nearest(name)}")
        if option.kind is bool:
            if equals:
                raise ValueError(f"{name} takes no value; leave out ={value}")
            return option, []
        values = [value] if equals else []
        while len(values) < option.count and left and not _ends_values(left[0]):
            values.append(left.popleft())
        if len(values) < option.count:
            wanted = "a value" if option.count == 1 else f"{option.count} values"
            dashed = f"; if {left[0]} is meant, write {name}={left[0]}" if left else ""
            known = left and left[0].partition("=")[0] in self._by_flag
            raise ValueError(f"{name} wants {wanted}" + ("" if known else dashed))
        for found in values:
            option.converted(found)
        return option, values

    def _check_place(self, word: str, places: int) -> None:
        """ValueError if a word without a flag is none of those that its place allows."""
        for place in self._places[places - 1 : places]:
            if get_origin(place.kind) is Literal:
                place.converted(word)

    def _nearest(self, name: str) -> str:
        near = difflib.get_close_matches(name, self._by_flag, 1)
        if near:
            return f"; did you mean {near[0]}?"
        texts = "" if not self._places else "; a text that begins with a dash comes last, behind --"
        return f"; {self._prog} --help lists them{texts}"

    def _check_next(self, option: _Option, left: deque[str], places: int) -> None:
        """Refuse a word behind a list's value that looks like one more value of it."""
        if not left or _ends_values(left[0]):
            return
        single = sum(not place.many for place in self._places)
        full = places >= max(1, single + any(place.many for place in self._places))
        if full or option.accepts(left[0]):
            raise ValueError(
                f"{option.flag} takes one value, and {left[0]!r} follows it; for several values "
                f"repeat the option: {option.flag} ... {option.flag} {left[0]}"
            )

    def _complete_words(self, words: list[str], seen: set[_Option], places: int) -> list[str]:
        """The words; ValueError if a required option is missing, or a word has no place."""
        single = [place for place in self._places if not place.many]
        required = [place for place in single if place.required]
        missing = [place.flag for place in required[places:]]
        missing += [o.flag for o in self._by_flag.values() if o.required and o not in seen]
        if missing and not self._complete:
            raise ValueError(
                f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; "
                f"{self._prog} --help says more"
            )
        if places > len(single) and len(single) == len(self._places):
            takes = " ".join(place.flag for place in single) or "options only"
            raise ValueError(f"a word too many: {self._prog} takes {takes}")
        return words


def _is_flag(word: str) -> bool:
    return re.match(r"--?[A-Za-z]", word) is not None


def _ends_values(word: str) -> bool:
    return word == "--" or _is_flag(word)


def _fields(
    cls: type, path: tuple[str, ...] = (), prefix: str = ""
) -> Iterator[tuple[_Option, bool]]:
    """Every option of a dataclass and of those inside it, and whether it is a positional."""
    hints = get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        notes: list[Any]
        kind, *notes = _unwrapped(hints[field.name])
        names = [note.name for note in notes if getattr(note, "name", None) is not None]
        name = names[0] if names else field.name.replace("_", "-")
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            inner = f"{prefix}{name}." if name else prefix
            yield from _fields(kind, (*path, field.name), inner)
            continue
        positional = tyro.conf.Positional in notes
        shown = [note.metavar for note in notes if getattr(note, "metavar", None)]
        one, count, many = _shape(kind)
        absent = field.default is field.default_factory is dataclasses.MISSING
        yield (
            _Option(
                flag=(shown[0] if shown else name.upper()) if positional else f"--{prefix}{name}",
                path=(*path, field.name),
                owner=cls,
                kind=one,
                count=count,
                many=many,
                required=absent and not many,
            ),
            positional,
        )


def _unwrapped(hint: Any) -> tuple[Any, ...]:
    """The type of a field, and the notes that Annotated adds to it."""
    return get_args(hint) if get_origin(hint) is Annotated else (hint,)


def _shape(kind: Any) -> tuple[Any, int, bool]:
    """The type of one value, the number taken at once, and whether it is a list of any length."""
    if get_origin(kind) is not tuple:
        return _single(kind), 1, False
    inner = get_args(kind)
    many = inner[-1] is Ellipsis
    return _single(inner[0]), 1 if many else len(inner), many


def _single(kind: Any) -> Any:
    """The type that words are converted to: a union without its None."""
    if get_origin(kind) not in (Union, types.UnionType):
        return kind
    kinds = [part for part in get_args(kind) if part is not type(None)]
    if any(get_origin(part) is not Literal for part in kinds):
        return kinds[0]
    return Literal[tuple(choice for part in kinds for choice in get_args(part))]


def _registry() -> ConstructorRegistry:
    """The rules of tyro, and another one: help shows an option for a list with one value."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def repeated(about: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        if get_origin(about.type) is not tuple or tyro.conf.Positional in about.markers:
            return None
        one, _, many = _shape(about.type)
        if not many:
            return None
        choices = ",".join(map(str, get_args(one)))
        return PrimitiveConstructorSpec(
            nargs="*",
            metavar=f"{_METAVARS.get(one, '{' + choices + '}')} (repeatable)",
            instance_from_str=tuple,  # This is never called, as the words hold no lists by now.
            is_instance=lambda value: isinstance(value, tuple),
            str_from_instance=lambda value: [str(item) for item in value],
        )

    return registry


def _replaced(parsed: Any, path: tuple[str, ...], value: Any) -> Any:
    """A copy of the dataclass in which the field at the end of the path has another value."""
    name, *rest = path
    inner = _replaced(getattr(parsed, name), tuple(rest), value) if rest else value
    return dataclasses.replace(parsed, **{name: inner})


def _cause(leaving: SystemExit) -> ValueError | None:
    """The ValueError of a dataclass that made tyro leave; None if there was none."""
    error: BaseException | None = leaving
    while error is not None:
        if isinstance(error, ValueError) and _refusing(error) is not type(None):
            return error
        error = error.__context__
    return None


def _refusing(error: ValueError) -> type:
    """The dataclass whose check raised the error; NoneType if none did."""
    owner, trace = type(None), error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_name == "__post_init__":
            owner = type(trace.tb_frame.f_locals["self"])
        trace = trace.tb_next
    return owner


def _unboxed(text: str) -> str:
    """The text inside tyro's box, in one line."""
    return " ".join(_BOX.sub(" ", text).split())
