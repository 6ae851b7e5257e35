"""Records to examples: token ids, and which of them a model is to learn.

{"prompt": …, "response": …}       "instruction" for prompt, "completion" or "output" for
                                   response, and "input" for material beside the prompt
{"messages": [{"role": …, "content": …}, …]}
{"conversations": [{"from": …, "value": …}, …]}    either name of a list with either pair of keys
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from receptance.data.templates import Message, find_template
from receptance.tokenizer import Tokenizer
from receptance.tokenizer.base import to_bytes

_PROMPTS = ("prompt", "instruction")
_RESPONSES = ("response", "completion", "output")
_LISTS = ("messages", "conversations")
_ROLE_KEYS, _TEXT_KEYS = ("role", "from"), ("content", "value")
# What the roles of published chats are in a template. A tool's result is read, not written, by the
# model, so it stands on the user's side.
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "tool": "user",
    "function": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
# Messages of these roles may be empty: many data sets keep an empty system message, and a tool may
# have nothing to say.
_MAY_BE_EMPTY = ("system", "developer", "tool", "function")
_CALLS = ("tool_calls", "function_call")
_TEXT_PARTS = ("text", "input_text", "output_text")


def is_example(record: Mapping[str, Any]) -> bool:
    """Whether a record has the fields of a prompt with its response, or of a conversation."""
    pair = _first(record, _PROMPTS) and _first(record, _RESPONSES)
    return bool(pair or _first(record, _LISTS))


def encode_record(
    record: Mapping[str, Any], tokenizer: Tokenizer, template: str
) -> tuple[list[int], list[int]]:
    """Ids of a record's text, and for each 1 if it is to be learned, else 0.

    The ids are those of the whole rendered text, encoded at once: pieces that are encoded one by
    one can give ids that no text has (the Pile's vocabulary has a token for two newlines, which it
    uses only at the end of a text). No end-of-text token is added.

    A token is learned if its first byte belongs to an answer or to the blank line that ends it. At
    inference a prompt is encoded before its answer exists; with all templates here those ids are
    the first ones of the whole text, unless a vocabulary has a token that lies across the border.
    The whole text's ids win then too, because they are what the model reads everywhere else; but
    that token is not learned, for it begins in the prompt, where a model is never asked to go on.

    ValueError says what is wrong with the record. Fields that are None count as absent.
    """
    pieces = find_template(template).render(_messages(record, template))
    if not pieces or not pieces[-1][1]:
        pieces = pieces[:-1]  # a question at the end that has no answer
    if not pieces:
        raise ValueError("there is no assistant message, so nothing to learn")
    texts = [to_bytes(text) for text, _ in pieces]
    ids = tokenizer.encode(b"".join(texts))
    numbers = _piece_of_each(ids, texts, tokenizer)
    return ids, [int(pieces[number][1]) for number in numbers]


def _piece_of_each(ids: Sequence[int], pieces: Sequence[bytes], tokenizer: Tokenizer) -> list[int]:
    """The number of the piece in which each token of a text begins."""
    tokens = [tokenizer.decode_bytes([token_id]) for token_id in ids]
    if b"".join(tokens) != b"".join(pieces):
        # The tokenizer normalizes text (the Pile's to NFC), which can change how long a piece is.
        pieces = [tokenizer.decode_bytes(tokenizer.encode(piece)) for piece in pieces]
    starts = np.cumsum([0, *map(len, tokens)])[:-1]
    ends = np.cumsum([len(piece) for piece in pieces])
    numbers = np.searchsorted(ends, starts, side="right")
    return np.minimum(numbers, len(pieces) - 1).tolist()


def _messages(record: Mapping[str, Any], template: str) -> list[Message]:
    if name := _first(record, _LISTS):
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
    messages = []
    for number, turn in enumerate(turns, start=1):
        where = f"{name}[{number}]"
        if not isinstance(turn, Mapping):
            raise ValueError(f"{where} is {type(turn).__name__}; it must be an object")
        role_key = _first(turn, _ROLE_KEYS) or _ROLE_KEYS[0]
        if (role := turn.get(role_key)) not in tuple(_ROLES):  # it may be unhashable
            raise ValueError(f"{where} has {role_key} {role!r}; known: {', '.join(_ROLES)}")
        text = _turn_text(turn, role, where)
        if text.strip() or not _may_be_empty(turn, role):
            messages.append(Message(_ROLES[role], text))
    return messages


def _may_be_empty(turn: Mapping[str, Any], role: str) -> bool:
    """Whether a turn without text is left out instead of refused, as one that only calls tools."""
    return role in _MAY_BE_EMPTY or any(turn.get(name) for name in _CALLS)


def _turn_text(turn: Mapping[str, Any], role: str, where: str) -> str:
    key = _first(turn, _TEXT_KEYS)
    if key is None and _may_be_empty(turn, role):
        return ""
    key = key or next((name for name in _TEXT_KEYS if name in turn), _TEXT_KEYS[0])
    if isinstance(turn.get(key), list | tuple):
        return "".join(_part_text(part, f"{where}.{key}") for part in turn[key])
    return _text(turn, key, f"{where}.")


def _part_text(part: Any, where: str) -> str:
    """The text of one of the parts that a content consists of; a picture has none."""
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise ValueError(f"{where} has a part that is {type(part).__name__}; it must be an object")
    if (kind := part.get("type") or "text") not in _TEXT_PARTS:
        raise ValueError(f"{where} has a part of type {kind!r}; only text can be learned")
    return _text(part, "text", f"{where}: ")


def _first(record: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """The first of the names that the record has."""
    return next((name for name in names if record.get(name) is not None), None)


def _text(record: Mapping[str, Any], name: str, where: str = "") -> str:
    text = record.get(name)
    if not isinstance(text, str):
        raise ValueError(f"{where}{name} is {type(text).__name__}; it must be a text")
    return text
