"""Token arrays in many files become a corpus folder."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from receptance.data.batches import document_lengths
from receptance.data.binidx import binidx_writer, read_binidx, stem_of, unclosed
from receptance.data.files import check_seed, choose
from receptance.data.ondisk import Append, blocks, map_npy, npy_writer, token_dtype
from receptance.data.tokens import TokenFiles, check_ids, close_folder, is_corpus
from receptance.tokenizer import Tokenizer


@dataclass(frozen=True)
class Shard:
    """Some documents, one after another, each ended by the end-of-text token."""

    part: str
    """train, validation, or drawn: some of its documents are drawn for validation."""
    load: Callable[[], tuple[np.ndarray, np.ndarray | None]]
    """Maps tokens [N] and mask [N], or None, when it is called: a corpus may have more shards than
    can be mapped at a time."""
    unclosed: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """[K] int64: the ends of documents that lack the end-of-text token; only without a mask."""


@dataclass(frozen=True, kw_only=True)
class Division:
    """How shards become a corpus."""

    end_of_text: int
    vocab_size: int
    masked: bool
    validation: float
    seed: int
    layout: str = "npy"


class _Output:
    """One half of a corpus that is being written."""

    def __init__(self, stack: ExitStack, folder: Path, name: str, how: Division) -> None:
        dtype = token_dtype(how.vocab_size)
        if how.layout == "binidx":
            writer = binidx_writer(folder / name, dtype, how.end_of_text)
        else:
            writer = npy_writer(folder / f"{name}.npy", dtype)
        self.append: Append = stack.enter_context(writer)
        self.append_mask: Append | None = None
        if how.masked:
            mask = npy_writer(folder / f"{name}_mask.npy", np.dtype(np.uint8))
            self.append_mask = stack.enter_context(mask)
        self.how, self.documents, self.tokens = how, 0, 0

    def add(self, tokens: np.ndarray, mask: np.ndarray | None, unclosed: np.ndarray) -> None:
        """Add tokens [N], their mask [N] if any, and an end of text at each of unclosed [K]."""
        masks = () if mask is None else blocks(mask)
        closed = _closed(tokens, unclosed, self.how.end_of_text)
        for block, learned in itertools.zip_longest(closed, masks):
            check_ids(block, self.how.vocab_size)
            self._add_block(block, learned)

    def close_document(self) -> None:
        """Add an end of text that is missing; with a mask it is not to be learned."""
        self._add_block(np.array([self.how.end_of_text]), np.zeros(1, np.uint8))

    def _add_block(self, block: np.ndarray, mask: np.ndarray | None) -> None:
        self.append(block)
        self.documents += int(np.count_nonzero(block == self.how.end_of_text))
        self.tokens += len(block)
        if self.append_mask is not None:
            self.append_mask(np.ones(len(block), np.uint8) if mask is None else mask)


def assemble(
    folder: Path,
    shards: Sequence[Shard],
    how: Division,
    tokenizer: Tokenizer | None,
    about: Mapping[str, Any],
) -> TokenFiles:
    """Write a corpus folder from shards in their order; memory does not grow with their size.

    Of the drawn shards, whole documents are taken for validation while they fit the share, or the
    end of the longest is cut off (see files.choose).
    """
    drawn = _draw([s for s in shards if s.part == "drawn"], how)
    with ExitStack() as stack:
        outputs = {name: _Output(stack, folder, name, how) for name in ("train", "validation")}
        for shard in shards:
            tokens, mask = shard.load()
            spans = next(drawn) if shard.part == "drawn" else [(shard.part, 0, len(tokens))]
            for name, begin, end in spans:
                output = outputs[name]
                first, last = np.searchsorted(shard.unclosed, (begin + 1, end))
                learned = None if mask is None else mask[begin:end]
                output.add(tokens[begin:end], learned, shard.unclosed[first:last] - begin)
                if shard.part == "drawn" and tokens[end - 1] != how.end_of_text:
                    output.close_document()
        if not outputs["train"].tokens:
            raise ValueError("the text is empty: no document was left to train on")
    about = {
        "layout": how.layout,
        "masked": how.masked,
        "documents": {name: output.documents for name, output in outputs.items()},
        **about,
    }
    return close_folder(folder, tokenizer, how.end_of_text, about)


def _closed(tokens: np.ndarray, ends: np.ndarray, end_of_text: int) -> Iterator[np.ndarray]:
    """Yield tokens [N] in blocks, with an end of text added at each of the ends [K] < N."""
    dtype, at = np.result_type(tokens.dtype, np.min_scalar_type(end_of_text)), 0
    for block in blocks(tokens):
        first, last = np.searchsorted(ends, (at, at + len(block)))
        places = ends[first:last] - at
        at += len(block)
        yield np.insert(block.astype(dtype), places, end_of_text) if len(places) else block


_Span = tuple[str, int, int]


def _draw(shards: Sequence[Shard], how: Division) -> Iterator[list[_Span]]:
    """Yield, for each shard, runs of its documents: the part they belong to, begin and end."""
    ends = [
        np.union1d(document_ends(shard.load()[0], how.end_of_text), shard.unclosed)
        for shard in shards
    ]
    sizes = np.concatenate([np.zeros(0, np.int64), *(np.diff(e, prepend=0) for e in ends)])
    chosen, cut = choose(sizes, how.validation, how.seed)
    held = np.zeros(len(sizes), bool)
    held[chosen] = True
    first = 0
    for inside in ends:
        stop = first + len(inside)
        flags = held[first:stop]
        if cut is not None and first <= cut[0] < stop and cut[1] < sizes[cut[0]]:
            number = cut[0] - first
            inside = np.insert(inside, number, inside[number] - sizes[cut[0]] + cut[1])
            flags = np.insert(flags, number + 1, True)
        first = stop
        yield _runs(inside, flags)


def _runs(ends: np.ndarray, flags: np.ndarray) -> list[_Span]:
    """Put neighboring documents of the same part together."""
    if not len(ends):
        return []
    last = np.append(np.flatnonzero(flags[1:] != flags[:-1]), len(flags) - 1)
    stops = ends[last].tolist()
    names = ["validation" if flag else "train" for flag in flags[last]]
    return list(zip(names, [0, *stops[:-1]], stops, strict=True))


def document_ends(tokens: np.ndarray, end_of_text: int) -> np.ndarray:
    """[documents] int64: after each end-of-text token, and at the end of the array."""
    return np.cumsum(document_lengths(tokens, end_of_text))


def merge(
    paths: Sequence[Path],
    folder: Path,
    tokenizer: Tokenizer,
    *,
    validation: float = 0.01,
    seed: int = 0,
    layout: str = "npy",
) -> TokenFiles:
    """Make one corpus folder of token files: .npy, .bin/.idx pairs, corpus folders.

    Folders that are no corpus stand for the .npy and .idx files in them. What corpus folders keep
    for validation stays there; of the others, documents are drawn. ValueError if the tokens cannot
    be of this tokenizer, or the folder already holds something.
    """
    check_seed(seed)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder; choose another")
    shards = [shard for path in paths for shard in _shards(path, tokenizer)]
    masked = any(shard.load()[1] is not None for shard in shards)
    how = Division(
        end_of_text=tokenizer.end_of_text,
        vocab_size=tokenizer.vocab_size,
        masked=masked,
        validation=validation,
        seed=seed,
        layout=layout,
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return assemble(folder, shards, how, tokenizer, {"sources": [str(p) for p in paths]})
    except OSError as error:
        raise ValueError(f"cannot write {folder}: {error}") from error


def _shards(path: Path, tokenizer: Tokenizer) -> Iterator[Shard]:
    if path.is_dir() and not is_corpus(path):
        inside = sorted(p for p in path.iterdir() if p.suffix in (".npy", ".idx"))
        if not inside:
            raise ValueError(f"{path}: no corpus, and no .npy or .idx file in it")
        for file in inside:
            yield from _shards(file, tokenizer)
    elif path.is_dir():
        corpus = TokenFiles.open(path)
        if corpus.tokenizer and not corpus.tokenizer.same_as(tokenizer):
            raise ValueError(f"{path} was made with another tokenizer, a {corpus.tokenizer.kind}")
        yield Shard("train", lambda: (corpus.train, corpus.train_mask))
        yield Shard("validation", lambda: (corpus.validation, corpus.validation_mask))
    elif stem_of(path) is not None and path.suffix != ".npy":
        open_ends = unclosed(read_binidx(path), tokenizer.end_of_text)
        yield Shard("drawn", lambda: (read_binidx(path).tokens, None), open_ends)
    else:
        yield Shard("drawn", lambda: (map_npy(path), None))
