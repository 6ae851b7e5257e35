"""Reading a prompt and continuing it: prefill, decoding, streaming, stopping.

Several prompts of different lengths are one batch; each row equals its solo run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from receptance import sampling
from receptance.model import Model
from receptance.sampling import Sampling
from receptance.state import State
from receptance.tokenizer import Tokenizer

# Tokens of a prompt that are read at once: memory stays bounded whatever the prompt's length.
PREFILL_CHUNK = 512

Prompt = str | Sequence[int]
Texts = TypeVar("Texts", str, list[str])


@dataclass(frozen=True)
class Token:
    """One generated token of one row."""

    row: int
    id: int
    text: str
    """Text that is certain now: incomplete characters and possible stop strings wait."""
    log_probability: float
    """Natural logarithm, under the model itself, before penalties and truncation."""
    finish_reason: str | None = None
    """Set on a row's last token: "stop", "end_of_text" or "length"."""


@torch.no_grad()
def prefill(
    model: Model, prompts: Sequence[Sequence[int]], state: State | None = None
) -> tuple[Tensor, State]:
    """Read prompts of any lengths, of at least one token: logits [B,V] for what follows, state.

    Chunk by chunk, with the head at each row's last position only.
    """
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt without tokens; give at least one")
    device = model.emb.weight.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    longest = int(lengths.max())
    last = torch.zeros(
        len(prompts), model.config.width, device=device, dtype=model.emb.weight.dtype
    )
    for start in range(0, longest, PREFILL_CHUNK):
        pieces = [torch.tensor(p[start : start + PREFILL_CHUNK]).long() for p in prompts]
        tokens = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True).to(device)
        inside = (lengths - start).clamp(0, tokens.shape[1])
        ragged = inside if bool((inside < tokens.shape[1]).any()) else None
        features, state = model.features(tokens, state, lengths=ragged)
        ends = (inside > 0).nonzero()[:, 0]  # a later chunk overwrites a longer row's
        last[ends] = features[ends, inside[ends] - 1]
    assert state is not None
    return model.head(last), state


class Generation:
    """An iterator over generated tokens, row by row in every step.

    Prompts are text or token ids; empty ones begin after an end-of-text token. `state` continues
    from an earlier one (one row per prompt). After a row has finished, `states[row]` is its state
    behind every generated token but those in `unread[row]`: the last one, which was never fed.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        *,
        sampling: Sampling | None = None,
        max_tokens: int = 256,
        stop: Sequence[str] = (),
        seed: int | Sequence[int] = 0,
        ignore_end_of_text: bool = False,
        state: State | None = None,
    ) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}; it must be at least 1")
        if not prompts:
            raise ValueError("no prompts; give at least one")
        if any(not s for s in stop):
            raise ValueError("an empty stop string would stop before the first token")
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts; give one or as many")
        if beyond := [s for s in seeds if not 0 <= s < 1 << 63]:
            raise ValueError(f"seed is {beyond[0]}; it must be at least 0 and less than 2**63")
        self.model, self.tokenizer = model, tokenizer
        self.sampling = sampling or Sampling()
        self.max_tokens, self.ignore_end_of_text = max_tokens, ignore_end_of_text
        ids = [tokenizer.encode(p) if isinstance(p, str) else list(p) for p in prompts]
        self.prompts = [p or [tokenizer.end_of_text] for p in ids]
        self.states: list[State | None] = [None] * len(prompts)
        self.unread: list[list[int]] = [[] for _ in prompts]
        self._state = state
        self._texts = [_Text(tokenizer, stop) for _ in prompts]
        # A seed is a row's own, so that a row draws the same numbers in any company.
        self._random = [torch.Generator().manual_seed(s) for s in seeds]

    @torch.no_grad()
    def __iter__(self) -> Iterator[Token]:
        logits, state = prefill(self.model, self.prompts, self._state)
        rows = list(range(len(self.prompts)))
        counts = torch.zeros_like(logits, dtype=torch.float32)
        for step in range(self.max_tokens):
            logits = logits.float()
            # Rows of the embedding beyond the vocabulary stand for nothing.
            logits[:, self.tokenizer.vocab_size :] = -torch.inf
            ids = self._choose(logits, counts, rows)
            chosen = logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(-1)
            last = step + 1 == self.max_tokens
            going = []
            for i, (token, score) in enumerate(zip(ids.tolist(), chosen.tolist(), strict=True)):
                text, reason = self._read(rows[i], token, last)
                if reason is None:
                    going.append(i)
                else:
                    self.states[rows[i]], self.unread[rows[i]] = state.rows(i), [token]
                yield Token(rows[i], token, text, score, reason)
            if not going:
                return
            if len(going) < len(rows):
                rows, ids = [rows[i] for i in going], ids[going]
                state, counts = state.rows(going), counts[going]
            if self.sampling.penalises:
                counts = sampling.count(counts, ids, self.sampling)
            logits, state = self.model(ids[:, None], state)
            logits = logits[:, -1]

    def _choose(self, logits: Tensor, counts: Tensor, rows: list[int]) -> Tensor:
        if self.sampling.penalises:
            logits = sampling.penalise(logits, counts, self.sampling)
        uniform = torch.stack([torch.rand((), generator=self._random[row]) for row in rows])
        return sampling.choose(logits, uniform.to(logits.device), self.sampling)

    def _read(self, row: int, token: int, last: bool) -> tuple[str, str | None]:
        """The text that a row's next token makes certain, and why the row ends with it."""
        if token == self.tokenizer.end_of_text and not self.ignore_end_of_text:
            return self._texts[row].finish(), "end_of_text"
        text, stopped = self._texts[row].push(token)
        if stopped:
            return text, "stop"
        return (text + self._texts[row].finish(), "length") if last else (text, None)


class _Text:
    """A row's text: holds back incomplete characters and what may become a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.decoder = tokenizer.stream()
        self.stop = tuple(stop)
        self.held = ""

    def push(self, token: int) -> tuple[str, bool]:
        """Text that is certain now, and whether a stop string ended it."""
        self.held += self.decoder.push(token)
        # The one that is complete first ends the text, however it is cut into tokens.
        found = [(at + len(s), at) for s in self.stop if (at := self.held.find(s)) >= 0]
        if found:
            text, self.held = self.held[: min(found)[1]], ""
            return text, True
        keep = max((_overlap(self.held, s) for s in self.stop), default=0)
        text, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return text, False

    def finish(self) -> str:
        """What is still held when the row ends for another reason."""
        text, self.held = self.held + self.decoder.flush(), ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that begins stop."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def generate(
    model: Model,
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
        model,
        tokenizer,
        batch,
        sampling=options,
        max_tokens=max_tokens,
        stop=(stop,) if isinstance(stop, str) else stop,
        seed=seed,
        state=state,
    )
    for token in generation:
        texts[token.row] += token.text
    return texts[0] if isinstance(prompts, str) else texts
