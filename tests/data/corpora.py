"""Corpora of little text, made and taken apart again."""

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from receptance.data import PrepareOptions, TokenFiles, prepare
from receptance.tokenizer import Tokenizer

LINES = [{"text": f"Dokument {n} ü"} for n in range(50)]

# The module, which the function of the same name hides.
prepare_module = sys.modules[prepare.__module__]


def run(*names: object, out: Path, tokenizer: Tokenizer | str = "bytes", **options) -> TokenFiles:
    how = PrepareOptions(**{"workers": 0, "validation": 0.1} | options)
    return prepare([str(n) for n in names], out, tokenizer, how, Console(file=io.StringIO()))


def documents(tokens: np.ndarray) -> list[str]:
    """The documents of a stream of bytes."""
    assert len(tokens) == 0 or tokens[-1] == 0
    return bytes(tokens.astype(np.uint8)).decode().split("\0")[:-1]


def tokenized(texts: Sequence[bytes], tokenizer: Tokenizer) -> list[int]:
    """What a corpus of whole documents has to hold."""
    return [id for text in texts for id in (*tokenizer.encode(text), tokenizer.end_of_text)]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def write_lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    return path


class Stop(Exception):
    """An interruption."""
