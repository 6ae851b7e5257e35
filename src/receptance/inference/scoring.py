"""How well a model predicts text: log-likelihoods and bits per byte."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from receptance.data.batches import Batch
from receptance.engine.base import Engine
from receptance.inference.reading import check_weights
from receptance.model.inputs import check_ids
from receptance.state import State

# A long text is read as so many rows side by side, by calls of so many positions each.
_ROWS = 16
_CHUNK = 256
# The logits of so many positions are in memory at once.
_HEAD_CHUNK = 512
# Torch's cross entropy leaves out targets with this number.
_IGNORED = -100


def text_rows(tokens: np.ndarray | Tensor, *, start: int = 0) -> Batch:
    """A text's token ids [N] as a few long rows, each after the token `start`: Batch of [R,T].

    The padding behind the last row is masked. ValueError for anything but a list of token ids.
    """
    ids = np.asarray(tokens)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(
            f"a text is scored by its token ids [N]; found {ids.dtype} {list(ids.shape)}, so "
            "encode it with the tokenizer first"
        )
    stream = torch.as_tensor(ids.astype(np.int64))
    rows = max(1, min(_ROWS, len(stream) // (4 * _CHUNK)))
    length = -(-len(stream) // rows)
    counted = torch.ones(len(stream), dtype=torch.bool)
    padding = (0, rows * length - len(stream))
    targets = F.pad(stream, padding).view(rows, length)
    inputs = F.pad(targets, (1, 0), value=start)[:, :-1]
    return Batch(inputs, targets, F.pad(counted, padding).view(rows, length))


@torch.no_grad()
def negative_log_likelihood(
    engine: Engine, tokens: np.ndarray | Tensor, *, start: int = 0
) -> float:
    """The negative log-likelihood of a text's token ids [N] in nats, summed over all of them.

    Each token is predicted from all before it. A long text is cut into a few pieces that are read
    side by side; each begins from nothing but the token `start`, so the figure is at most a little
    worse than that of one piece. A model in training mode is scored without dropout. ValueError for
    a token that the model does not know.
    """
    check_weights(engine)
    state: State | None = None
    whole, total = text_rows(tokens, start=start), 0.0
    check_ids(whole.targets, engine.config.vocab_size)
    with engine.evaluating():
        for at in range(0, whole.inputs.shape[1], _CHUNK):
            piece = whole.part(time=slice(at, at + _CHUNK)).to(engine.device)
            x, state = engine.features(piece.inputs, state)
            assert piece.mask is not None
            counted = piece.targets.masked_fill(~piece.mask, _IGNORED)
            total += _total_loss(engine, x.flatten(0, 1), counted.flatten())
    return total


def _total_loss(engine: Engine, features: Tensor, targets: Tensor) -> float:
    """The sum of the counted targets' losses in nats: features [N,C], targets [N] -> one number.

    The head runs over a few positions at a time, so that never all logits exist.
    """
    pieces = zip(features.split(_HEAD_CHUNK), targets.split(_HEAD_CHUNK), strict=True)
    losses = (
        F.cross_entropy(engine.head(x).float(), wanted, reduction="sum") for x, wanted in pieces
    )
    return sum(float(loss) for loss in losses)


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Nats over a whole text as bits per byte of it, a unit that is the same for all tokenizers."""
    if num_bytes < 1:
        raise ValueError(f"bits per byte of an empty text: num_bytes is {num_bytes}")
    return nats / math.log(2) / num_bytes


def unigram_entropy(text: bytes) -> float:
    """Bits per byte of a text under a code that knows only how often each byte occurs."""
    counts = np.bincount(np.frombuffer(text, np.uint8), minlength=256)
    shares = counts[counts > 0] / len(text)
    return float(-(shares * np.log2(shares)).sum())
