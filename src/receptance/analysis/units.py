"""Statistics of the hidden units of channel mixing, most of which are zero in trained models.

That is what the sparse kernels live on (see docs/inference.md): the rows of the matrix that zeros
would multiply are not read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from receptance.analysis.hooks import record
from receptance.analysis.notebook import table
from receptance.model import Model
from receptance.state import State

_CHUNK = 256  # positions that are read at one time


@dataclass(frozen=True)
class Activations:
    """How often each hidden unit of channel mixing was not zero over a text."""

    rates: Tensor
    """[L,F], the share of positions at which a unit was above zero."""
    tokens: int
    """The number of positions."""

    @property
    def sparsity(self) -> Tensor:
        """The share of zeros in each layer, [L]: that of the rows that a kernel can skip."""
        return 1 - self.rates.mean(1)

    @property
    def dead(self) -> Tensor:
        """The number of units in each layer that were never above zero, [L]."""
        return (self.rates == 0).sum(1)

    def _repr_html_(self) -> str:
        rows = [
            [str(layer), f"{share:.1%}", str(int(dead))]
            for layer, (share, dead) in enumerate(zip(self.sparsity, self.dead, strict=True))
        ]
        return table(["layer", f"zeros over {self.tokens} tokens", "units never used"], rows)


@torch.no_grad()
def activations(
    model: Model,
    tokens: Tensor,
    *,
    note: Callable[[int], object] = lambda read: None,
) -> Activations:
    """Read texts [B,T] in pieces and count the hidden units that are not zero.

    note is called with the number of positions that have been read. ValueError for a version
    without squared relu.
    """
    if "ffn.hidden" not in model.config.architecture.intermediates:
        raise ValueError(f"RWKV-{model.config.version} has no hidden units that could be zero")
    if not tokens.numel():
        raise ValueError("there is no token in this text")
    counts: Tensor | None = None
    state: State | None = None
    for piece in tokens.split(_CHUNK, dim=1):
        with record(model, "blocks.*.ffn.hidden") as cache:
            _, state = model.features(piece, state)
        alive = torch.stack([(cache[name] > 0).sum(dim=(0, 1)) for name in cache])
        counts = alive if counts is None else counts + alive
        note(piece.numel())
    assert counts is not None
    return Activations(counts / tokens.numel(), tokens.numel())
