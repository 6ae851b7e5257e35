"""Errors that end a training, in one line each."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def training_errors() -> Iterator[None]:
    """Turn RuntimeErrors about memory or lost processes into ValueErrors of one line."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).splitlines()[0]
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
            raise ValueError(
                f"out of memory ({text}); take a smaller --micro-batch or --chunk, or --recompute"
            ) from None
        if torch.distributed.is_torchelastic_launched() and re.search(
            "gloo|nccl|connection", text, re.I
        ):
            raise ValueError("another process of this job has gone; see what it said") from None
        raise
