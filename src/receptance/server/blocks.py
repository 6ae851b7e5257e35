"""An answer as a sequence of blocks: thoughts, texts and calls, one after another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from receptance.server.api.tokens import TokenLogprob
from receptance.server.dialogue import Outcome
from receptance.server.reply_text import Part
from receptance.server.serving import new_id
from receptance.tokenizer import Tokenizer


@dataclass
class Block:
    """One thought, text or call."""

    index: int
    kind: Literal["thought", "content", "call"]
    id: str = ""
    name: str = ""
    """The tool that is called."""
    text: str = ""
    """What is said or thought, or the arguments as JSON."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """The tokens of a text, where their probabilities are wanted."""


Change = tuple[Literal["open", "more", "close"], Block, str]
"""A block begins, has more text, or ends."""


class Blocks:
    """The blocks of one answer, as its parts come.

    `ids` has how the ids of a kind begin; others have none.
    """

    def __init__(self, ids: Mapping[str, str]) -> None:
        self._ids = ids
        self.all: list[Block] = []
        self._open: Block | None = None

    def add(self, part: Part) -> Iterator[Change]:
        """What changes with one more part."""
        kind = "call" if part.kind == "arguments" else part.kind
        if self._open is None or self._open.kind != kind or part.kind == "call":
            yield from self.finish()
            name = part.text if part.kind == "call" else ""
            begins = self._ids.get(kind)
            own = new_id(begins) if begins is not None else ""
            self._open = Block(len(self.all), kind, own, name)
            self.all.append(self._open)
            yield "open", self._open, ""
        if part.kind != "call":
            self._open.text += part.text
            yield "more", self._open, part.text

    def finish(self) -> Iterator[Change]:
        """What changes when the answer has ended."""
        if self._open is not None:
            block, self._open = self._open, None
            yield "close", block, ""


def stop_string(outcome: Outcome, stops: tuple[str, ...], tokenizer: Tokenizer) -> str | None:
    """The client's stop string that ended an answer; None if something else did."""
    if outcome.reason != "stop":
        return None
    rest = tokenizer.decode(outcome.ids)[len(outcome.text) :]
    return min((stop for stop in stops if rest.startswith(stop)), key=len, default=None)
