"""Conversations as prompts: by a template, with the places at which another text may go on."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from receptance.data.templates import TURN_END, Message, Template
from receptance.server.errors import refusal
from receptance.tokenizer import Tokenizer

# The state is kept where the last turns begin; those before them were kept by earlier requests.
_MARKED_TURNS = 3
THINK, THOUGHT = "<think>", "</think>"


@dataclass(frozen=True)
class Rendered:
    """A conversation as a prompt, and how an answer to it is to be read."""

    ids: list[int]
    marks: list[int]
    """The numbers of tokens behind which turns begin."""
    stops: tuple[str, ...]
    """What ends the answer."""
    thinking: bool = False
    """Whether the answer begins inside of a thought, because the prompt has opened one."""


def render(
    template: Template,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    answer: str = "",
) -> Rendered:
    """The prompt that asks for an answer to messages, which begins with `answer`."""
    if not messages:
        raise refusal("messages: all are empty, or there are none", "messages")
    text = _text(template, messages)
    ends = _turns(template, messages, text)
    opening = template.opening
    if answer:
        opening += template.answer(answer).removesuffix(TURN_END)
    whole = text + opening
    ids = tokenizer.encode(whole)
    marks = _token_marks(tokenizer, ids, [len(whole[:end].encode()) for end in ends])
    return Rendered(ids, marks, template.stops, opening.rfind(THINK[:-1]) > opening.rfind(THOUGHT))


def encode(template: Template, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """A conversation behind which another turn may follow."""
    return tokenizer.encode(_text(template, messages))


def _text(template: Template, messages: Sequence[Message]) -> str:
    try:
        return "".join(piece for piece, _ in template.render(messages))
    except ValueError as error:
        raise refusal(f"messages: {error}", "messages") from None


def _turns(template: Template, messages: Sequence[Message], text: str) -> list[int]:
    """Where in the text the turns begin at which another conversation may part from this one."""
    system = next((i for i, m in enumerate(messages) if m.role != "system"), len(messages))
    counts = {system, *range(max(0, len(messages) - _MARKED_TURNS), len(messages))}
    beginnings = (_text(template, messages[:count]) for count in sorted(counts) if count)
    # A template may write earlier turns differently when others follow them.
    return [len(beginning) for beginning in beginnings if text.startswith(beginning)]


def _token_marks(tokenizer: Tokenizer, ids: Sequence[int], places: Sequence[int]) -> list[int]:
    """The numbers of whole tokens before places in the text, which are counted in bytes."""
    ends = list(accumulate(len(tokenizer.decode_bytes([token])) for token in ids))
    return sorted({count for place in places if (count := bisect_right(ends, place))})
