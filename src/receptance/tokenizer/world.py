"""The vocabulary of the World models: greedy longest match over bytes."""

from __future__ import annotations

import ast
import gc
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from receptance.tokenizer.base import LARGEST_ID, Tokenizer, to_bytes
from receptance.tokenizer.files import WORLD_FILE

# A trie node maps a byte to a node, and _MISMATCH to what to do when no child fits: the ids that
# are then certain, and the node for the bytes they do not cover.
_Node = dict[int, Any]
_MISMATCH = -1
# The groups are the id, the literal, the text in it if it has no escapes, and the length.
_LINE = re.compile(r"(\d+) ('([^'\\\r\0]*)'|.+) (\d+)\s*")


class WorldTokenizer(Tokenizer):
    """The vocabulary of the World models, cut by greedy longest match.

    Token 0 ends a text and stands for no bytes. The ids are those of `TRIE_TOKENIZER` of the `rwkv`
    package. Ids that a file leaves out, or gives an empty text, stand for no bytes either: no text
    encodes to them, and they decode to nothing.
    """

    kind = "world"

    def __init__(self, content: bytes, name: str = WORLD_FILE) -> None:
        """From a vocabulary file's bytes; ValueError says what is wrong with it and in which line.

        Each line is `id literal length`: an id larger than that of the line before, a Python str or
        bytes literal, and the number of its bytes.
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
        return self._save_as(directory, WORLD_FILE)

    def _rules(self) -> object:
        last = max(token_id for token_id, token in enumerate(self._tokens) if token)
        return self._tokens[: last + 1]

    def __reduce__(self) -> tuple[type[WorldTokenizer], tuple[bytes]]:
        # Pickling for a worker process would follow the automaton's links beyond any stack.
        return WorldTokenizer, (self._content,)


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Turn Python's search for dead objects off while a hundred thousand live ones are made."""
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
            token_id, token = _parse_line(line, len(tokens) - 1)
            if token in seen:
                raise ValueError(f"{token!r} is there twice; each token needs one id")
        except ValueError as error:
            raise ValueError(f"{name}, line {number}: {error}") from None
        if token:
            seen.add(token)
        tokens += [b""] * (token_id - len(tokens))
        tokens.append(token)
    missing = [value for value in range(256) if bytes([value]) not in seen]
    if missing:
        raise ValueError(
            f"{name}: {len(missing)} of the 256 single bytes are missing, the first is "
            f"{bytes(missing[:1])!r}; without them some texts could not be encoded"
        )
    return tokens


def _parse_line(line: bytes, previous_id: int) -> tuple[int, bytes]:
    """The id and the token of a line that comes after the line of another id."""
    fields = _LINE.fullmatch(line.decode("utf-8"))
    if fields is None:
        raise ValueError(f"{line[:60]!r} is not `id literal length`, like `33 ' ' 1`")
    token_id, literal, length = int(fields[1]), fields[2], int(fields[4])
    if not previous_id < token_id <= LARGEST_ID:
        raise ValueError(
            f"id {token_id} follows {previous_id}; ids must increase, up to {LARGEST_ID} at most"
        )
    try:
        # Most literals are text between quotes; compiling those, too, would take most of the time.
        token = fields[3] if fields[3] is not None else ast.literal_eval(literal)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        token = None
    if isinstance(token, str):
        token = token.encode("utf-8")
    if not isinstance(token, bytes):
        raise ValueError(f"{literal[:60]} is not a str or bytes literal")
    if len(token) != length:
        raise ValueError(f"{literal[:60]} has {len(token)} bytes where the line says {length}")
    return token_id, token


def _build_automaton(tokens: Sequence[bytes]) -> _Node:
    """The trie of the tokens, with what Song et al. (arXiv 2012.15524) call failure links.

    Longest match on a plain trie walks on after the last whole token and, when that leads nowhere,
    reads those bytes again. What it would find in them is known beforehand, so it is stored in the
    node: each byte of a text is read once, however long or unlucky the tokens.
    """
    root: _Node = {}
    for token_id, token in enumerate(tokens):
        if not token:
            continue
        node = root
        for byte in token:
            child = node.get(byte)
            node = node.setdefault(byte, {}) if child is None else child
        node[_MISMATCH] = ((token_id,), root)
    # Every single byte is a token, so the root has a child for each and needs no link itself.
    queue = list(root.values())
    # The queue grows while it is read. The order is breadth first, so that the links of shorter
    # paths are ready when longer ones need them.
    for node in queue:
        for byte, child in node.items():
            if byte == _MISMATCH:
                continue
            if _MISMATCH not in child:
                child[_MISMATCH] = _mismatch_after(node, byte)
            queue.append(child)
    return root


def _mismatch_after(node: _Node, byte: int) -> tuple[tuple[int, ...], _Node]:
    """The link of a child that is no token: that of its parent, followed on by `byte`."""
    ids, rest = node[_MISMATCH]
    while byte not in rest:
        more, rest = rest[_MISMATCH]
        ids += more
    return ids, rest[byte]
