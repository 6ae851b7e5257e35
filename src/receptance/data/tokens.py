"""A tokenized corpus: what training reads.

Documents follow each other in one flat array, one end-of-text token after each. A corpus folder
holds

    train.npy, validation.npy            the ids; uint16, or uint32 for a vocabulary above 65,536
    train_mask.npy, validation_mask.npy  if some are not to be learned: a byte per token, 1 = learn
    tokenizer.json or rwkv_vocab.txt     the tokenizer, unless it is plain bytes
    data.json                            what it is, and the fingerprint; written last

With the layout "binidx" the ids are in train.bin and train.idx, validation.bin and validation.idx.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from receptance.atomic import written
from receptance.data.binidx import pair_of, read_binidx, stem_of, unclosed
from receptance.data.files import check_share
from receptance.data.ondisk import blocks, map_npy
from receptance.storage.directories import expanded
from receptance.tokenizer import Tokenizer, stored_tokenizer

FORMAT = "receptance tokens"
FORMAT_VERSION = 1
LAYOUTS = ("npy", "binidx")
_SAMPLES, _SAMPLE_BYTES = 1024, 4096
# This many documents of a pair, at most, are looked at for their last token when it is opened.
_LOOKED_AT = 4096


def fingerprint(arrays: Sequence[np.ndarray], tokenizer: Tokenizer | None) -> str:
    """A sha256, in hexadecimal, that tells one corpus from another and is quick at any size.

    It is taken of the tokenizer's fingerprint and of each array's type, length and content, where
    1024 evenly spaced samples of 4 KiB stand for the content of a longer array.
    """
    digest = hashlib.sha256((tokenizer.fingerprint if tokenizer else "").encode())
    for array in arrays:
        digest.update(f"{array.dtype.str} {len(array)} ".encode())
        size = _SAMPLE_BYTES // array.dtype.itemsize
        starts: Sequence[int] | np.ndarray = range(0, len(array), size)
        if len(starts) > _SAMPLES:
            starts = np.linspace(0, len(array) - size, _SAMPLES).astype(np.int64)
        for start in starts:
            digest.update(array[start : start + size].tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class TokenFiles:
    """A tokenized corpus; arrays of files are mapped, so its size does not matter."""

    train: np.ndarray
    """[N] integers."""
    validation: np.ndarray
    """[M] integers."""
    train_mask: np.ndarray | None
    """[N] uint8, 1 where the token is to be learned; None: every one is."""
    validation_mask: np.ndarray | None
    """[M] uint8, or None."""
    end_of_text: int
    """The id after each document."""
    fingerprint: str
    """The same for the same corpus only."""
    tokenizer: Tokenizer | None
    """None when the files do not say."""
    path: Path
    """The path that `open` takes to find this corpus."""
    closed: bool = True
    """False if a .bin/.idx pair has documents that do not end with end_of_text; of more than 4,096
    documents, a sample is looked at."""

    @classmethod
    def open(
        cls, path: str | Path, *, validation: float = 0.01, end_of_text: int = 0
    ) -> TokenFiles:
        """Map a corpus folder, a bare .npy, or a .bin/.idx pair (named x, x.bin or x.idx).

        A folder says itself what is kept for validation and which id ends a document. Of the other
        two, the last share is used for validation, from the border of a document if there is an
        .idx, and end_of_text is believed. ValueError names what is missing, damaged, or not as it
        was when it was written.
        """
        path = expanded(path)
        if path.is_dir() or not any(file.exists() for file in (path, *pair_of(path))):
            return _open_folder(path)
        check_share(validation)
        if path.suffix == ".npy":
            return _divided(path, map_npy(path), None, validation, end_of_text)
        pair = read_binidx(path)
        corpus = _divided(path, pair.tokens, pair.ends, validation, end_of_text)
        return replace(corpus, closed=not len(unclosed(pair, end_of_text, _LOOKED_AT)))

    def check_documents(self) -> None:
        """ValueError if the corpus is a pair whose documents do not end with end_of_text.

        Training sees no other border than that token, although the .idx may list more of them.
        """
        if not self.closed:
            raise ValueError(
                f"{self.path}: its documents do not end with the end-of-text token "
                f"{self.end_of_text}; put it together again with `receptance data merge`, which "
                "adds it"
            )


def is_corpus(path: str | Path) -> bool:
    """Whether a path names tokens, which `TokenFiles.open` takes, and not text."""
    path = expanded(path)
    if path.is_dir():
        arrays = any((path / name).is_file() for name in ("train.npy", "train.idx"))
        return arrays and (path / "data.json").is_file()
    return path.suffix in (".npy", ".bin", ".idx") or stem_of(path) is not None


def check_ids(tokens: np.ndarray, vocab_size: int) -> None:
    """ValueError if one of the ids [N] is not in a vocabulary of this size; reads all of them."""
    for block in blocks(tokens):
        low, high = int(block.min()), int(block.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"a token id is {low if low < 0 else high} and the vocabulary {vocab_size}; "
                "these tokens are of another tokenizer"
            )


def close_folder(
    folder: Path, tokenizer: Tokenizer | None, end_of_text: int, about: Mapping[str, Any]
) -> TokenFiles:
    """Turn a folder in which the arrays are written into a corpus folder; data.json keeps about."""
    about = {"layout": "npy", "masked": False, **about}
    corpus = _mapped(folder, about["layout"], about["masked"], end_of_text, tokenizer)
    about = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "dtype": corpus.train.dtype.str,
        "tokens": {"train": len(corpus.train), "validation": len(corpus.validation)},
        **about,
        "end_of_text": end_of_text,
        "tokenizer": None if tokenizer is None else store_tokenizer(folder, tokenizer),
        "fingerprint": corpus.fingerprint,
    }
    with written(folder / "data.json") as file:
        file.write(json.dumps(about, indent=1).encode())
    return corpus


def read_about(folder: Path) -> dict[str, Any]:
    """The content of a corpus folder's data.json; ValueError if the file is of another kind."""
    try:
        about = json.loads((folder / "data.json").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"no readable token files in {folder}: {error}") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError(f"no readable token files in {folder}: data.json is of another kind")
    if (version := about.get("format_version")) != FORMAT_VERSION:
        raise ValueError(
            f"no readable token files in {folder}: format version {reprlib.repr(version)}; "
            f"this release reads {FORMAT_VERSION}, so update receptance"
        )
    return about


def _open_folder(folder: Path) -> TokenFiles:
    about = read_about(folder)
    try:
        named = about["tokenizer"]
        tokenizer = None if named is None else stored_tokenizer(folder, named)
        layout, masked, end = about["layout"], about["masked"], about["end_of_text"]
        corpus = _mapped(folder, layout, masked, end, tokenizer)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"no readable token files in {folder}: {error}") from None
    if corpus.fingerprint != about.get("fingerprint"):
        raise ValueError(
            f"no readable token files in {folder}: a file is not the one that was written there; "
            "prepare the corpus again"
        )
    return corpus


def store_tokenizer(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Write a tokenizer's files and return what `stored_tokenizer` needs to know about them."""
    files = tokenizer.save(folder)
    return {"kind": tokenizer.kind, "files": files, "fingerprint": tokenizer.fingerprint}


def _mapped(
    folder: Path, layout: str, masked: bool, end_of_text: int, tokenizer: Tokenizer | None
) -> TokenFiles:
    parts = ("train", "validation")
    if layout == "binidx":
        tokens = [read_binidx(folder / part).tokens for part in parts]
    else:
        tokens = [map_npy(folder / f"{part}.npy") for part in parts]
    masks = [map_npy(folder / f"{part}_mask.npy") for part in parts] if masked else [None, None]
    for part, mask, ids in zip(parts, masks, tokens, strict=True):
        if mask is not None and (mask.dtype != np.uint8 or len(mask) != len(ids)):
            raise ValueError(f"{part}_mask.npy has {len(mask)} {mask.dtype} for {len(ids)} tokens")
    found = fingerprint([*tokens, *(mask for mask in masks if mask is not None)], tokenizer)
    (train, validation), (learn, check) = tokens, masks
    return TokenFiles(train, validation, learn, check, end_of_text, found, tokenizer, folder)


def _divided(
    path: Path, tokens: np.ndarray, ends: np.ndarray | None, validation: float, end_of_text: int
) -> TokenFiles:
    """A corpus of one array, of which about the last share is used for validation."""
    cut = round(len(tokens) * (1 - validation))
    if ends is not None and len(ends):
        inner = ends[(ends > 0) & (ends < len(tokens))]
        cut = int(inner[np.abs(inner - cut).argmin()]) if len(inner) else cut
    found = fingerprint([tokens], None)
    return TokenFiles(tokens[:cut], tokens[cut:], None, None, end_of_text, found, None, path)
