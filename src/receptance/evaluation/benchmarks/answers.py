"""Answers to the requests of benchmarks, by any engine: they are kept and not computed twice."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from receptance.engine.base import Engine
from receptance.evaluation.benchmarks.continuations import (
    Continuation,
    continue_texts,
    generation_options,
)
from receptance.evaluation.benchmarks.prefix_tree import Request
from receptance.evaluation.benchmarks.prefixes import Prefix, prefix_ids
from receptance.evaluation.benchmarks.requests import Scored, score_requests
from receptance.evaluation.journal import Journal
from receptance.evaluation.texts.passages import Key, Passage, carried, read_all, windows
from receptance.tokenizer import Tokenizer

Progress = Callable[[str, int, int], object]
"""A function that is told what is being done, how much of it is done, and how much it is in all."""

Encoded = tuple[tuple[str, str], Sequence[int], Sequence[int]]
"""The texts of a context and of its continuation, and the ids of both."""


@dataclass(frozen=True)
class ToContinue:
    """A text to continue, as a benchmark asks for it."""

    context: str
    arguments: Mapping[str, Any]
    """Arguments of generation, by the harness's names."""
    task: str


class Answers:
    """What an engine answers to benchmarks.

    Contexts and documents may have any length, unless max_length says how many tokens a window has.
    The journal gets every answer under a key of its request; answers that it has are not computed.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        prefix: Prefix = "none",
        max_length: int | None = None,
        seed: int = 0,
        journal: Journal | None = None,
        progress: Progress = lambda what, done, total: None,
    ) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.max_length, self.seed = max_length, seed
        self.tokens_read = self.tokens_spared = self.kept = 0
        self._prefix = prefix_ids(prefix, tokenizer)
        self._journal, self._progress = journal, progress
        records = [] if journal is None else journal.records
        self._known = {record["key"]: record["answer"] for record in records if "key" in record}

    @property
    def start(self) -> int:
        """The token behind which a text without a context begins."""
        return self._prefix[-1] if self._prefix else self.tokenizer.end_of_text

    def missing(self, keys: Sequence[str]) -> set[str]:
        """Those of the keys that have no answer yet; the others are counted as kept."""
        found = {key for key in keys if key not in self._known}
        self.kept += sum(key not in found for key in keys)
        return found

    def known(self, key: str) -> Any:
        """The answer that there is for a key."""
        return self._known[key]

    # ---- log-probabilities ------------------------------------------------------------------

    def score(self, requests: Sequence[Encoded]) -> list[tuple[float, bool]]:
        """Log-probability and greediness of each continuation, which are kept as well."""
        wanted = [self._tokens(*request) for request in requests]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)

        def keep(number: int, score: Scored) -> None:
            found[number] = (score.log_probability, score.greedy)
            self._keep(request_key("loglikelihood", *requests[number][0]), list(found[number]))

        progress = functools.partial(self._progress, "scoring")
        tree = score_requests(self.engine, wanted, keep, progress)
        self.tokens_read += tree.tokens
        self.tokens_spared += tree.spared
        return found

    def _tokens(
        self, texts: tuple[str, str], context: Sequence[int], rest: Sequence[int]
    ) -> Request:
        """The tokens of a request, with the prefix, and without those that are too many."""
        if not rest:
            raise ValueError(
                f"the continuation {texts[1][:40]!r} has no token of its own: it is empty, or the "
                "tokenizer joins it with the end of its context"
            )
        # A context without text already begins with the last token of the prefix.
        before = self._prefix if texts[0] else self._prefix[:-1]
        context = [*before, *(context or [self.start])]
        if self.max_length is None:
            return Request(context, rest)
        if len(rest) > self.max_length:
            raise ValueError(
                f"a continuation has {len(rest)} tokens, and windows {self.max_length}; set "
                "max_length to more"
            )
        return Request(context[-(self.max_length + 1 - len(rest)) :], rest)

    def roll(self, texts: Mapping[str, str]) -> None:
        """Keep the log-probability of each text under its key; all of its tokens are predicted."""
        passages = [self._passages(number, text) for number, text in enumerate(texts.values())]
        keys, sums, left = list(texts), [0.0] * len(texts), [len(parts) for parts in passages]

        def keep(key: Key, found: Any) -> None:
            number = key[0]
            sums[number] -= float(np.sum(found))
            left[number] -= 1
            if not left[number]:
                self._keep(keys[number], sums[number])

        for key, parts in zip(keys, passages, strict=True):
            if not parts:
                self._keep(key, 0.0)
        flat = [part for parts in passages for part in parts]
        read_all(self.engine, flat, keep, functools.partial(self._progress, "reading"))
        self.tokens_read += sum(int(part.edges[-1]) for part in flat)

    def _passages(self, number: int, text: str) -> list[Passage]:
        start = self._prefix or [self.start]
        tokens = [*start, *self.tokenizer.encode(text)]
        first, last = len(start) - 1, len(tokens) - 1
        if first == last:
            return []
        if self.max_length is None:
            return [carried((number, 0), tokens, [first, last])]
        return list(windows(number, tokens[first:], self.max_length))

    # ---- continuations ----------------------------------------------------------------------

    def extend(self, texts: Mapping[str, ToContinue]) -> None:
        """Keep the continuation of each text under its key."""
        keys = list(texts)
        wanted = [self._continuation(key, text) for key, text in texts.items()]
        done = 0

        def keep(number: int, text: str) -> None:
            nonlocal done
            done += 1
            self._keep(keys[number], text)
            self._progress("generating", done, len(keys))

        self._progress("generating", 0, len(keys))
        read, spared = continue_texts(self.engine, self.tokenizer, wanted, keep)
        self.tokens_read += read
        self.tokens_spared += spared

    def _continuation(self, key: str, text: ToContinue) -> Continuation:
        try:
            options = generation_options(text.arguments, _seed(key))
        except ValueError as error:
            raise ValueError(f"task {text.task}: {error}") from None
        ids = [*self._prefix, *self.tokenizer.encode(text.context)] or [self.start]
        if self.max_length is not None:
            most = self.max_length - options.max_tokens
            if most < 1:
                raise ValueError(
                    f"task {text.task} generates {options.max_tokens} tokens, and windows have "
                    f"{self.max_length}; set max_length to more"
                )
            ids = ids[-most:]
        return Continuation(ids, options, text.task)

    def _keep(self, key: str, answer: Any) -> None:
        self._known[key] = answer
        if self._journal is not None:
            self._journal.add({"key": key, "answer": answer})


def request_key(kind: str, *args: Any) -> str:
    """The name of a request in a journal: a digest of all that it asks."""
    return hashlib.sha256(json.dumps([kind, *args], default=str).encode()).hexdigest()


def _seed(key: str) -> int:
    """A seed for a request's own draws, whatever else is asked."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
