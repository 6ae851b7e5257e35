"""The text of an answer, piece by piece: thoughts, what is said, and calls of tools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from receptance.server.prompts import THINK, THOUGHT
from receptance.server.tools import CALL_END, CALL_START, CallReader

Kind = Literal["content", "thought", "call", "arguments"]


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of an answer."""

    kind: Kind
    text: str
    """With a call it is the name of the tool."""
    call: int = 0
    """With calls and arguments, the number of the call in the answer."""


class ReplyReader:
    """What the pieces of an answer's text mean; how it is cut into pieces does not matter.

    Whitespace around thoughts, and around what is said, is left out. Text in which a mark such as
    <think> may begin is held back until that is known. A thought may only stand at the beginning.
    """

    def __init__(self, *, thinking: bool = False, tools: bool = False) -> None:
        self._mode: Literal["content", "thought", "call"] = "thought" if thinking else "content"
        self._tools = tools
        self._fresh = not thinking  # whether the answer may still begin with a thought
        self._held = self._blank = ""
        self._begun = False
        self._reader, self._calls = CallReader(), 0

    def push(self, text: str) -> list[Part]:
        """The parts that are certain with one more piece of text."""
        self._held += text
        parts: list[Part] = []
        while True:
            at, mark = self._next()
            parts += self._out(self._held[:at])
            self._held = self._held[at + len(mark) :]
            if not mark:
                return parts
            self._switch(mark)

    def finish(self) -> list[Part]:
        """The parts that remain when the answer has ended."""
        text, self._held = self._held, ""
        if self._mode == "call" and self._reader.complete:
            return []  # the mark behind the arguments had begun
        return self._out(text)

    def _next(self) -> tuple[int, str]:
        """Where in the held text the next mark stands; or what is certain of it, and no mark."""
        if self._mode == "content" and self._fresh:
            text = self._held.lstrip()
            if text.startswith(THINK):
                return len(self._held) - len(text), THINK
            if THINK.startswith(text):
                return 0, ""
        marks = {"content": [CALL_START] * self._tools, "thought": [THOUGHT], "call": [CALL_END]}
        own = marks[self._mode]
        found = [(at, mark) for mark in own if (at := self._held.find(mark)) >= 0]
        if found:
            return min(found)
        return len(self._held) - max((_overlap(self._held, mark) for mark in own), default=0), ""

    def _switch(self, mark: str) -> None:
        self._blank, self._begun, self._fresh = "", False, False
        if mark == CALL_START:
            self._mode, self._reader = "call", CallReader()
        elif mark == CALL_END:
            self._mode, self._calls = "content", self._calls + 1
        else:
            self._mode = "thought" if mark == THINK else "content"

    def _out(self, text: str) -> list[Part]:
        if self._mode == "call":
            name, arguments = self._reader.push(text)
            parts = [Part("call", name, self._calls)] if name is not None else []
            return parts + [Part("arguments", arguments, self._calls)] * bool(arguments)
        text = self._blank + text if self._begun else text.lstrip()
        said = text.rstrip()
        self._blank = text[len(said) :]
        if not said:
            return []
        self._begun, self._fresh = True, False
        return [Part("thought" if self._mode == "thought" else "content", said)]


def _overlap(text: str, mark: str) -> int:
    """The length of the longest end of the text with which the mark begins."""
    longest = min(len(text), len(mark) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(mark[:n])), 0)
