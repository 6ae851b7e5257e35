"""Log-probabilities of continuations: a beginning that several requests share is read once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from receptance.engine.base import Engine
from receptance.evaluation.benchmarks.prefix_tree import Node, Request, Tree, Want, plan
from receptance.inference.reading import check_weights, empty_state, padded
from receptance.inference.transfer import upload
from receptance.model.inputs import check_ids
from receptance.state import State

# Up to so many runs are read side by side, by calls of about so many positions in all.
_ROWS, _POSITIONS = 32, 512
_ROWS_ELSEWHERE, _POSITIONS_ELSEWHERE = 256, 8192
# A row of a batch is padded to the longest, so none reads more than this times its share.
_UNEVEN = 4
# The logits of so many positions are in memory at once.
_HEAD_CHUNK = 256


@dataclass(frozen=True)
class Scored:
    """What a model says of a continuation."""

    log_probability: float
    """The natural logarithm of its probability, summed over its tokens."""
    greedy: bool
    """Whether each of its tokens is the likeliest."""


@dataclass
class _Sum:
    missing: int
    log_probability: float = 0.0
    greedy: bool = True


@dataclass(eq=False)
class _Open:
    """A node that is being read, and the state in front of what is left of it."""

    node: Node
    state: State
    at: int = field(default=0)

    @property
    def left(self) -> int:
        return self.node.end - self.node.start - self.at


Found = Callable[[int, Scored], object]
"""A function that is told the number of a request and its score as soon as that is known."""
Progress = Callable[[int, int], object]
"""A function that is told how many tokens were read, and how many have to be read in all."""


@torch.no_grad()
def score_requests(
    engine: Engine,
    requests: Sequence[Request],
    found: Found,
    progress: Progress = lambda done, total: None,
) -> Tree:
    """Score all requests, and return the tree of their tokens, which says how many were spared.

    Each score is that of the request run alone, up to rounding. ValueError for a token that the
    model does not know.
    """
    check_weights(engine)
    for request in requests:
        check_ids(torch.from_numpy(request.tokens), engine.config.vocab_size)
        check_ids(torch.tensor(request.continuation[-1:]), engine.config.vocab_size)
    tree = plan(requests)
    _Reader(engine, requests, found).read(tree, progress)
    return tree


class _Reader:
    def __init__(self, engine: Engine, requests: Sequence[Request], found: Found) -> None:
        self.engine, self.found = engine, found
        self.sums = [_Sum(len(request.continuation)) for request in requests]
        on_cpu = engine.device.type == "cpu"
        self.rows = _ROWS if on_cpu else _ROWS_ELSEWHERE
        self.positions = _POSITIONS if on_cpu else _POSITIONS_ELSEWHERE

    def read(self, tree: Tree, progress: Progress) -> None:
        """Read all nodes. Those below a node come next, so that few states exist at a time."""
        empty, done = empty_state(self.engine), 0
        stack = [_Open(node, empty) for node in reversed(tree.roots)]
        progress(0, tree.tokens)
        while stack:
            now = [stack.pop() for _ in range(min(self.rows, len(stack)))]
            sizes = shares([each.left for each in now], self.positions)
            features, state = self._run(now, sizes)
            self._score(now, sizes, features)
            done += sum(sizes)
            progress(done, tree.tokens)
            # What was on top of the stack is on top again.
            for row in reversed(range(len(now))):
                stack += self._behind(now[row], sizes[row], state, row)

    def _run(self, now: list[_Open], sizes: list[int]) -> tuple[Tensor, State]:
        device = self.engine.device
        pieces = [
            torch.from_numpy(each.node.run[each.at : each.at + size].astype(np.int64))
            for each, size in zip(now, sizes, strict=True)
        ]
        tokens, lengths = padded(pieces)
        counts = None if lengths is None else upload(torch.tensor(lengths), device)
        before = now[0].state if len(now) == 1 else State.cat([each.state for each in now])
        with self.engine.evaluating():
            return self.engine.features(upload(tokens, device), before, lengths=counts)

    def _score(self, now: list[_Open], sizes: list[int], features: Tensor) -> None:
        """Compute the predictions that are wanted at the positions that were just read."""
        places: dict[tuple[int, int], int] = {}
        wants: list[tuple[int, Want]] = []
        for row, (each, size) in enumerate(zip(now, sizes, strict=True)):
            begin = each.node.start + each.at
            for want in each.node.wanted:
                if begin <= want.position < begin + size:
                    place = (row, want.position - begin)
                    wants.append((places.setdefault(place, len(places)), want))
        if not wants:
            return
        wants.sort(key=lambda pair: pair[0])
        rows, columns = torch.tensor(list(places)).T.to(features.device)
        read = features[rows, columns]
        at = np.array([place for place, _ in wants])
        for start in range(0, len(read), _HEAD_CHUNK):
            first, last = np.searchsorted(at, [start, start + _HEAD_CHUNK])
            some = [(place - start, want) for place, want in wants[first:last]]
            self._settle(self.engine.head(read[start : start + _HEAD_CHUNK]).float(), some)

    def _settle(self, logits: Tensor, wants: list[tuple[int, Want]]) -> None:
        """Add what logits [N,V] say of the targets to the sums of their requests."""
        device = logits.device
        rows = torch.tensor([place for place, _ in wants], device=device)
        targets = torch.tensor([want.target for _, want in wants], device=device)
        scale = logits.logsumexp(-1)
        values = (logits[rows, targets] - scale[rows]).double().tolist()
        likeliest = (logits.argmax(-1)[rows] == targets).tolist()
        for (_, want), value, greedy in zip(wants, values, likeliest, strict=True):
            each = self.sums[want.request]
            each.log_probability += value
            each.greedy &= greedy
            each.missing -= 1
            if not each.missing:
                self.found(want.request, Scored(each.log_probability, each.greedy))

    def _behind(self, each: _Open, size: int, state: State, row: int) -> list[_Open]:
        """What is to be read after a piece of a node: its rest, or the nodes below it."""
        rest = each.left - size
        if not rest and not each.node.children:
            return []
        after = state.rows(row)
        if rest:
            return [_Open(each.node, after, each.at + size)]
        return [_Open(child, after) for child in reversed(each.node.children)]


def shares(lengths: Sequence[int], positions: int) -> list[int]:
    """How much of each run is read in one call: all of the short ones, and as much of the others.

    The shares add up to `positions` or a little more, and each is at least 1.
    """
    most = max(1, _UNEVEN * positions // len(lengths))
    left, found = positions, [0] * len(lengths)
    for rank, number in enumerate(sorted(range(len(lengths)), key=lengths.__getitem__)):
        share = max(1, left // (len(lengths) - rank))
        found[number] = min(lengths[number], share, most)
        left -= found[number]
    return found
