"""The tokenizer of a GGUF file: llama.cpp's spellings of the World vocabulary and of BPE.

Keys and escapes are those of llama.cpp (conversion/base.py, src/llama-vocab.cpp). A World token is
written as the inside of a Python bytes literal. A BPE is written as its tokens and merges, and also
as the tokenizer.json that it came from, which other tools pass over, so that nothing of it is lost.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from receptance.formats.gguf_header import Fields
from receptance.formats.names import some
from receptance.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, WorldTokenizer

Field = str | bool | int | float | list[bytes] | list[int]
"""A value of a GGUF file."""

_MODEL, _PRE = "tokenizer.ggml.model", "tokenizer.ggml.pre"
_TOKENS, _TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
_MERGES, _JSON = "tokenizer.ggml.merges", "tokenizer.huggingface.json"
_BEGIN, _END = "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"
_END_OF_TURN = "tokenizer.ggml.eot_token_id"
_TEMPLATE = "tokenizer.chat_template"

_WORLD, _BPE, _NONE = "rwkv", "gpt2", "no_vocab"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama_token_type in llama.h
# The names in llama.cpp of rules that cut text as GPT-2 does, before merges. The first is written.
_CUT_LIKE_GPT2 = ("gpt-2", "mpt", "olmo", "jais", "trillion")
# What llama.cpp's own files have for the token that ends a text. Its tokenizer takes this text for
# the token.
_END_TEXT = b"<s>"
_TURN_END = b"\n\n"

# The format of the World and G1 models. The line of the user's turn is the one by which llama.cpp
# recognizes the format if it does not interpret templates.
_CHAT = """\
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{{- 'System: ' + message['content']|trim + '\\n\\n' -}}
{%- elif message['role'] == 'user' -%}
{{- 'User: ' + message['content']|trim + '\\n\\n' -}}
{%- elif message['role'] == 'assistant' -%}
{{- 'Assistant: ' + message['content'].split('</think>')[-1]|trim + '\\n\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'Assistant:' -}}
{%- endif -%}
"""


# ---- writing ------------------------------------------------------------------------------------


def tokenizer_fields(tokenizer: Tokenizer | None, vocab_size: int) -> dict[str, Field]:
    """The keys of a tokenizer, with as many tokens as the embedding has rows.

    ValueError if llama.cpp has no such tokenizer.
    """
    if tokenizer is None:
        return {_MODEL: _NONE}
    named = (
        _bpe(tokenizer, vocab_size)
        if isinstance(tokenizer, BPETokenizer)
        else (_world(tokenizer, vocab_size))
    )
    end = tokenizer.end_of_text
    return {
        **named,
        _BEGIN: end,
        _END: end,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        _TEMPLATE: _CHAT,
    }


def _world(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Field]:
    """Tokens and their types; the byte tokenizer is a World vocabulary of single bytes."""
    tokens, types = [_END_TEXT], [_CONTROL]
    if isinstance(tokenizer, ByteTokenizer):
        tokens = [_escaped(tokenizer.decode_bytes([0]))]
    for token_id in range(1, vocab_size):
        known = token_id < tokenizer.vocab_size and tokenizer.decode_bytes([token_id])
        tokens.append(_escaped(known) if known else _padding(token_id))
        types.append(_NORMAL if known else _UNUSED)
    _check_distinct(tokens)
    found: dict[str, Field] = {_MODEL: _WORLD, _TOKENS: tokens, _TYPES: types}
    if (turn_end := _escaped(_TURN_END)) in tokens:
        found[_END_OF_TURN] = tokens.index(turn_end)
    return found


def _escaped(token: bytes) -> bytes:
    return repr(token)[2:-1].encode()


def _padding(token_id: int) -> bytes:
    return f"[PAD{token_id}]".encode()


def _check_distinct(tokens: list[bytes]) -> None:
    if len(set(tokens)) < len(tokens):
        twice, _ = Counter(tokens).most_common(1)[0]
        raise ValueError(
            f"the tokenizer has a token {some([twice.decode()])}, which llama.cpp has for another "
            "purpose; use another format"
        )


def _bpe(tokenizer: BPETokenizer, vocab_size: int) -> dict[str, Field]:
    spec = json.loads(tokenizer.content)
    if not _cuts_like_gpt2(spec):
        raise ValueError(
            "the tokenizer cuts text by other rules than GPT-2's, and this release knows no name "
            "of them in llama.cpp; use another format"
        )
    vocabulary, types = spec["model"]["vocab"], dict[int, int]()
    texts = {token_id: text for text, token_id in vocabulary.items()}
    for token in spec.get("added_tokens") or []:
        texts[token["id"]] = token["content"]
        types[token["id"]] = _CONTROL if token.get("special") else _USER_DEFINED
    found = [texts.get(n, _padding(n).decode()).encode() for n in range(vocab_size)]
    _check_distinct(found)
    merges = [x if isinstance(x, str) else " ".join(x) for x in spec["model"]["merges"]]
    usual = {n: _NORMAL if n in texts else _UNUSED for n in range(vocab_size)}
    return {
        _MODEL: _BPE,
        _PRE: _CUT_LIKE_GPT2[0],
        _TOKENS: found,
        _TYPES: list((usual | types).values()),
        _MERGES: [merge.encode() for merge in merges],
        _JSON: tokenizer.content.decode(),
    }


def _cuts_like_gpt2(spec: dict[str, Any]) -> bool:
    cut = spec.get("pre_tokenizer") or {}
    steps = cut.get("pretokenizers", [cut])
    return (
        len(steps) == 1 and steps[0].get("type") == "ByteLevel" and steps[0].get("use_regex", True)
    )


# ---- reading ------------------------------------------------------------------------------------


def has_tokenizer(fields: Fields) -> bool:
    """Whether a file holds a tokenizer, of whatever kind."""
    return fields.text(_MODEL) not in (None, _NONE, "none")


def read_tokenizer(fields: Fields, name: str) -> Tokenizer | None:
    """The tokenizer that a file holds, None if it holds none. ValueError names the file."""
    if not has_tokenizer(fields):
        return None
    model = fields.text(_MODEL)
    if model not in (_WORLD, _BPE):
        raise ValueError(
            f"its tokenizer is {some([str(model)])}; this release reads {_WORLD} and {_BPE}: give "
            "another as tokenizer="
        )
    tokens, types = fields.texts(_TOKENS), fields.numbers(_TYPES)
    if types and len(types) < len(tokens):
        raise ValueError(f"it has {len(tokens)} tokens and {len(types)} types; it is damaged")
    types = types or [_NORMAL] * len(tokens)
    if model == _WORLD:
        return _read_world(tokens, types, name)
    end = fields.number(_END)
    if not isinstance(end, int) or not 0 <= end < len(tokens):
        raise ValueError(f"its key {_END} is {end}; it must be one of {len(tokens)} tokens")
    end_of_text = tokens[end].decode("utf-8", errors="replace")
    content = fields.text(_JSON) or _rebuilt(fields, tokens, types)
    return BPETokenizer(content.encode(), name, end_of_text=end_of_text)


def _read_world(tokens: list[bytes], types: list[int], name: str) -> Tokenizer:
    texts = {n: _unescaped(x) for n, x in enumerate(tokens) if n and types[n] != _UNUSED}
    if len(tokens) == 256 and all(texts.get(n) == bytes([n]) for n in range(1, 256)):
        return ByteTokenizer()
    lines = [f"{n} {_literal(text)} {len(text)}\n" for n, text in texts.items()]
    return WorldTokenizer("".join(lines).encode(), name)


def _literal(token: bytes) -> str:
    """The token as rwkv_vocab_v20230424.txt has it: as text where it is text."""
    try:
        return repr(token.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(token)


_ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{2}|.)", re.DOTALL)
_LETTERS = {b"t": b"\t", b"n": b"\n", b"r": b"\r"}


def _unescaped(text: bytes) -> bytes:
    return _ESCAPE.sub(_meaning, text)


def _meaning(escape: re.Match[bytes]) -> bytes:
    code = escape[1]
    return bytes([int(code[1:], 16)]) if len(code) > 1 else _LETTERS.get(code, code)


def _rebuilt(fields: Fields, tokens: list[bytes], types: list[int]) -> str:
    """A tokenizer.json that says what the lists of tokens and merges say."""
    cut = fields.text(_PRE)
    if cut not in _CUT_LIKE_GPT2:
        raise ValueError(
            f"its tokenizer cuts text as {some([str(cut)])} does, which this release does not "
            "know: give its tokenizer.json as tokenizer="
        )
    texts = [token.decode("utf-8", errors="replace") for token in tokens]
    cutting = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    added = [
        {"id": n, "content": text, "special": types[n] == _CONTROL, "normalized": False,
         "single_word": False, "lstrip": False, "rstrip": False}
        for n, text in enumerate(texts) if types[n] in (_CONTROL, _USER_DEFINED)
    ]  # fmt: skip
    vocabulary = {text: n for n, text in enumerate(texts) if types[n] != _UNUSED}
    merges = [merge.decode("utf-8", errors="replace") for merge in fields.texts(_MERGES)]
    model = {"type": "BPE", "vocab": vocabulary, "merges": merges}
    spec = {"version": "1.0", "added_tokens": added, "pre_tokenizer": cutting | {"use_regex": True}}
    return json.dumps(spec | {"decoder": cutting | {"use_regex": True}, "model": model})
