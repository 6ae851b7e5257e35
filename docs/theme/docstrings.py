"""Docstrings as mkdocs shows them: plain text in which only code between backticks is marked.

In Markdown, shapes such as [B,T,C] would be links, and blocks that are set off by their indentation
would run into the line above them.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

# Code between backticks, or a character that means something in Markdown.
_MARKUP = re.compile(r"(`[^`]*`)|([\\*_\[\]<>#])")
_INDENTED = re.compile(r" {4,}\S")


class PlainText(griffe.Extension):
    """Turns every docstring into Markdown that shows it as it is."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """The text with Markdown's characters escaped, and with indented blocks as code."""
    lines: list[str] = []
    code = False
    for line in text.split("\n"):
        if line.strip():
            begins = bool(_INDENTED.match(line)) and not code
            code = bool(_INDENTED.match(line))
            lines += [""] * begins + [line if code else _MARKUP.sub(_escaped, line)]
        else:
            lines.append(line)
    return "\n".join(lines)


def _escaped(found: re.Match[str]) -> str:
    return found[1] or ("&lt;" if found[2] == "<" else "\\" + found[2])
