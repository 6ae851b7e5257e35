"""The vocabulary of the World models: greedy longest match over bytes."""

from __future__ import annotations

import ast
import gc
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from receptance.tokenizer.base import Tokenizer, to_bytes

# A trie node maps a byte to a node, and _MISMATCH to what to do when no child fits: the ids that
# are then certain, and the node for the bytes they do not cover.
_Node = dict[int, Any]
_MISMATCH = -1
# Id, literal, the text in it where that is plain to see, length.
_LINE = re.compile(r"(\d+) ('([^'\\\r\0]*)'|.+) (\d+)\s*")


class WorldTokenizer(Tokenizer):
    """The vocabulary of the World models, cut by greedy longest match.

    Token 0 ends a text and stands for no bytes. Same ids as `TRIE_TOKENIZER` of the `rwkv` package.
    """

    kind = "world"

    def __init__(self, content: bytes, name: str = "rwkv_vocab.txt") -> None:
        """From a vocabulary file's bytes; ValueError says what is wrong with it and in which line.

        Each line is `id literal length`: ids from 1 without gaps, a Python str or bytes literal,
        the number of its bytes.
        """
        with _no_garbage():
            super().__init__(_parse_vocabulary(content, name), content)
            self._root = _build_automaton(self._tokens)

    @classmethod
    def from_file(cls, path: str | Path) -> WorldTokenizer:
        """From a vocabulary file such as rwkv_vocab_v20230424.txt."""
        return cls(Path(path).read_bytes(), str(path))

    def encode(self, text: str | bytes) -> list[int]:
        """The ids of the longest vocabulary entries from left to right, in linear time."""
        ids: list[int] = []
        node = self._root
        for byte in to_bytes(text):
            while byte not in node:
                certain, node = node[_MISMATCH]
                ids += certain
            node = node[byte]
        while node is not self._root:
            certain, node = node[_MISMATCH]
            ids += certain
        return ids

    def save(self, directory: Path) -> list[str]:
        """Write rwkv_vocab.txt, the same bytes as were loaded."""
        return self._save_as(directory, "rwkv_vocab.txt")

    def __reduce__(self) -> tuple[type[WorldTokenizer], tuple[bytes]]:
        # Pickling for a worker process would follow the automaton's links beyond any stack.
        return WorldTokenizer, (self._content,)


@contextmanager
def _no_garbage() -> Iterator[None]:
    """While a hundred thousand objects are made and kept, Python need not look for dead ones."""
    looked = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if looked:
            gc.enable()


def _parse_vocabulary(content: bytes, name: str) -> list[bytes]:
    tokens = [b""]
    seen: set[bytes] = set()
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n"), start=1):
        try:
            token = _parse_line(line, number)
            if token in seen:
                raise ValueError(f"{token!r} is there twice; each token needs one id")
        except ValueError as error:
            raise ValueError(f"{name}, line {number}: {error}") from None
        seen.add(token)
        tokens.append(token)
    missing = [value for value in range(256) if bytes([value]) not in seen]
    if missing:
        raise ValueError(
            f"{name}: {len(missing)} of the 256 single bytes are missing, the first is "
            f"{bytes(missing[:1])!r}; without them some texts could not be encoded"
        )
    return tokens


def _parse_line(line: bytes, wanted_id: int) -> bytes:
    fields = _LINE.fullmatch(line.decode("utf-8"))
    if fields is None:
        raise ValueError(f"{line[:60]!r} is not `id literal length`, like `33 ' ' 1`")
    token_id, literal, length = int(fields[1]), fields[2], int(fields[4])
    if token_id != wanted_id:
        raise ValueError(f"id {token_id} where {wanted_id} was due; ids count from 1 without gaps")
    try:
        # Most are text between quotes, and compiling them would take most of the time.
        token = fields[3] if fields[3] is not None else ast.literal_eval(literal)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        token = None
    if isinstance(token, str):
        token = token.encode("utf-8")
    if not isinstance(token, bytes) or not token:
        raise ValueError(f"{literal[:60]} is not a str or bytes literal of at least one byte")
    if len(token) != length:
        raise ValueError(f"{literal[:60]} has {len(token)} bytes where the line says {length}")
    return token


def _build_automaton(tokens: Sequence[bytes]) -> _Node:
    """The trie of the tokens, with what Song et al. (arXiv 2012.15524) call failure links.

    Longest match on a plain trie walks on after the last whole token and, when that leads nowhere,
    reads those bytes again. What it would find in them is known beforehand, so it is stored in the
    node: each byte of a text is read once, however long or unlucky the tokens.
    """
    root: _Node = {}
    for token_id, token in enumerate(tokens):
        node = root
        for byte in token:
            child = node.get(byte)
            node = node.setdefault(byte, {}) if child is None else child
        node[_MISMATCH] = ((token_id,), root)
    del root[_MISMATCH]  # the empty token 0; every byte is a token, so the root always has a child
    queue = list(root.values())
    for node in queue:  # grows while it is read: breadth first, so links to shorter paths are ready
        for byte, child in node.items():
            if byte == _MISMATCH:
                continue
            if _MISMATCH not in child:
                child[_MISMATCH] = _mismatch_after(node, byte)
            queue.append(child)
    return root


def _mismatch_after(node: _Node, byte: int) -> tuple[tuple[int, ...], _Node]:
    """What a child that is no token does on a mismatch: as its parent, then goes on with `byte`."""
    ids, rest = node[_MISMATCH]
    while byte not in rest:
        more, rest = rest[_MISMATCH]
        ids += more
    return ids, rest[byte]
