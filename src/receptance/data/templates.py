"""Chat formats, which make one text of the turns of a conversation and say what is learned of it.

In all of them a blank line ends a turn, so blank lines inside of a message are taken out. RWKV-7
G1 writes blank lines inside of its answers all the same, and there only the heading of the next
turn ends them. The formats are those on the cards of BlinkDL's RWKV-4-Raven, RWKV-4-World and
RWKV-7-G1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

TURN_END = "\n\n"
THINKING = {"no": "", "short": " <think>\n</think>", "long": " <think"}
"""What is put at the beginning of an answer of RWKV-7 G1: nothing, which leaves the choice to the
model; an empty thought; or the beginning of a tag, which the model completes in its own way."""


class Message(NamedTuple):
    """One turn, or a part of one."""

    role: str
    """"system" (a text before the conversation), "user", "input" (material) or "assistant"."""
    text: str


@dataclass(frozen=True)
class Template:
    """How turns are written: mark, name, colon, gap, text, blank line."""

    user: str
    assistant: str
    input: str | None = None
    """The heading of material that a request works on; None if that is part of the user's text."""
    mark: str = ""
    gap: str = " "
    """What stands between the colon and the text."""
    blank_line_ends: bool = True
    """Whether the first blank line ends an answer, and not only the heading of the next turn."""

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        if self.blank_line_ends:
            return (TURN_END,)
        return f"{TURN_END}{self.mark}{self.user}", f"\n{self._heading(self.user)}"

    @property
    def opening(self) -> str:
        """What stands before an answer; a prompt ends with it."""
        # Tokens hold a space and the word behind it together, so a space belongs to the answer:
        # after a prompt with a trailing space no usual token fits. A newline stands alone.
        return self._heading(self.assistant) + ("" if self.gap == " " else self.gap)

    def prompt(self, text: str) -> str:
        """A user's message, and the opening of its answer."""
        return self._turn(Message("user", text)) + self.opening

    def answer(self, text: str) -> str:
        """An answer as it stands behind the opening, with the end of its turn."""
        return (self.gap if self.gap == " " else "") + _clean("assistant", text) + TURN_END

    def render(self, messages: Sequence[Message]) -> list[tuple[str, bool]]:
        """The text in pieces, each with whether it is learned: answers with their turn's end are.

        Joined, the pieces are the whole text; pieces that are learned and not learned alternate.
        ValueError for an unknown role or an empty text.
        """
        pieces, waiting = [], ""
        for message in messages:
            if message.role != "assistant":
                waiting += self._turn(message)
                continue
            pieces += [(waiting + self.opening, False), (self.answer(message.text), True)]
            waiting = ""
        return pieces + [(waiting, False)] * bool(waiting)

    def _heading(self, name: str) -> str:
        return f"{self.mark}{name}:"

    def _turn(self, message: Message) -> str:
        names = {"system": None, "user": self.user, "input": self.input}
        if message.role not in names or (message.role == "input" and self.input is None):
            known = [role for role, name in names.items() if name or role == "system"]
            raise ValueError(
                f"role {message.role!r}; this template knows {', '.join(known)} and assistant"
            )
        text, name = _clean(message.role, message.text), names[message.role]
        return (self._heading(name) + self.gap if name else "") + text + TURN_END


TEMPLATES = {
    "world": Template("User", "Assistant"),
    "raven": Template("Bob", "Alice"),
    "instruction": Template("Instruction", "Response", "Input", mark="# ", gap="\n"),
    "qa": Template("Question", "Answer"),
    "g1": Template("User", "Assistant", blank_line_ends=False),
}


def find_template(name: str) -> Template:
    """A template of the table; ValueError lists them."""
    if name not in TEMPLATES:
        raise ValueError(f"no template {name!r}; there are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def _clean(role: str, text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    if not text:
        raise ValueError(f"the {role} message is empty")
    return re.sub(r"\n\s*\n", "\n", text)
