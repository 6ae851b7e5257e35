"""How well a model predicts text: log-likelihoods and bits per byte."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from receptance.data.batches import Batch
from receptance.model import Model

# Rows are pieces of one long text, read side by side with their states carried along.
_ROWS = 16
_CHUNK = 256
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
    model: Model, tokens: np.ndarray | Tensor, *, start: int = 0, dtype: torch.dtype | None = None
) -> float:
    """Total, in nats, of a text's tokens [N], each predicted from all before it.

    The text is cut into a few long pieces that are read side by side; each begins from nothing
    but the token `start`, so the figure is at most a little worse than that of one piece.
    """
    whole, state, total = text_rows(tokens, start=start), None, 0.0
    training, device = model.training, model.emb.weight.device
    model.eval()
    try:
        for at in range(0, whole.inputs.shape[1], _CHUNK):
            piece = whole.part(time=slice(at, at + _CHUNK)).to(device)
            logits, state = model(piece.inputs, state, dtype=dtype)
            assert piece.mask is not None
            counted = piece.targets.masked_fill(~piece.mask, _IGNORED)
            losses = F.cross_entropy(
                logits.float().flatten(0, 1), counted.flatten(), reduction="sum"
            )
            total += float(losses)
    finally:
        model.train(training)
    return total


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
