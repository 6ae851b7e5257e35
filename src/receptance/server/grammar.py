"""Grammars that an answer follows, compiled by llguidance."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from receptance.server import limits
from receptance.server.errors import refusal
from receptance.server.tools import compact
from receptance.tokenizer import Tokenizer


class Grammars:
    """The grammars of one tokenizer; safe to use in several threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        try:
            import llguidance
        except ImportError:
            raise refusal(
                "this server was installed without llguidance, which JSON and tools need",
                code="unsupported",
            ) from None
        self._library, self._tokenizer = llguidance, tokenizer
        self._limits = llguidance.LLParserLimits(max_grammar_size=1_000_000)
        self._tokens = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Wrapped(tokenizer)))

    def compile(self, grammar: str, param: str) -> Grammar:
        """A grammar in the language of llguidance; ApiError if it cannot be used."""
        matcher = self._library.LLMatcher
        rules = matcher.grammar_from_lark(grammar)
        found = matcher(self._tokens, rules, log_level=0, limits=self._limits)
        if found.is_error():
            said = found.get_error().partition("\n")[0][:300]
            raise refusal(f"{param}: the schema cannot be used: {said}", param)
        return Grammar(found, self._tokenizer)

    def check(self, schema: dict[str, Any] | bool, param: str) -> None:
        """ApiError if a JSON schema is none, too large, or allows nothing."""
        check_schema(schema, param)
        rules = f"%llguidance {{}}\nstart: %json {compact(schema)}"
        allowed = self.compile(rules, param).begin().allowed().nonzero().flatten().tolist()
        if set(allowed) <= {self._tokenizer.end_of_text}:  # every text of JSON has a character
            raise refusal(f"{param}: the schema cannot be used: nothing satisfies it", param)

    def of_json(
        self, schema: dict[str, Any] | bool, param: str, *, thinking: bool = False
    ) -> Grammar:
        """The grammar of JSON texts that a schema allows, behind a thought if one is open."""
        self.check(schema, param)
        start = 'start: thought " "? json\nthought[lazy]: /(.|\\n)*<\\/think>\\s*/'
        start = start if thinking else 'start: " "? json'
        return self.compile(f"%llguidance {{}}\n{start}\njson: %json {compact(schema)}", param)


class Grammar:
    """A compiled grammar, from which every answer takes a constraint of its own."""

    def __init__(self, matcher: Any, tokenizer: Tokenizer) -> None:
        self._matcher, self._tokenizer = matcher, tokenizer

    def begin(self) -> Followed:
        """The constraint of one answer."""
        return Followed(self._matcher.deep_copy(), self._tokenizer)


class Followed:
    """How far one answer has followed its grammar (a `Constraint`)."""

    def __init__(self, matcher: Any, tokenizer: Tokenizer) -> None:
        self._matcher = matcher
        self._size, self._end = tokenizer.vocab_size, tokenizer.end_of_text
        self._mask: Tensor | None = None

    def allowed(self) -> Tensor:
        """Which ids may come next, [V] bool; behind the end only the end of text."""
        if self._mask is None:
            if self._matcher.is_stopped():
                self._mask = torch.zeros(self._size, dtype=torch.bool)
                self._mask[self._end] = not self._matcher.is_error()
            else:
                bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
                flags = np.unpackbits(bits, bitorder="little")[: self._size]
                self._mask = torch.from_numpy(flags.astype(bool))
        return self._mask

    def take(self, token: int) -> None:
        """Go on by a token that was allowed."""
        self._mask = None
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)


def check_schema(schema: object, param: str) -> None:
    """ApiError if a JSON schema is none, too large or nested too deeply."""
    if not isinstance(schema, dict | bool):
        raise refusal(f"{param}: a JSON schema is an object", param)
    stack: list[tuple[object, int]] = [(schema, 1)]
    while stack:
        value, depth = stack.pop()
        if depth > limits.DEEPEST_SCHEMA:
            raise refusal(f"{param}: nested deeper than {limits.DEEPEST_SCHEMA} levels", param)
        inner = value.values() if isinstance(value, dict) else value
        if isinstance(inner, list) or isinstance(value, dict):
            stack.extend((item, depth + 1) for item in inner)  # type: ignore[attr-defined]
    if len(json.dumps(schema)) > limits.LARGEST_SCHEMA:
        raise refusal(f"{param}: larger than {limits.LARGEST_SCHEMA} bytes", param)


class _Wrapped:
    """A tokenizer as llguidance wants it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.end_of_text, None
        self.special_token_ids = [tokenizer.end_of_text]
        self.tokens = [tokenizer.decode_bytes([token]) for token in range(tokenizer.vocab_size)]

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text)
