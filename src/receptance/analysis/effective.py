"""The attention that a recurrence amounts to: how much each output reads from each earlier token.

RWKV computes no attention matrix, but its recurrence is linear in the values of the tokens, and
the factors are exact (see ops.sources). The state before the text counts as one more token.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from receptance.analysis.notebook import image, row_of_figures
from receptance.analysis.places import spots
from receptance.analysis.watching import watching
from receptance.model import Model
from receptance.ops import Sources
from receptance.state import State

_AT_ONCE = 1 << 24
"""The weights that are in memory at one time when only sums of them are wanted."""


class Attention:
    """What every layer read from every token of a text; made by `attention`."""

    def __init__(self, time_mixes: list[Any], calls: list[tuple[Any, ...]], wkv: list[Tensor]):
        self._time_mixes, self._calls, self._wkv = time_mixes, calls, wkv

    def __len__(self) -> int:
        return len(self._calls)

    def wkv(self, layer: int) -> Tensor:
        """The outputs of the recurrence as the model computed them, [B,T,C]."""
        return self._wkv[layer].flatten(2)

    @torch.no_grad()
    def sources(self, layer: int, positions: Tensor | None = None) -> Sources:
        """What the outputs at positions [P] are made of; None means all T positions.

        The weights [B,P,T,G] of a long text are large: choose positions, or take sums of them from
        `shares` and `distances`.
        """
        if positions is None:
            positions = torch.arange(self.wkv(layer).shape[1], device=self._wkv[layer].device)
        found: Sources = self._time_mixes[layer].sources(*self._calls[layer], positions=positions)
        return found

    def shares(self, layer: int) -> Tensor:
        """The share of each source in each output, [B,T,1+T], the state before the text first.

        See ops.Sources.shares. This is what comes nearest to the attention map of a Transformer.
        """
        pieces = (self.sources(layer, at).shares() for at in self._positions(layer))
        return torch.cat([*pieces], dim=1)

    def distances(self, layer: int) -> Tensor:
        """How many tokens back each group of channels reads on average, [B,T,G].

        A token t - i away counts by the magnitude of its weight. The state before the text counts
        as the token before the first one where it has a weight, so these are lower bounds for a
        text that continues another.
        """
        pieces = (_distances(self.sources(layer, at), at) for at in self._positions(layer))
        return torch.cat([*pieces], dim=1)

    def memory(self, layer: int) -> Tensor:
        """The effective memory of each group of channels over this text in tokens, [G].

        It is the mean distance from which they read. A half-life tells how fast a channel forgets
        whatever it holds; this also counts which tokens had large keys.
        """
        return self.distances(layer).mean(dim=(0, 1))

    def _positions(self, layer: int) -> Iterator[Tensor]:
        batch, time, width = self.wkv(layer).shape
        every = torch.arange(time, device=self._wkv[layer].device)
        yield from every.split(max(1, _AT_ONCE // (batch * time * width)))

    def __repr__(self) -> str:
        batch, time, width = self.wkv(0).shape
        return f"Attention of {len(self)} layers over {batch} x {time} tokens, width {width}"

    def _repr_html_(self) -> str:
        maps = {f"layer {i}": image(self.shares(i)[0]) for i in range(len(self))}
        return f"<p>{html.escape(repr(self))}</p>{row_of_figures(maps)}"


@torch.no_grad()
def attention(
    model: Model, tokens: Tensor, state: State | None = None, *, resets: Tensor | None = None
) -> Attention:
    """Read a text [B,T] once and keep what the effective attention of all layers follows from.

    The arguments are those of the model. ValueError for a version that cannot tell.
    """
    if not tokens.numel():
        raise ValueError("there is no token in this text")
    time_mixes = [spot.owner for spot in spots(model) if spot.name.endswith(".att.wkv")]
    if not time_mixes:
        raise ValueError(f"RWKV-{model.config.version} does not tell what its layers read from")
    keepers = [_Keeper() for _ in time_mixes]
    with ExitStack() as stack:
        for time_mix, keeper in zip(time_mixes, keepers, strict=True):
            stack.enter_context(watching(time_mix, "wkv", keeper))
        model.features(tokens, state, resets=resets)
    return Attention(time_mixes, [k.arguments for k in keepers], [k.out for k in keepers])


class _Keeper:
    """Keeps the arguments and the output of a recurrence."""

    writes = False
    arguments: tuple[Any, ...]
    out: Tensor

    def before(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if hasattr(self, "arguments"):
            raise ValueError(
                "the blocks run token by token while a state is recorded or patched; take the "
                "attention outside of that `with` block"
            )
        self.arguments = arguments
        return arguments

    def after(self, result: Any) -> Any:
        self.out = result[0]
        return result


def _distances(sources: Sources, positions: Tensor) -> Tensor:
    """The mean distance of what is read, [B,P,G], weighted by the magnitude of weights."""
    weights = sources.weights.abs()
    time = torch.arange(weights.shape[2], device=weights.device)
    ago = (positions[:, None] - time).clamp(min=0).to(weights.dtype)
    total, sums = weights.sum(2), torch.einsum("bptg,pt->bpg", weights, ago)
    if sources.carried_weight is not None:
        carried = sources.carried_weight.abs()
        total, sums = total + carried, sums + carried * (positions[:, None] + 1)
    return sums / total.clamp(min=torch.finfo(total.dtype).tiny)
