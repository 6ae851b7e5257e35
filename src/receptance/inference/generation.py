"""Reading a prompt and continuing it: prefill, decoding, streaming, stopping.

Several prompts of different lengths are one batch; each row equals its solo run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from receptance.engine.base import Engine
from receptance.inference.batching import CHUNK, Slots
from receptance.inference.rows import Prompt, Request, Token
from receptance.inference.sampling import Sampling
from receptance.state import State
from receptance.tokenizer import Tokenizer

__all__ = ["Generation", "Prompt", "Token", "generate", "prefill"]

# Positions that are read at once, of all prompts together: memory stays bounded whatever they are.
PREFILL_CHUNK = CHUNK

Texts = TypeVar("Texts", str, list[str])


@torch.no_grad()
def prefill(
    engine: Engine, prompts: Sequence[Sequence[int]], state: State | None = None
) -> tuple[Tensor, State]:
    """Read prompts of any lengths, of at least one token: logits [B,V] for what follows, state.

    Chunk by chunk, with the head at each row's last position only.
    """
    if min(map(len, prompts), default=0) < 1:
        raise ValueError("no prompt, or one without tokens; give at least one")
    lengths = torch.tensor([len(p) for p in prompts], device=engine.device)
    last: Tensor | None = None
    positions = max(1, PREFILL_CHUNK // len(prompts))
    for start in range(0, int(lengths.max()), positions):
        pieces = [torch.tensor(p[start : start + positions]).long() for p in prompts]
        tokens = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True).to(engine.device)
        inside = (lengths - start).clamp(0, tokens.shape[1])
        ragged = inside if bool((inside < tokens.shape[1]).any()) else None
        features, state = engine.features(tokens, state, lengths=ragged)
        ends = (inside > 0).nonzero()[:, 0]  # a later chunk overwrites a longer row's
        last = features.new_empty(len(prompts), features.shape[-1]) if last is None else last
        last[ends] = features[ends, inside[ends] - 1]
    assert state is not None and last is not None
    return engine.head(last), state


class Generation:
    """Iterating over it generates tokens, row by row in every step, each time from the start.

    Prompts are text or token ids; empty ones begin after an end-of-text token. `state` continues
    from an earlier one (one row per prompt). After a row has finished, `states[row]` is its state
    behind every generated token but those in `unread[row]`: the last one, which was never fed.
    Without `log_probabilities` tokens come sooner, and without theirs; for `deterministic` see
    `Slots`.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        *,
        sampling: Sampling | None = None,
        max_tokens: int = 256,
        stop: Sequence[str] = (),
        seed: int | Sequence[int] = 0,
        ignore_end_of_text: bool = False,
        log_probabilities: bool = True,
        deterministic: bool = False,
        state: State | None = None,
    ) -> None:
        if not prompts:
            raise ValueError("no prompts; give at least one")
        seeds = list(seed) if isinstance(seed, Iterable) else [seed] * len(prompts)
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts; give one or as many")
        if state is not None and state.batch != len(prompts):
            raise ValueError(
                f"the state holds {state.batch} rows and there are {len(prompts)} prompts; "
                "select rows with State.rows()"
            )
        self.states: list[State | None] = [None] * len(prompts)
        self.unread: list[list[int]] = [[] for _ in prompts]
        self._slots = partial(
            Slots, engine, tokenizer, len(prompts), deterministic=deterministic, lockstep=True
        )
        self._prompts, self._state = prompts, state
        self._requests = [
            Request(
                sampling=sampling or Sampling(),
                max_tokens=max_tokens,
                stop=stop,
                seed=own,
                ignore_end_of_text=ignore_end_of_text,
                log_probabilities=log_probabilities,
            )
            for own in seeds
        ]

    def __iter__(self) -> Iterator[Token]:
        slots = self._slots(chunk=PREFILL_CHUNK)
        for row, (prompt, request) in enumerate(zip(self._prompts, self._requests, strict=True)):
            before = None if self._state is None else self._state.rows(row)
            slots.admit(prompt, request, state=before)
        while tokens := slots.step():
            for row, left in slots.left.items():
                self.states[row], self.unread[row] = left.state, left.unread
            for token in tokens:
                if token.finish_reason == "error":
                    raise ValueError(
                        f"row {token.row}: the model's logits are not numbers; its weights or "
                        "the state it began from are damaged"
                    )
                yield token


def generate(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Texts,
    *,
    max_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    penalty_decay: float = 0.996,
    stop: Sequence[str] = (),
    seed: int | Sequence[int] = 0,
    state: State | None = None,
) -> Texts:
    """The continuation of one prompt, or of each of several, without the prompt.

    Options are those of `Sampling`; stop strings end a row and are not part of its text. A row
    draws from its own seed: one number serves every row, so that each equals its solo run; give a
    list to sample one prompt several times. state holds one row per prompt (`State`).
    """
    options = Sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        penalty_decay=penalty_decay,
    )
    batch = [prompts] if isinstance(prompts, str) else list(prompts)
    texts = [""] * len(batch)
    generation = Generation(
        engine,
        tokenizer,
        batch,
        sampling=options,
        max_tokens=max_tokens,
        stop=stop,
        seed=seed,
        log_probabilities=False,
        state=state,
    )
    for token in generation:
        texts[token.row] += token.text
    return texts[0] if isinstance(prompts, str) else texts
