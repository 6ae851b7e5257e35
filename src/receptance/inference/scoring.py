"""How well a model predicts text: log-likelihoods and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from receptance.data.batches import Batch
from receptance.engine.base import Engine
from receptance.model import Model
from receptance.model.inputs import check_ids
from receptance.state import State

# Rows are pieces of one long text, read side by side with their states carried along.
_ROWS = 16
_CHUNK = 256
# Positions whose logits are in memory at once.
_HEAD_CHUNK = 512
# What torch's cross entropy passes over.
_IGNORED = -100


def text_rows(tokens: np.ndarray | Tensor, *, start: int = 0) -> Batch:
    """A long text [N] as a few long rows, each from nothing but the token `start`: Batch of [R,T].

    Padding is masked.
    """
    stream = torch.as_tensor(np.asarray(tokens).astype(np.int64))
    rows = max(1, min(_ROWS, len(stream) // (4 * _CHUNK)))
    length = -(-len(stream) // rows)
    counted = torch.ones(len(stream), dtype=torch.bool)
    padding = (0, rows * length - len(stream))
    targets = F.pad(stream, padding).view(rows, length)
    inputs = F.pad(targets, (1, 0), value=start)[:, :-1]
    return Batch(inputs, targets, F.pad(counted, padding).view(rows, length))


@torch.no_grad()
def negative_log_likelihood(
    engine: Engine,
    tokens: np.ndarray | Tensor,
    *,
    start: int = 0,
    dtype: torch.dtype | None = None,
) -> float:
    """Total, in nats, of a text's tokens [N], each predicted from all before it.

    The text is cut into a few long pieces that are read side by side; each begins from nothing
    but the token `start`, so the figure is at most a little worse than that of one piece. dtype
    is that of a `Model`'s activations; a model in training mode is scored without dropout.
    ValueError for a token that the model does not know.
    """
    whole, state, total = text_rows(tokens, start=start), None, 0.0
    check_ids(whole.targets, engine.config.vocab_size)
    with _evaluating(engine, dtype) as features:
        for at in range(0, whole.inputs.shape[1], _CHUNK):
            piece = whole.part(time=slice(at, at + _CHUNK)).to(engine.device)
            x, state = features(piece.inputs, state)
            assert piece.mask is not None
            counted = piece.targets.masked_fill(~piece.mask, _IGNORED)
            total += _total_loss(engine, x.flatten(0, 1), counted.flatten())
    return total


@contextmanager
def _evaluating(
    engine: Engine, dtype: torch.dtype | None
) -> Iterator[Callable[[Tensor, State | None], tuple[Tensor, State]]]:
    """The engine's `features`, without dropout if it is a model."""
    if not isinstance(engine, Model):
        if dtype is not None:
            raise ValueError(f"dtype is {dtype}; only a Model takes one, this engine has its own")
        yield engine.features
        return
    training = engine.training
    engine.eval()
    try:
        yield partial(engine.features, dtype=dtype)
    finally:
        engine.train(training)


def _total_loss(engine: Engine, features: Tensor, targets: Tensor) -> float:
    """Nats of the targets [N] that are counted: the head a few positions at a time."""
    pieces = zip(features.split(_HEAD_CHUNK), targets.split(_HEAD_CHUNK), strict=True)
    losses = (
        F.cross_entropy(engine.head(x).float(), wanted, reduction="sum") for x, wanted in pieces
    )
    return sum(float(loss) for loss in losses)


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Nats over a whole text, in bits per byte of it: comparable across tokenizers."""
    if num_bytes < 1:
        raise ValueError("bits per byte of an empty text")
    return nats / math.log(2) / num_bytes


def unigram_entropy(text: bytes) -> float:
    """Bits per byte of a code that knows only how often each byte occurs."""
    counts = np.bincount(np.frombuffer(text, np.uint8), minlength=256)
    shares = counts[counts > 0] / len(text)
    return float(-(shares * np.log2(shares)).sum())
