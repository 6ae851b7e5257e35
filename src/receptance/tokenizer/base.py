"""What every tokenizer is: a table of bytes, a way to cut text, a decoder for streams."""

from __future__ import annotations

import codecs
import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

LARGEST_ID = 1 << 22
"""The largest id that is believed; a damaged or hostile file must not ask for a huge table."""


class Tokenizer(ABC):
    """A table of the bytes each id stands for, and a way to cut text into those ids."""

    kind: ClassVar[str]
    """One of "bytes", "world" and "bpe"."""
    end_of_text: int = 0
    """The id that separates documents and ends a generation."""

    def __init__(self, tokens: Sequence[bytes], content: bytes, choices: bytes = b"") -> None:
        """The fingerprint is taken from `content`, the file that defines this tokenizer, and from
        `choices`, which stands for what the caller decided where the file leaves it open.
        """
        self._tokens = tokens
        self._content = content
        self._choices = choices

    @property
    def vocab_size(self) -> int:
        """The number of ids that decode. An embedding may have more rows, as padding."""
        return len(self._tokens)

    @property
    def content(self) -> bytes:
        """The bytes of the file that defines this tokenizer."""
        return self._content

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the kind, of the defining file's bytes and of the choices, in hexadecimal.

        It identifies a stored file. Whether two files define one tokenizer, `same_as` tells.
        """
        return hashlib.sha256(self.kind.encode() + self._content + self._choices).hexdigest()

    def same_as(self, other: Tokenizer) -> bool:
        """Whether both give every text the same ids, however the files that define them look."""
        if self.kind != other.kind:
            return False
        return self.fingerprint == other.fingerprint or self._rules() == other._rules()

    def _rules(self) -> object:
        """All that decides which ids a text gets, without the layout of the defining file."""
        return self.end_of_text, self._tokens

    @abstractmethod
    def encode(self, text: str | bytes) -> list[int]:
        """The ids of a text. Nothing is added before or after; the bytes need not be UTF-8."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes the ids stand for, special tokens included.

        ValueError for an id outside 0 ... vocab_size - 1. An embedding may have rows for such ids,
        as padding (World: 65530 ... 65535); they mean nothing, so a sampler has to mask them.
        """
        pieces, size = [], self.vocab_size
        for token_id in ids:
            if not 0 <= token_id < size:
                raise ValueError(
                    f"token id {int(token_id)} has no text; "
                    f"the ids of this {self.kind} tokenizer are 0 to {size - 1}"
                )
            pieces.append(self._tokens[token_id])
        return b"".join(pieces)

    def decode(self, ids: Iterable[int]) -> str:
        """`decode_bytes` as text, each broken piece of UTF-8 as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def stream(self) -> StreamDecoder:
        """A decoder for ids that come one at a time."""
        return StreamDecoder(self)

    @abstractmethod
    def save(self, directory: Path) -> list[str]:
        """Write what `load_tokenizer(directory)` needs, and return the names of the files written.

        The first of them is the one to load.
        """

    def _save_as(self, directory: Path, name: str) -> list[str]:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(self._content)
        return [name]


class StreamDecoder:
    """A decoder for one id at a time: all pushes and the flush, joined, are `decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that is now certain; the start of an unfinished character is held back."""
        return self._utf8.decode(self._tokenizer.decode_bytes([token_id]))

    def flush(self) -> str:
        """The bytes of an unfinished character as U+FFFD; the decoder can then take new text."""
        return self._utf8.decode(b"", final=True)


def to_bytes(text: str | bytes) -> bytes:
    """A str as UTF-8, lone surrogates included; bytes as they are."""
    if isinstance(text, bytes):
        return text
    return text.encode("utf-8", errors="surrogatepass")


class ByteTokenizer(Tokenizer):
    """Each byte is its own id. Token 0, the NUL byte, is also the end of text."""

    kind = "bytes"

    def __init__(self) -> None:
        super().__init__([bytes([value]) for value in range(256)], b"bytes")

    def encode(self, text: str | bytes) -> list[int]:
        return list(to_bytes(text))

    def save(self, directory: Path) -> list[str]:
        """Write nothing: the caller has to keep `kind`, since the directory will not tell."""
        return []
