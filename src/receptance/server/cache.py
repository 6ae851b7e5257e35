"""`StateCache`: states behind the beginnings of texts, so that no text is read twice.

The texts form a radix tree over token ids, and some of its nodes have a snapshot: the state of a
model that has read everything from the root to there. States are values that nobody changes, so one
snapshot may be continued by any number of texts.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from receptance.state import State

# The bytes that one token id takes in a tuple of Python, with its int.
_TOKEN_BYTES = 36
# A branch of two texts gets a snapshot if that saves reading so many tokens.
_WORTH_A_BRANCH = 16


class Shelf(Protocol):
    """Where snapshots go that have no room in memory, such as a directory."""

    def texts(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The namespaces and token ids of all snapshots that are there, the oldest first."""
        ...

    def put(self, namespace: str, tokens: Sequence[int], state: State) -> None:
        """Keep a snapshot; a shelf that cannot does nothing."""
        ...

    def get(self, namespace: str, tokens: Sequence[int]) -> State | None:
        """A snapshot; None if it is gone or damaged."""
        ...

    def has(self, namespace: str, tokens: Sequence[int]) -> bool:
        """Whether there seems to be a snapshot."""
        ...


@dataclass(frozen=True)
class Found:
    """What the cache knows about the beginning of a text."""

    length: int = 0
    """How many of its tokens the state has read."""
    state: State | None = None
    branch: int | None = None
    """How many tokens it has in common with another text, if a snapshot there would be of use."""
    reason: str = "hit"
    """"hit", or why there is no state: "new_namespace", "new_text", "no_snapshot" (the beginning is
    known and has no snapshot before its end), "evicted" or "damaged"."""


class _Node:
    """Some tokens of a text, behind those of its parent."""

    __slots__ = ("children", "edge", "length", "lost", "namespace", "parent", "shelved", "state")

    def __init__(
        self, namespace: str, parent: _Node | None = None, edge: tuple[int, ...] = ()
    ) -> None:
        self.namespace, self.parent, self.edge = namespace, parent, edge
        self.length: int = (parent.length if parent else 0) + len(edge)
        self.children: dict[int, _Node] = {}
        self.state: State | None = None
        self.shelved = False
        self.lost: set[int] = set()  # first tokens of children that were evicted

    @property
    def snapshot(self) -> bool:
        return self.state is not None or self.shelved

    def tokens(self) -> tuple[int, ...]:
        """All tokens from the root to the end of this node."""
        pieces: list[tuple[int, ...]] = []
        node: _Node | None = self
        while node is not None:
            pieces.append(node.edge)
            node = node.parent
        return tuple(token for piece in reversed(pieces) for token in piece)


class StateCache:
    """Snapshots in at most `budget` bytes of memory; those used longest ago are evicted first.

    A namespace keeps apart texts that must not share states: those of different models, and those
    of clients that must not learn from the time of an answer what others have asked. What has no
    room in memory is found again on the shelf, if there is one. One thread uses a cache.
    """

    def __init__(self, budget: int, shelf: Shelf | None = None) -> None:
        if budget < 0:
            raise ValueError(f"budget is {budget} bytes; it must be at least 0")
        self.budget, self.nbytes = budget, 0
        self.outcomes: Counter[str] = Counter()
        """How often each `Found.reason` was given."""
        self.evicted = 0
        self._shelf = shelf
        self._roots: dict[str, _Node] = {}
        self._recent: OrderedDict[_Node, None] = OrderedDict()  # with states, the oldest first
        for namespace, tokens in shelf.texts() if shelf else ():
            self._node(namespace, tokens).shelved = True

    def __len__(self) -> int:
        """The number of snapshots in memory."""
        return len(self._recent)

    def find(self, namespace: str, tokens: Sequence[int], most: int) -> Found:
        """The longest snapshot of at most `most` tokens with which the tokens begin."""
        found = self._find(namespace, tuple(tokens), most)
        self.outcomes[found.reason] += 1
        return found

    def add(self, namespace: str, tokens: Sequence[int], state: State) -> None:
        """Keep the state of one row that has read these tokens, as long as there is room."""
        if not tokens or state.nbytes + _TOKEN_BYTES * len(tokens) > self.budget:
            return
        node = self._node(namespace, tuple(tokens))
        if node.state is None:
            # A row of a batch must not keep the memory of all the other rows.
            node.state = _owned(state)
            self.nbytes += state.nbytes
            if self._shelf is not None and not node.shelved:
                self._shelf.put(namespace, tokens, node.state)
                node.shelved = True
        self._recent[node] = None
        self._recent.move_to_end(node)
        while self.nbytes > self.budget and self._recent:
            self._evict(next(iter(self._recent)))
        if self.nbytes > self.budget:
            self._sweep()

    # ---- finding ----------------------------------------------------------------------------

    def _find(self, namespace: str, tokens: tuple[int, ...], most: int) -> Found:
        if (root := self._roots.get(namespace)) is None:
            return Found(reason="new_namespace")
        path, common = self._walk(root, tokens)
        lost = common < len(tokens) and tokens[common] in path[-1].lost
        reason = "evicted" if lost else "no_snapshot" if common else "new_text"
        for node in reversed(path):
            if node.length > min(most, common) or not node.snapshot:
                continue
            if (state := self._fetched(node)) is not None:
                gain = min(common, most) - node.length
                branch = common if gain >= _WORTH_A_BRANCH and common < len(tokens) else None
                return Found(node.length, state, branch)
            reason = "damaged"
        branch = common if _WORTH_A_BRANCH <= common < min(len(tokens), most + 1) else None
        return Found(branch=branch, reason=reason)

    def _walk(self, root: _Node, tokens: tuple[int, ...]) -> tuple[list[_Node], int]:
        """The nodes on the way along the tokens, and how many tokens are known.

        The last node is the last one that is known whole; further tokens may be inside a child.
        """
        path, node, at = [root], root, 0
        while at < len(tokens) and (child := node.children.get(tokens[at])) is not None:
            same = _common(child.edge, tokens, at)
            at += same
            if same < len(child.edge):
                break
            node = child
            path.append(node)
        return path, at

    def _fetched(self, node: _Node) -> State | None:
        """The state of a node, from the shelf if it is not in memory."""
        if node.state is None:
            assert self._shelf is not None
            tokens = node.tokens()
            state = self._shelf.get(node.namespace, tokens)
            if state is None:
                node.shelved = False
                self._prune(node)
                return None
            self.add(node.namespace, tokens, state)
            return state
        self._recent.move_to_end(node)
        return node.state

    # ---- changing the tree ------------------------------------------------------------------

    def _node(self, namespace: str, tokens: tuple[int, ...]) -> _Node:
        """The node at the end of the tokens, which is made if it is not there."""
        node = self._roots.setdefault(namespace, _Node(namespace))
        while node.length < len(tokens):
            at = node.length
            child = node.children.get(tokens[at])
            if child is None:
                child = _Node(namespace, node, tokens[at:])
                node.children[tokens[at]] = child
                node.lost.discard(tokens[at])
                self.nbytes += _TOKEN_BYTES * len(child.edge)
            elif (same := _common(child.edge, tokens, at)) < len(child.edge):
                child = self._split(child, same)
            node = child
        return node

    def _split(self, node: _Node, length: int) -> _Node:
        """A new node with the first `length` tokens of this one, which becomes its child."""
        assert node.parent is not None
        upper = _Node(node.namespace, node.parent, node.edge[:length])
        node.parent.children[node.edge[0]] = upper
        node.parent, node.edge = upper, node.edge[length:]
        upper.children[node.edge[0]] = node
        return upper

    def _evict(self, node: _Node) -> None:
        if self._shelf is not None:
            node.shelved = self._shelf.has(node.namespace, node.tokens())
        assert node.state is not None
        self.nbytes -= node.state.nbytes
        node.state = None
        del self._recent[node]
        self.evicted += 1
        self._prune(node)

    def _sweep(self) -> None:
        """Take away the texts whose snapshots the shelf had no room for."""
        stack, shelved = list(self._roots.values()), []
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            if node.shelved and node.state is None:
                shelved.append(node)
        for node in shelved:
            assert self._shelf is not None
            if not self._shelf.has(node.namespace, node.tokens()):
                node.shelved = False
                self._prune(node)

    def _prune(self, node: _Node) -> None:
        """Take away a node without snapshot and children, and its parents that become such."""
        while not node.snapshot and not node.children and node.parent is not None:
            parent, first = node.parent, node.edge[0]
            del parent.children[first]
            parent.lost.add(first)
            self.nbytes -= _TOKEN_BYTES * len(node.edge)
            node = parent
        if node.parent is None and not node.children and not node.snapshot and not node.lost:
            self._roots.pop(node.namespace, None)


def _common(edge: tuple[int, ...], tokens: tuple[int, ...], at: int) -> int:
    """How many tokens of an edge stand at this place of the tokens."""
    piece = tokens[at : at + len(edge)]
    if piece == edge:
        return len(edge)
    pairs = enumerate(zip(edge, piece, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(edge), len(piece)))


def _owned(state: State) -> State:
    """The state on the CPU, in tensors that keep no other memory alive."""
    tensors = {
        name: x.detach().cpu().clone() if x.untyped_storage().nbytes() > x.nbytes else x.cpu()
        for name, x in state.tensors.items()
    }
    return State(tensors, state.tokens.detach().cpu().clone())
