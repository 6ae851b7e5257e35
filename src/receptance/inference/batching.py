"""Many texts that are continued together, in fixed slots; each may come and go at any step.

Every row has its own options, random numbers, text and state, and equals its solo run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from receptance.engine.base import Engine
from receptance.inference import reading, sampling, steering
from receptance.inference.rows import Left, Likeliest, Prompt, Request, Row, Token
from receptance.inference.transfer import upload
from receptance.state import State
from receptance.tokenizer import Tokenizer

# One call of the engine reads so many positions, of all prompts together, so that its memory is
# bounded whatever there is to read.
CHUNK = 512
# One call reads so many while other rows generate, because these wait for it.
CHUNK_BESIDE = 64


@dataclass(frozen=True)
class _Group:
    """Rows that go through the engine together."""

    rows: tuple[Row, ...] = ()
    read: tuple[int, ...] = ()  # how many tokens of its prompt each row has read
    state: State | None = None  # None if no row has read anything

    def pick(self, index: Sequence[int]) -> _Group:
        """The chosen rows, in that order."""
        if list(index) == list(range(len(self.rows))):
            return self  # as in most steps, and no state has to be copied
        rows = tuple(self.rows[i] for i in index)
        read = tuple(self.read[i] for i in index)
        state = None if self.state is None or not rows else self.state.rows(index)
        return _Group(rows, read, state)


class Slots:
    """Up to `capacity` rows that generate together; further rows wait for their turn.

    A step gives every generating row one token. Before that it reads a piece of the prompts that
    were admitted: `chunk` positions in all, or `chunk_beside` if there are rows that have to wait
    for it. All prompts get the same share of them, so that a short one is not stuck behind a long
    one. With `lockstep` no row generates before every prompt is read.

    With `deterministic` each row is the same to the bit whatever its company and whenever it came:
    an engine that is not `batch_invariant` then runs every row alone.

    A model in training mode is run without dropout and is in training mode again between the calls.
    If the engine fails, everything stays as it was: step again, or evict rows. Several threads must
    not use one `Slots` at the same time.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        capacity: int = 16,
        *,
        deterministic: bool = False,
        lockstep: bool = False,
        chunk: int = CHUNK,
        chunk_beside: int = CHUNK_BESIDE,
    ) -> None:
        sizes = {"capacity": capacity, "chunk": chunk, "chunk_beside": chunk_beside}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not isinstance(tokenizer, Tokenizer):
            raise ValueError(
                f"tokenizer is {tokenizer!r}, and texts need one; load the model with tokenizer="
            )
        reading.check_weights(engine)
        self.engine, self.tokenizer, self.capacity = engine, tokenizer, capacity
        self.left: dict[int, Left] = {}
        """What the rows that finished in the last step left behind, by number."""
        self._apart = deterministic and not engine.batch_invariant
        self._lockstep, self._chunk, self._beside = lockstep, chunk, chunk_beside
        self._numbers = count()
        self._waiting: deque[tuple[Row, State | None]] = deque()
        self._reading, self._running = _Group(), _Group()
        self._empty: State | None = None

    @property
    def active(self) -> list[int]:
        """The numbers of the rows that have a slot, by age."""
        return sorted(row.number for row in self._reading.rows + self._running.rows)

    @property
    def waiting(self) -> list[int]:
        """The numbers of the rows that wait for a slot; the next one to get it comes first."""
        return [row.number for row, _ in self._waiting]

    @property
    def free(self) -> int:
        """The number of slots without a row."""
        return self.capacity - len(self._reading.rows) - len(self._running.rows)

    @torch.no_grad()
    def admit(
        self, prompt: Prompt, request: Request | None = None, *, state: State | None = None
    ) -> int:
        """Add a row; its number is the `row` of its tokens and the argument of `evict`.

        The row begins with the next step if a slot is free, else when it is its turn. An empty
        prompt begins after an end-of-text token. A `state` of one row continues the text that it
        has read. ValueError if prompt or state do not fit the model; no other row notices.
        """
        tokens, request = self._tokens(prompt), request or Request()
        state = None if state is None else self._fitting(state)
        row = Row(next(self._numbers), request, tokens, self.tokenizer)
        self._waiting.append((row, state))
        return row.number

    @torch.no_grad()
    def evict(self, number: int) -> Left:
        """Take a row out, wherever it is, and return what it leaves; ValueError if it is gone."""
        for place, (row, state) in enumerate(self._waiting):
            if row.number == number:
                del self._waiting[place]
                return row.left(state)
        for name in ("_reading", "_running"):
            group: _Group = getattr(self, name)
            for place, row in enumerate(group.rows):
                if row.number == number:
                    alone = group.pick([place])
                    others = [i for i in range(len(group.rows)) if i != place]
                    setattr(self, name, group.pick(others))
                    return row.left(alone.state, alone.read[0])
        raise ValueError(f"there is no row {number}: it has finished, or was never admitted")

    @torch.no_grad()
    def step(self) -> list[Token]:
        """The next token of every row whose prompt has been read, by age.

        A row with a `max_tokens` of 0 has no token: `left` alone says that it has finished.
        """
        self._fill()
        rest, through, ends = self._read()
        running, last = self._feed()
        group, features = self._join(running, through), last + ends
        tokens = self._next(group, features) if group.rows else {}
        self._reading = rest
        self._settle(group, tokens)
        return sorted(tokens.values(), key=lambda token: token.row)

    # ---- coming in --------------------------------------------------------------------------

    def _tokens(self, prompt: Prompt) -> Tensor:
        if isinstance(prompt, bytearray):
            prompt = bytes(prompt)
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str | bytes) else prompt
        known = self.engine.config.vocab_size
        tokens = reading.token_ids(ids, known)
        return tokens if len(tokens) else reading.token_ids([self.tokenizer.end_of_text], known)

    def _fitting(self, state: State) -> State:
        """The state with the engine's dtypes; a wrong one would later fail all rows with it."""
        if state.batch != 1:
            raise ValueError(f"the state holds {state.batch} rows; choose one with State.rows()")
        like = self._nothing()
        wanted = {name: list(x.shape) for name, x in like.tensors.items()}
        found = {name: list(x.shape) for name, x in state.tensors.items()}
        if found != wanted:
            raise ValueError(f"the state holds {found}; one of this model holds {wanted}")
        tensors = {name: x.detach().to(like.tensors[name]) for name, x in state.tensors.items()}
        return State(tensors, state.tokens.to(like.tokens))

    def _nothing(self) -> State:
        """The state of one row that has read nothing."""
        if self._empty is None:
            self._empty = reading.empty_state(self.engine)
        return self._empty

    def _join(self, *groups: _Group) -> _Group:
        full = [group for group in groups if group.rows]
        if len(full) < 2:
            return full[0] if full else _Group()
        state = None
        if any(group.state is not None for group in full):
            state = State.cat([g.state or self._nothing().rows([0] * len(g.rows)) for g in full])
        rows, read = sum((g.rows for g in full), ()), sum((g.read for g in full), ())
        return _Group(rows, read, state)

    def _fill(self) -> None:
        """Give the free slots to the rows that wait, first come, first served."""
        coming = list(self._waiting)[: self.free]
        groups = (_Group((row,), (0,), state) for row, state in coming)
        self._reading = self._join(self._reading, *groups)
        for _ in coming:
            self._waiting.popleft()

    # ---- through the engine -----------------------------------------------------------------

    def _share(self, rows: int) -> tuple[int, int]:
        """How many of the rows read on in one call, and how many positions each of them."""
        budget = self._beside if self._running.rows else self._chunk
        if self._apart:  # the pieces of a prompt must not depend on the other rows
            return max(1, budget // self._beside), self._beside
        return budget, max(1, budget // rows)

    def _read(self) -> tuple[_Group, _Group, list[Tensor]]:
        """The rows that are still reading, those that have read, and the features of these."""
        rest, through, ends = self._reading, _Group(), []
        while rest.rows:
            count, positions = self._share(len(rest.rows))
            now = rest.pick(range(min(count, len(rest.rows))))
            later = rest.pick(range(len(now.rows), len(rest.rows)))
            now, features = self._read_on(now, positions)
            done = [i for i, row in enumerate(now.rows) if now.read[i] == len(row.prompt)]
            going = [i for i in range(len(now.rows)) if i not in done]
            # These rows go behind those that did not read, so that all have their turn.
            rest = self._join(later, now.pick(going))
            through = self._join(through, now.pick(done))
            ends.append(features[done])
            if not self._lockstep:
                break
        return rest, through, ends

    def _read_on(self, group: _Group, positions: int) -> tuple[_Group, Tensor]:
        starts = zip(group.rows, group.read, strict=True)
        pieces = [row.prompt[read : read + positions] for row, read in starts]
        features, state = self._run(*reading.padded(pieces), group.state)
        read = (read + len(piece) for read, piece in zip(group.read, pieces, strict=True))
        return _Group(group.rows, tuple(read), state), features

    def _feed(self) -> tuple[_Group, list[Tensor]]:
        """Read the last token of every generating row: the rows and their features."""
        group = self._running
        if not group.rows:
            return group, []
        tokens = torch.tensor([[row.last] for row in group.rows])
        features, state = self._run(tokens, None, group.state)
        return _Group(group.rows, group.read, state), [features]

    def _run(
        self, tokens: Tensor, sizes: list[int] | None, state: State | None
    ) -> tuple[Tensor, State]:
        run = reading.read_apart if self._apart else reading.read
        return run(self.engine, tokens, sizes, state)

    # ---- tokens -----------------------------------------------------------------------------

    def _next(self, group: _Group, parts: list[Tensor]) -> dict[int, Token]:
        """The next token by place in the group, of the rows that generate any."""
        places = [i for i, row in enumerate(group.rows) if row.request.max_tokens]
        if not places:
            return {}
        features = parts[0] if len(parts) == 1 else torch.cat(parts)
        if len(places) < len(group.rows):
            features = features[_index(places, features)]
        rows = [group.rows[i] for i in places]
        chosen = zip(places, rows, *self._choose(rows, features), strict=True)
        return {i: row.take(token, score, best) for i, row, token, score, best in chosen}

    def _choose(
        self, rows: Sequence[Row], features: Tensor
    ) -> tuple[list[int], list[float | None], list[Likeliest]]:
        """The next id of every row, its log-probability and the likeliest ids, if asked for."""
        logits = self._logits(features)
        options = [row.request.sampling for row in rows]
        asked = [i for i, row in enumerate(rows) if row.request.log_probabilities]
        # The scores come before the penalties, which change the logits in place.
        scores = None
        if asked:
            own = logits if len(asked) == len(rows) else logits[_index(asked, logits)]
            scores = sampling.log_probabilities(own)
        sampling.penalize(logits, [row.seen for row in rows], options)
        requests = [row.request for row in rows]
        steering.steer(logits, [r.bias for r in requests], [r.constraint for r in requests])
        uniform = upload(torch.tensor([row.uniform() for row in rows]), logits.device)
        ids = sampling.choose(logits, uniform, options)
        found: list[float | None] = [None] * len(rows)
        likeliest: list[Likeliest] = [()] * len(rows)
        if scores is not None:
            for place, i in enumerate(asked):
                if count := rows[i].request.likeliest:
                    likeliest[i] = steering.likeliest(scores[place], count)
            chosen = scores.gather(1, ids[_index(asked, ids)].clamp(min=0)[:, None])
            for i, score in zip(asked, chosen[:, 0].tolist(), strict=True):
                found[i] = score
        return ids.tolist(), found, likeliest

    def _logits(self, features: Tensor) -> Tensor:
        head = reading.head_apart if self._apart else lambda engine, x: engine.head(x)
        logits = head(self.engine, features).float()
        # An embedding may have more rows than the tokenizer has tokens; these ids have no text.
        logits[:, self.tokenizer.vocab_size :] = -torch.inf
        return logits

    def _settle(self, group: _Group, tokens: dict[int, Token]) -> None:
        """Part the rows that go on from those that have finished."""
        reasons = {i: token.finish_reason for i, token in tokens.items()}
        going = [i for i, reason in reasons.items() if reason is None]
        self.left = {}
        for i, row in enumerate(group.rows):
            if (reason := reasons.get(i, "length")) is not None:
                state = group.pick([i]).state
                self.left[row.number] = row.left(state, group.read[i], reason)
        self._running = group.pick(going)


def _index(rows: Sequence[int], like: Tensor) -> Tensor:
    return upload(torch.tensor(rows), like.device)
