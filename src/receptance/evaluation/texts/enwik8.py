"""The enwik8 protocol: the first 100 million bytes of a Wikipedia dump, in bits per character."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from receptance.evaluation.texts.documents import Document, encoded
from receptance.tokenizer import Tokenizer

Split = Literal["train", "validation", "test"]

SIZES: dict[Split, int] = {"train": 90_000_000, "validation": 5_000_000, "test": 5_000_000}
"""The bytes of each split, in the order of the file."""

# Table 5 of arXiv 2305.13048v2, with contexts of 1024 characters: layers, width, bits per character
# of the training and of the test split.
TABLE_5: dict[str, tuple[int, int, float, float | None]] = {
    "Transformer, 12 layers": (12, 512, 0.977, 1.137),
    "Transformer, 24 layers": (24, 256, 1.039, 1.130),
    "Reformer": (12, 512, 1.040, 1.195),
    "Synthesizer": (12, 512, 0.994, 1.298),
    "Linear Transformer": (12, 512, 0.981, 1.207),
    "Performer": (12, 512, 1.002, 1.199),
    "AFT-simple": (12, 512, 1.046, 1.209),
    "RWKV, 6 layers": (6, 512, 0.720, None),
    "RWKV, 12 layers": (12, 512, 1.010, 1.178),
}

NOTE = (
    "A character of enwik8 is a byte. Table 5 of the paper has contexts of 1,024 characters, which "
    "are windows; with carried state every character has all of its split before it."
)

_BLOCK = 1 << 20


def check(path: Path, sizes: dict[Split, int] = SIZES) -> None:
    """ValueError unless there is a file with the size of enwik8."""
    wanted = sum(sizes.values())
    if not path.is_file():
        raise ValueError(f"no file {path}; enwik8 is read from a local file")
    if (found := path.stat().st_size) != wanted:
        raise ValueError(
            f"{path} has {found:,} bytes and enwik8 has {wanted:,}; unpack enwik8.zip, or give "
            "another file with text="
        )


def read_split(
    path: Path, split: Split, tokenizer: Tokenizer, sizes: dict[Split, int] = SIZES
) -> Document:
    """A split of the file as one document. ValueError unless the file has the size of enwik8."""
    check(path, sizes)
    names = list(sizes)
    begin = sum(sizes[name] for name in names[: names.index(split)])
    # A split may begin and end inside of a character of UTF-8.
    document = encoded(0, _blocks(path, begin, sizes[split]), tokenizer, strict=False)
    assert document is not None
    return document


def _blocks(path: Path, begin: int, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(begin)
        while size:
            block = file.read(min(size, _BLOCK))
            if not block:
                raise ValueError(f"{path} became shorter while it was read")
            size -= len(block)
            yield block


def published(split: Split) -> dict[str, float]:
    """What Table 5 prints for a split, by method; nothing for validation."""
    column = {"train": 2, "test": 3}.get(split)
    if column is None:
        return {}
    found = {name: row[column] for name, row in TABLE_5.items()}
    return {name: float(value) for name, value in found.items() if value is not None}
