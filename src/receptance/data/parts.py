"""The tokens of one piece of work on disk, which are there whole or not at all.

Work that was stopped goes on with the pieces whose parts are missing.

A part is NUMBER.tokens (the ids, raw), NUMBER.mask (a byte per token, when there are examples) and
NUMBER.json, which is written last and vouches for the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from receptance.atomic import written


@dataclass(frozen=True)
class PartReport:
    """What became of a piece of work."""

    index: int
    part: str
    """train, validation or drawn; see sources.Piece."""
    num_tokens: int
    text_bytes: int
    masked: bool
    """Whether some of the tokens are not to be learned."""
    stream: str = ""
    """The name of the stream that the piece is from, if it is from one."""
    rows: int = 0
    """The number of records that were taken from the stream."""
    skipped: int = 0
    """The number of records that could not be used."""
    first_skipped: str = ""
    ranges_left_out: int = 0
    """The number of ranges of files that were not read, because the files are no text."""


class Part:
    """A part that is being written, by one process."""

    def __init__(
        self, tokens: BinaryIO, open_mask: Callable[[], BinaryIO], dtype: np.dtype
    ) -> None:
        self._tokens, self._open_mask, self._dtype = tokens, open_mask, dtype
        self._mask: BinaryIO | None = None
        self.num_tokens = self.text_bytes = 0

    @property
    def masked(self) -> bool:
        """Whether any mask was given."""
        return self._mask is not None

    def add(self, ids: Sequence[int], mask: Sequence[int] | None = None) -> None:
        """Append ids, and a mask that says which are to be learned; None means that all are."""
        if mask is not None and self._mask is None:
            self._mask = self._open_mask()
            self._mask.write(b"\1" * self.num_tokens)
        self._tokens.write(np.array(ids, self._dtype).tobytes())
        if self._mask is not None:
            self._mask.write(b"\1" * len(ids) if mask is None else bytes(mask))
        self.num_tokens += len(ids)


@contextmanager
def part_writer(folder: Path, index: int, dtype: np.dtype) -> Iterator[Part]:
    """Write the tokens and the mask of a part, which counts only after `vouch`."""
    with ExitStack() as stack:
        tokens = stack.enter_context(written(_file(folder, index, "tokens")))
        mask = written(_file(folder, index, "mask"))
        yield Part(tokens, lambda: stack.enter_context(mask), dtype)


def finished_parts(folder: Path) -> bool:
    """Whether any part in the folder is finished."""
    return any(folder.glob("[0-9]*.json"))


def vouch(folder: Path, report: PartReport) -> None:
    """Write the report that says that a part is whole."""
    with written(_file(folder, report.index, "json")) as file:
        file.write(json.dumps(asdict(report)).encode())


def finished_part(folder: Path, index: int, dtype: np.dtype) -> PartReport | None:
    """The report of a part that is whole on disk, else None."""
    try:
        report = PartReport(**json.loads(_file(folder, index, "json").read_bytes()))
        sizes = {"tokens": report.num_tokens * dtype.itemsize}
        sizes |= {"mask": report.num_tokens} if report.masked else {}
        whole = all(_file(folder, index, n).stat().st_size == size for n, size in sizes.items())
    except (OSError, ValueError, TypeError):
        return None
    return report if whole else None


def map_part(
    folder: Path, report: PartReport, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray | None]:
    """Map the tokens of a part, and its mask if it has one."""
    tokens = _map(_file(folder, report.index, "tokens"), dtype)
    return tokens, _map(_file(folder, report.index, "mask"), np.uint8) if report.masked else None


def _map(file: Path, dtype: np.typing.DTypeLike) -> np.ndarray:
    return np.memmap(file, dtype, "r") if file.stat().st_size else np.zeros(0, dtype)


def _file(folder: Path, index: int, name: str) -> Path:
    return folder / f"{index:08d}.{name}"
