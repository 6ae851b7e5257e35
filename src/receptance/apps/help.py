"""Help texts: those that tyro writes, folded anew, and the short ones of --help."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

# Help texts are folded to at most this many columns, and descriptions begin in this column.
_WIDEST, _COLUMN = 100, 24
# What tyro says of an option that has no default, perhaps on two lines.
_NO_DEFAULT = re.compile(r"[ \n]+\(default:(\s+None)?\s*\)")
_DEFAULT = re.compile(r"\s*\((default: [^()]*|required)\)$")
# What need not be said in a short help text: switches and limits are off by default.
_EXPECTED = ("default: False", "default: 0", "default: 0.0", "required")
# The end of a description's first statement.
_FIRST = re.compile(r"(?<!\.\.)[.;] ")


@dataclass(frozen=True)
class _Entry:
    """A positional or an option with its description."""

    name: str
    """How it is written, with the form of its value."""
    text: str

    def is_flag(self, flag: str) -> bool:
        """Whether this entry is the option with this flag."""
        return re.split(r"[ ,]", self.name)[0] == flag

    @property
    def short(self) -> _Entry:
        """The entry with its first statement alone, and without the negative form of a switch.

        That form stays if the switch is on by default.
        """
        default = _DEFAULT.search(self.text)
        said = self.text[: default.start()] if default else self.text
        ends = _FIRST.search(said)
        first = said[: ends.start()].rstrip(".") + "." if ends else said
        told = default is not None and default[1] not in _EXPECTED
        negative = " or" if default and default[1] == "default: True" else None
        name = re.sub(r" \(repeatable\)$", "", self.name)
        name = re.sub(r",( --(\w+\.)*no-.*)", f"{negative}\\1" if negative else "", name)
        return _Entry(name, f"{first} ({default[1]})" if default and told else first)

    def lines(self, width: int) -> list[str]:
        """The entry as lines of a help text: name and description in two columns."""
        indent = " " * _COLUMN
        told = _wrap(self.text, width, indent)
        name = f"  {self.name}"
        if len(name) > _COLUMN - 2 or not told:
            return [name, *told]
        return [name + told[0][len(name) :], *told[1:]]


_Sections = list[tuple[str, list[_Entry]]]


def help_text(text: str, prog: str, examples: Sequence[str], common: str) -> str:
    """The help text that tyro wrote, folded anew and without defaults of None, with examples.

    If there are common options, only those are described, each by its first statement, and of the
    command's description the first paragraph is left.
    """
    head, sections = _parsed(text)
    lines = _common(head, sections, common.split()) if common else _all(head, sections)
    if examples:
        lines += ["examples:", *(f"  {example}" for example in examples), ""]
    if common:
        total = sum(entry.name.startswith("-") for _, entries in sections for entry in entries)
        lines += [f"{prog} --help-all describes all {total} options.", ""]
    return "\n".join(lines)


def _all(head: list[str], sections: _Sections) -> list[str]:
    width = _width()
    lines = _folded(head, width)
    for title, entries in sections:
        lines += [f"{title}:", *(line for entry in entries for line in entry.lines(width)), ""]
    return lines


def _common(head: list[str], sections: _Sections, flags: Sequence[str]) -> list[str]:
    width = _width()
    usage, what = "\n".join(head).strip().split("\n\n")[:2]
    lines = _folded([usage, "", what], width)
    for title, entries in sections:
        # What has no text is no entry, but the section's description.
        kept = [entry for entry in entries if not entry.name.startswith("-") and entry.text]
        kept += [entry for flag in flags for entry in entries if entry.is_flag(flag)]
        if kept:
            told = (line for entry in kept for line in entry.short.lines(width))
            lines += [f"{title}:", *told, ""]
    return lines


def _width() -> int:
    return min(shutil.get_terminal_size().columns, _WIDEST)


def _wrap(text: str, width: int, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _folded(lines: Sequence[str], width: int) -> list[str]:
    """Paragraphs, each of several lines, folded to the width."""
    paragraphs = "\n".join(line.strip() for line in lines).strip().split("\n\n")
    return [line for each in paragraphs for line in [*_wrap(each, width), ""]]


def _parsed(text: str) -> tuple[list[str], _Sections]:
    """What stands before the sections of tyro's text, and the entries of each with its title.

    A title stands above a rule. Between two rules is a section's description, which is left out.
    """
    head: list[str] = []
    sections: _Sections = []
    lines = _NO_DEFAULT.sub("", text).split("\n")
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if _is_rule(following) and not (sections and not sections[-1][1]):
            sections.append((line.strip(), []))
        elif not sections:
            head.append(line)
        elif _is_rule(line):
            continue
        elif re.match(r"  \S", line):
            name, _, said = line.strip().partition("  ")
            sections[-1][1].append(_Entry(name, said.strip()))
        elif sections[-1][1]:
            last = sections[-1][1].pop()
            sections[-1][1].append(_Entry(last.name, f"{last.text} {line.strip()}".strip()))
    return head, sections


def _is_rule(line: str) -> bool:
    return set(line.strip()) == {"-"}
