"""Reading prompts and continuing them: prefill, decoding, streaming, stopping.

Several prompts of different lengths are one batch; each row equals its solo run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from receptance.engine.base import Engine
from receptance.inference import reading
from receptance.inference.batching import CHUNK, Slots
from receptance.inference.rows import Prompt, Request, Token
from receptance.inference.sampling import Sampling
from receptance.state import State
from receptance.tokenizer import Tokenizer

__all__ = ["Generation", "Prompt", "Token", "generate", "prefill"]

# One call of the engine reads so many positions, of all prompts together, so that its memory is
# bounded whatever the prompts are.
PREFILL_CHUNK = CHUNK

Texts = TypeVar("Texts", str, list[str])


@torch.no_grad()
def prefill(
    engine: Engine, prompts: Sequence[Sequence[int]], state: State | None = None
) -> tuple[Tensor, State]:
    """Read prompts of any lengths: the logits [B,V] for the next token of each, and the state.

    Prompts are token ids, at least one in each. They are read chunk by chunk, with the head at the
    last position of each row only. ValueError for text, or for ids that the model does not know.
    """
    reading.check_weights(engine)
    rows = [_ids(prompt, engine) for prompt in _listed(prompts)]
    if not min(map(len, rows)):
        raise ValueError("a prompt without tokens; give at least one token")
    last: Tensor | None = None
    positions = max(1, PREFILL_CHUNK // len(rows))
    for start in range(0, max(map(len, rows)), positions):
        pieces = [row[start : start + positions] for row in rows]
        features, state = reading.read(engine, *reading.padded(pieces), state)
        # A row that has ended before keeps the features of its own last token.
        reads = torch.tensor([[len(piece) > 0] for piece in pieces], device=features.device)
        last = features if last is None else features.where(reads, last)
    assert state is not None and last is not None
    return engine.head(last), state


class Generation(Iterator[Token]):
    """An iterator over the generated tokens, row by row in every step.

    Like every iterator it runs once: a loop that follows one that was left early goes on where that
    one stopped, and after the end there are no more tokens.

    Prompts are texts or token ids, and a single text is one prompt; empty ones begin after an
    end-of-text token. `state` continues from an earlier one (one row per prompt). `seed` is one for
    all rows, or one for each. None stands for an option's default; `Request` describes the options,
    and `Slots` describes `deterministic`.

    After a row has finished, `states[row]` is its state behind every token but those in
    `unread[row]`: the last generated one, which was never fed. `final_state` feeds it as well.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        prompts: str | bytes | Sequence[Prompt],
        *,
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        seed: int | Sequence[int] | None = None,
        ignore_end_of_text: bool | None = None,
        log_probabilities: bool | None = None,
        deterministic: bool | None = None,
        state: State | None = None,
    ) -> None:
        rows = _listed(prompts)
        options: dict[str, Any] = {
            "sampling": sampling,
            "max_tokens": max_tokens,
            "stop": stop,
            "ignore_end_of_text": ignore_end_of_text,
            "log_probabilities": log_probabilities,
        }
        requests = [Request(seed=own, **options) for own in _seeds(seed, len(rows))]
        if state is not None and state.batch != len(rows):
            raise ValueError(
                f"the state holds {state.batch} rows and there are {len(rows)} prompts; "
                "select rows with State.rows()"
            )
        self.states: list[State | None] = [None] * len(rows)
        self.unread: list[list[int]] = [[] for _ in rows]
        self._slots = Slots(
            engine,
            tokenizer,
            len(rows),
            deterministic=bool(deterministic),
            lockstep=True,
            chunk=PREFILL_CHUNK,
        )
        self._tokens: deque[Token] = deque()
        for row, (prompt, request) in enumerate(zip(rows, requests, strict=True)):
            before = None if state is None else state.rows(row)
            self._slots.admit(prompt, request, state=before)

    def __next__(self) -> Token:
        while not self._tokens and (self._slots.active or self._slots.waiting):
            self._tokens.extend(self._slots.step())
            for row, left in self._slots.left.items():
                self.states[row], self.unread[row] = left.state, left.unread
        if not self._tokens:
            raise StopIteration
        token = self._tokens.popleft()
        if token.finish_reason == "error":
            raise ValueError(
                f"row {token.row}: the model's logits are not numbers; its weights or "
                "the state it began from are damaged"
            )
        return token

    @torch.no_grad()
    def final_state(self, row: int = 0) -> State:
        """The state of a row that has finished, after its prompt and all of its tokens.

        ValueError if the row has not finished.
        """
        state, unread = self.states[row], self.unread[row]
        if state is None:
            raise ValueError(f"row {row} has not finished; take its tokens to the end first")
        if unread:
            _, state = reading.read(self._slots.engine, torch.tensor([unread]), None, state)
        return state


def generate(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Texts,
    *,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    penalty_decay: float | None = None,
    count_digits: bool | None = None,
    stop: str | Sequence[str] | None = None,
    seed: int | Sequence[int] | None = None,
    state: State | None = None,
) -> Texts:
    """The continuation of one prompt, or of each of several, without the prompt.

    None stands for an option's default: `Sampling` and `Request` describe the options. Stop strings
    end a row and are not part of its text. Each row draws from its own seed: one number serves
    every row, so that each equals its solo run; give a list to sample one prompt several times.
    `state` holds one row per prompt (see `State`).
    """
    options: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "penalty_decay": penalty_decay,
        "count_digits": count_digits,
    }
    generation = Generation(
        engine,
        tokenizer,
        prompts,
        sampling=Sampling(**options),
        max_tokens=max_tokens,
        stop=stop,
        seed=seed,
        log_probabilities=False,
        state=state,
    )
    texts = [""] * len(generation.states)
    for token in generation:
        texts[token.row] += token.text
    return texts[0] if isinstance(prompts, str | bytes) else texts


def _listed(prompts: object) -> list[Any]:
    """Several prompts as a list; a single text becomes a list of one."""
    if isinstance(prompts, str | bytes):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise ValueError(
            f"prompts is {prompts!r}; give a text, or a list of texts or of lists of token ids"
        )
    if not (found := list(prompts)):
        raise ValueError("no prompts; give at least one")
    return found


def _ids(prompt: Any, engine: Engine) -> Tensor:
    if isinstance(prompt, str | bytes):
        raise ValueError("prefill reads token ids, not text; encode it with the tokenizer first")
    return reading.token_ids(prompt, engine.config.vocab_size)


def _seeds(seed: Any, number: int) -> list[Any]:
    several = isinstance(seed, Iterable) and not isinstance(seed, str | bytes)
    seeds = list(seed) if several else [seed] * number
    if len(seeds) != number:
        raise ValueError(f"{len(seeds)} seeds for {number} prompts; give one or as many")
    return seeds
