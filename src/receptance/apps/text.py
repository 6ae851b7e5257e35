"""Changes to text that comes from the command line or goes to the terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping

# The control characters of ASCII and Latin-1 (C0, DEL and C1). A terminal obeys some of them, alone
# or as the beginning of a longer command.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}
_LAYOUT = {ord("\n"), ord("\t")}
_IN_LINES = {code: shown for code, shown in _CONTROLS.items() if code not in _LAYOUT}

_ESCAPE = re.compile(r"\\(?:([nt\\])|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|(.?))", re.DOTALL)
_NAMED = {"n": "\n", "t": "\t", "\\": "\\"}

# The library's messages name an argument like this: tokenizer=, tokenizer=FILE, recompute=True.
_ARGUMENT = re.compile(
    r'(?<![\w=/."-])([a-z][a-z_]*)=(True|False|[A-Z]+|"\w*")?(?=[\s;,)]|\.?$|\.\s)'
)
# A message may begin with one that has a wrong value.
_WRONG = re.compile(r"^([a-z]+(?:_[a-z]+)*)(?= is [^;]*; it must be )")
# It also names one after these words. An underscore tells such a name from other words.
_NAMED_ARGUMENT = re.compile(r"(?:(?<=\bset )|(?<=\bwith ))([a-z]+(?:_[a-z]+)+)(?=[ ,;]|$)")


def as_flags(message: str, names: Mapping[str, str] | None = None) -> str:
    """A message of the library with its arguments as the flags of a command.

    tokenizer=FILE becomes --tokenizer FILE, recompute=True --recompute, recompute=False
    --no-recompute. names has the flags of the command by argument, such as --lora.rank for rank; it
    decides which names are meant in "set skip_bad" and in "rank is 0; it must be ...".
    """
    flags = names or {}

    def flag(found: re.Match[str]) -> str:
        name = flags.get(found[1], "--" + found[1].replace("_", "-"))
        value = (found[2] or "").strip('"')
        if value in ("", "True"):
            return name
        return f"--no-{name[2:]}" if value == "False" else f"{name} {value}"

    named = message
    for pattern in (_NAMED_ARGUMENT, _WRONG):
        named = pattern.sub(lambda found: flags.get(found[1], found[1]), named)
    return _ARGUMENT.sub(flag, named)


def visible(text: str, *, one_line: bool = False) -> str:
    r"""The text with its control characters spelled out, an escape as \x1b.

    Newlines and tabs stay, unless the text has to be one line. A text may be given in pieces,
    because every character is handled by itself.
    """
    return text.translate(_CONTROLS if one_line else _IN_LINES)


def unescaped(text: str) -> str:
    r"""The text with \n, \t, \\, \xNN and \uNNNN as the characters they stand for, as in Python.

    Any other backslash is a ValueError.
    """

    def character(found: re.Match[str]) -> str:
        name, byte, unit, other = found.groups()
        if other is not None:
            raise ValueError(
                f"{text!r} holds a backslash before {other!r}; wanted \\n, \\t, \\\\, \\xNN or "
                "\\uNNNN, and \\\\ for a backslash itself"
            )
        if unit and 0xD800 <= int(unit, 16) < 0xE000:
            raise ValueError(
                f"\\u{unit} is half of a surrogate pair, no character; write the character itself"
            )
        return _NAMED[name] if name else chr(int(byte or unit, 16))

    return _ESCAPE.sub(character, text)


def has_escapes(text: str) -> bool:
    r"""Whether there is a backslash escape that `unescaped` would read, such as \n."""
    return any(found[4] is None for found in _ESCAPE.finditer(text))
