"""A step for datatrove, which spreads work on a corpus over the machines of a cluster."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

try:
    from datatrove.pipeline.base import PipelineStep
except ImportError:
    raise ImportError("this module needs datatrove: pip install datatrove") from None
from receptance.data.ondisk import npy_writer, token_dtype
from receptance.tokenizer import load_tokenizer


class TokenShards(PipelineStep):
    """Write the documents of each task as tokens to folder/RANK.npy, for `receptance data merge`.

    tokenizer is what `load_tokenizer` takes; every machine has to find it, and the folder, under
    the same path. Documents are passed on to the next step. A task that is stopped leaves no shard.
    """

    name = "Receptance tokens"
    type = "🔢 - TOKENIZER"

    def __init__(self, folder: str | Path, tokenizer: str) -> None:
        super().__init__()
        self.folder, self.tokenizer = Path(folder), tokenizer

    def run(self, data: Iterable[Any] | None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Tokenize the documents of one task; datatrove calls this."""
        tokenizer = load_tokenizer(self.tokenizer)
        dtype = token_dtype(tokenizer.vocab_size)
        self.folder.mkdir(parents=True, exist_ok=True)
        with npy_writer(self.folder / f"{rank:05d}.npy", dtype) as append:
            for document in data or ():
                with self.track_time():
                    ids = tokenizer.encode(document.text)
                    if ids:
                        append(np.array([*ids, tokenizer.end_of_text]))
                self.stat_update("tokens", value=len(ids))
                yield document
