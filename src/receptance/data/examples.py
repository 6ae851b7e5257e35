"""Records to examples: token ids, and which of them a model is to learn.

{"prompt": …, "response": …}       "instruction" for prompt, "completion" or "output" for
                                   response, and "input" for material beside the prompt
{"messages": [{"role": …, "content": …}, …]}
{"conversations": [{"from": …, "value": …}, …]}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from receptance.data.templates import Message, find_template
from receptance.tokenizer import Tokenizer

_PROMPTS = ("prompt", "instruction")
_RESPONSES = ("response", "completion", "output")
# List's name -> names of an entry's role and text.
_LISTS = {"messages": ("role", "content"), "conversations": ("from", "value")}
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


def is_example(record: Mapping[str, Any]) -> bool:
    """Whether a record has the fields of a prompt with its response, or of a conversation."""
    pair = _first(record, _PROMPTS) and _first(record, _RESPONSES)
    return bool(pair or _first(record, tuple(_LISTS)))


def encode_record(
    record: Mapping[str, Any], tokenizer: Tokenizer, template: str
) -> tuple[list[int], list[int]]:
    """Ids of a record's text, and for each 1 if it is to be learned, else 0.

    Answers are learned, with the end of their turn; no end-of-text token is added. ValueError says
    what is wrong with the record. Fields that are None count as absent.
    """
    pieces = find_template(template).render(_messages(record, template))
    if not pieces or not pieces[-1][1]:
        pieces = pieces[:-1]  # a question at the end that has no answer
    if not pieces:
        raise ValueError("there is no assistant message, so nothing to learn")
    ids: list[int] = []
    mask: list[int] = []
    for text, learned in pieces:
        # Each piece by itself: a prompt is read before its answer exists, so its ids can't depend
        # on it, and a token across the border would be half learned.
        piece = tokenizer.encode(text)
        ids += piece
        mask += [int(learned)] * len(piece)
    return ids, mask


def _messages(record: Mapping[str, Any], template: str) -> list[Message]:
    if name := _first(record, tuple(_LISTS)):
        return _conversation(name, record[name])
    prompt, response = _first(record, _PROMPTS), _first(record, _RESPONSES)
    if not (prompt and response):
        known = ", ".join(map(str, record)) or "none"
        raise ValueError(
            f"no prompt and response, and no messages: the record has {known}"
            f"; wanted are {'/'.join(_PROMPTS)} with {'/'.join(_RESPONSES)}, or {'/'.join(_LISTS)}"
        )
    request = [Message("user", _text(record, prompt))]
    if record.get("input") is not None and (material := _text(record, "input")).strip():
        if find_template(template).input is None:
            request = [Message("user", f"{request[0].text}\n{material}")]
        else:
            request.append(Message("input", material))
    return [*request, Message("assistant", _text(record, response))]


def _conversation(name: str, turns: Any) -> list[Message]:
    if not isinstance(turns, list | tuple):
        raise ValueError(f"{name} is {type(turns).__name__}; it must be a list")
    role_key, text_key = _LISTS[name]
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping):
            raise ValueError(f"{name}[{number}] is {type(turn).__name__}; it must be an object")
        if (role := turn.get(role_key)) not in tuple(_ROLES):  # it may be unhashable
            raise ValueError(
                f"{name}[{number}] has {role_key} {role!r}; known: {', '.join(_ROLES)}"
            )
        message = Message(_ROLES[role], _text(turn, text_key, f"{name}[{number}]."))
        if message.role != "system" or message.text.strip():  # many data sets keep an empty one
            messages.append(message)
    return messages


def _first(record: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """The first of the names that the record has."""
    return next((name for name in names if record.get(name) is not None), None)


def _text(record: Mapping[str, Any], name: str, where: str = "") -> str:
    text = record.get(name)
    if not isinstance(text, str):
        raise ValueError(f"{where}{name} is {type(text).__name__}; it must be a text")
    return text
