"""Token sequences as a tree, in which every common beginning is there once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Want:
    """A prediction that was asked for."""

    position: int
    """The number of the token behind which it is made, in its sequence."""
    target: int
    """The token whose probability is wanted."""
    request: int
    """The number of the request."""


@dataclass(eq=False)
class Node:
    """A run of tokens that all sequences below it have in common."""

    tokens: NDArray[np.int32]
    """The tokens of one of these sequences, from its beginning."""
    start: int
    end: int
    """The run is tokens[start:end]."""
    parent: Node | None = None
    children: list[Node] = field(default_factory=list)
    wanted: list[Want] = field(default_factory=list)

    @property
    def run(self) -> NDArray[np.int32]:
        """The tokens to read, after those of the parent."""
        return self.tokens[self.start : self.end]


@dataclass(frozen=True)
class Request:
    """The tokens of a context and of its continuation, which is scored."""

    context: Sequence[int]
    continuation: Sequence[int]

    def __post_init__(self) -> None:
        if not len(self.context) or not len(self.continuation):
            empty = "context" if not len(self.context) else "continuation"
            raise ValueError(f"a {empty} without tokens; give at least one token of each")

    @property
    def tokens(self) -> NDArray[np.int32]:
        """What is read: all but the last token, behind which nothing is predicted."""
        return np.concatenate([self.context, self.continuation[:-1]]).astype(np.int32)


@dataclass(frozen=True)
class Tree:
    """The common beginnings of requests; the tokens of all runs are what has to be read."""

    roots: list[Node]
    """The nodes that are read from an empty state."""
    tokens: int
    """How many tokens all runs have."""
    spared: int
    """How many more the sequences have if each is read for itself."""


def plan(requests: Sequence[Request]) -> Tree:
    """The tree of the tokens of all requests, with the predictions that each of them wants."""
    sequences = [request.tokens for request in requests]
    # Numbers of which the high byte comes first are in the order of their bytes.
    order = sorted(
        range(len(requests)), key=lambda number: sequences[number].astype(">u4").tobytes()
    )
    top = Node(np.zeros(0, np.int32), 0, 0)
    path, before = [top], top.tokens
    leaves: dict[int, Node] = {}
    for number in order:
        tokens = sequences[number]
        path = _descend(path, _common(before, tokens))
        if len(tokens) > path[-1].end:
            leaf = Node(tokens, path[-1].end, len(tokens), path[-1])
            path[-1].children.append(leaf)
            path.append(leaf)
        leaves[number], before = path[-1], tokens
    for number, request in enumerate(requests):
        _want(leaves[number], number, request)
    read = _total(top)
    return Tree(top.children, read, sum(map(len, sequences)) - read)


def _common(one: NDArray[np.int32], other: NDArray[np.int32]) -> int:
    """The length of the common beginning of two sequences."""
    shorter = min(len(one), len(other))
    differ = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(differ[0]) if len(differ) else shorter


def _descend(path: list[Node], length: int) -> list[Node]:
    """The path down to a length, where a node that goes beyond it is cut in two."""
    kept = [node for node in path if node.end <= length]
    beyond = path[len(kept)] if len(kept) < len(path) else None
    if beyond is not None and beyond.start < length:
        upper = Node(beyond.tokens, beyond.start, length, beyond.parent, [beyond])
        assert beyond.parent is not None
        beyond.parent.children[-1] = upper
        beyond.start, beyond.parent = length, upper
        kept.append(upper)
    return kept


def _want(leaf: Node, number: int, request: Request) -> None:
    """Tell the nodes on the way to a leaf which predictions the request wants of them."""
    first = len(request.context) - 1
    node: Node | None = leaf
    last = leaf.end
    while node is not None and last > first:
        for position in range(max(first, node.start), last):
            target = int(request.continuation[position - first])
            node.wanted.append(Want(position, target, number))
        last, node = node.start, node.parent


def _total(top: Node) -> int:
    """The tokens of all runs below a node."""
    total, left = 0, [top]
    while left:
        node = left.pop()
        total += node.end - node.start
        left += node.children
    return total
