"""Text to tokens on disk, and the order in which training reads them.

The order is a pure function of (seed, epoch, step): nothing of it needs to be saved, and a run
that was stopped continues with the very next batch.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from receptance.tokenizer import Tokenizer

# As many bytes at the front of a file decide whether it is text; git uses the same test.
_SNIFFED_BYTES = 8000


def find_files(sources: Sequence[str], exclude: Sequence[str] = ()) -> list[Path]:
    """The files behind paths, folders (all text files below) and globs, sorted, each once.

    exclude drops files with a path component that matches one of its patterns. Hidden files and
    binary ones (a zero byte near the front) are left out unless named as a path of their own.
    ValueError names a source that matches nothing.
    """
    found: dict[str, Path] = {}  # by real path
    for source in sources:
        path = Path(source).expanduser()
        if path.is_file():
            found.setdefault(os.path.realpath(path), path)
            continue
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file())
            root = path
        else:
            root = _literal_part(path)
            inside = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
        texts = [p for p in inside if p.is_file() and _wanted(p, root, exclude) and _is_text(p)]
        if not texts:
            what = "no text files in folder" if path.is_dir() else "no such file, folder or match:"
            raise ValueError(f"{what} {source}")
        for text in texts:
            found.setdefault(os.path.realpath(text), text)
    return list(found.values())


def _literal_part(pattern: Path) -> Path:
    """The folders of a glob before the first component with a wildcard."""
    parts = pattern.parts
    first = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return Path(*parts[:first])


def _wanted(path: Path, root: Path, exclude: Sequence[str]) -> bool:
    parts = path.relative_to(root).parts if path.is_relative_to(root) else path.parts
    hidden = any(p.startswith(".") and p not in (".", "..") for p in parts)
    return not hidden and not any(fnmatch.fnmatch(p, e) for p in parts for e in exclude)


def _is_text(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return b"\0" not in file.read(_SNIFFED_BYTES)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def read_documents(files: Sequence[Path]) -> list[bytes]:
    """The non-empty contents of the files; ValueError if there is nothing to read."""
    documents = []
    for file in files:
        try:
            documents.append(file.read_bytes())
        except OSError as error:
            raise ValueError(f"cannot read {file}: {error.strerror}") from None
    documents = [d for d in documents if d]
    if not documents:
        names = ", ".join(str(f) for f in files[:3])
        raise ValueError(f"the text is empty: {names}; give a file with something in it")
    return documents


def split(
    documents: Sequence[bytes], validation_share: float, seed: int
) -> tuple[list[bytes], list[bytes]]:
    """Training and validation documents: whole ones drawn at random while they fit the share.

    When they are too few or too long for half of it, the end of the longest remaining one is cut
    off as well.
    """
    if not 0 < validation_share < 1:
        raise ValueError(f"validation share is {validation_share}; it must lie between 0 and 1")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(documents), generator=generator).tolist()
    wanted = validation_share * sum(map(len, documents))
    chosen: set[int] = set()
    size = 0
    for i in order:
        if size + len(documents[i]) <= wanted:
            chosen.add(i)
            size += len(documents[i])
    training = [d for i, d in enumerate(documents) if i not in chosen]
    validation = [documents[i] for i in order if i in chosen]
    if size < wanted / 2:
        longest = max(range(len(training)), key=lambda i: len(training[i]))
        training[longest], end = _cut(training[longest], wanted - size)
        validation.append(end)
    return training, validation


def _cut(text: bytes, end_bytes: float) -> tuple[bytes, bytes]:
    """A text and its end of about that length, between two lines if there are enough."""
    cut = max(1, round(len(text) - end_bytes))
    line = text.rfind(b"\n", 0, cut) + 1
    cut = line if line > cut // 2 else cut
    return text[:cut], text[cut:]


def tokenize(
    documents: Sequence[bytes],
    tokenizer: Tokenizer,
    progress: Callable[[int], None] = lambda done_bytes: None,
) -> np.ndarray:
    """All documents' tokens, one end-of-text token after each: [N] uint16, or uint32 if needed."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    pieces = []
    for document in documents:
        pieces.append(np.array([*tokenizer.encode(document), tokenizer.end_of_text], dtype=dtype))
        progress(len(document))
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype)


@dataclass(frozen=True)
class TokenFiles:
    """A tokenized corpus in a folder: train.npy, validation.npy, and what they are."""

    train: np.ndarray
    validation: np.ndarray
    validation_bytes: int
    """Bytes of text behind the validation tokens, for bits per byte."""
    fingerprint: str

    @classmethod
    def write(
        cls,
        folder: Path,
        train: np.ndarray,
        validation: np.ndarray,
        validation_text: bytes,
        tokenizer: Tokenizer,
    ) -> TokenFiles:
        """Store a corpus; the folder may exist. validation_text is kept for comparisons."""
        digest = hashlib.sha256(tokenizer.fingerprint.encode())
        for tokens in (train, validation):
            digest.update(tokens.tobytes())
        about = {"validation_bytes": len(validation_text), "fingerprint": digest.hexdigest()}
        partial = folder / "data.json.partial"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            np.save(folder / "train.npy", train)
            np.save(folder / "validation.npy", validation)
            (folder / "validation.txt").write_bytes(validation_text)
            partial.write_text(json.dumps(about))
            os.replace(partial, folder / "data.json")  # last: it vouches for the other files
        except OSError as error:  # numpy's says how many bytes were written, but not where
            raise ValueError(f"cannot write the tokens to {folder}: {error}") from error
        return cls(train, validation, len(validation_text), digest.hexdigest())

    @classmethod
    def open(cls, folder: Path) -> TokenFiles:
        """Map what `write` stored; ValueError if it is missing or damaged."""
        try:
            about = json.loads((folder / "data.json").read_text())
            train, validation = (
                np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("train", "validation")
            )
            return cls(train, validation, about["validation_bytes"], about["fingerprint"])
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise ValueError(f"no readable token files in {folder}: {error}") from None


class Batches:
    """Windows of `context` + 1 tokens, every one exactly once per epoch, in a seeded order."""

    def __init__(self, tokens: np.ndarray, *, context: int, batch: int, seed: int) -> None:
        if len(tokens) <= context:
            raise ValueError(
                f"the text has {len(tokens)} tokens and the context is {context}; "
                "give more text or a shorter --context"
            )
        self.tokens, self.context, self.batch, self.seed = tokens, context, batch, seed
        self.windows = (len(tokens) - 1) // context
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of a step, from 0: inputs and targets, each [batch, context] int64."""
        samples = range(step * self.batch, (step + 1) * self.batch)
        starts = [self._window(sample) * self.context for sample in samples]
        rows = np.stack([self.tokens[s : s + self.context + 1] for s in starts])
        both = torch.from_numpy(rows.astype(np.int64))
        return both[:, :-1], both[:, 1:]

    def epoch(self, step: int) -> int:
        """The epoch in which a step begins."""
        return step * self.batch // self.windows

    def _window(self, sample: int) -> int:
        epoch, index = divmod(sample, self.windows)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = (epoch, torch.randperm(self.windows, generator=generator))
        return int(self._order[1][index])
