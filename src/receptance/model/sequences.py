"""`SequenceModel`: RWKV blocks that answer questions about sequences of any kind.

The blocks are those of the language model, and embedding, blocks and last layer norm have its
names.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from receptance.model.config import ModelConfig
from receptance.model.heads import Answering, SequenceConfig
from receptance.model.parts import LayerNorm, Reading
from receptance.model.rwkv import FINAL_EPSILON, Block, learning_rate_scales, through
from receptance.state import State


class SequenceModel(Answering):
    """An RWKV stack with a head for classes or numbers.

    The starting values of the blocks are the official ones, drawn from `seed`; embeddings are
    uniform within embedding_bound, as in the language model. `dropout` acts in training mode, after
    the input and on both sums of every block.
    """

    def __init__(
        self,
        config: SequenceConfig,
        *,
        seed: int = 0,
        dropout: float = 0.0,
        embedding_bound: float = 1e-4,
    ) -> None:
        generator, stack = torch.Generator().manual_seed(seed), config.stack
        width = stack.width * (2 if config.bidirectional else 1)
        super().__init__(config, width, generator, dropout=dropout, embedding_bound=embedding_bound)
        self.blocks = _blocks(stack, generator)
        self.ln_out = LayerNorm(stack.width, FINAL_EPSILON)
        if config.bidirectional:
            self.reverse_blocks = _blocks(stack, generator)
            self.reverse_ln_out = LayerNorm(stack.width, FINAL_EPSILON)

    def state_size(self, length: int) -> int:
        """How many numbers the state of a row holds, in all layers; it does not grow."""
        return sum(x.numel() for x in self.empty_state(1).tensors.values())

    def learning_rate_scales(self) -> dict[str, float]:
        """The factors of the learning rate that differ from 1, by parameter name."""
        return {
            name: scale
            for prefix, blocks in self._stacks().items()
            for name, scale in learning_rate_scales(prefix, blocks).items()
        }

    def _stacks(self) -> dict[str, list[Block]]:
        names = ["blocks", *(["reverse_blocks"] if self.config.bidirectional else [])]
        return {name: cast(list[Block], list(getattr(self, name))) for name in names}

    def empty_state(self, batch: int = 1, *, dtype: torch.dtype | None = None) -> State:
        """The state of rows that have read nothing."""
        weight = self.head.weight
        like = torch.empty(0, device=weight.device, dtype=dtype or weight.dtype)
        stack = self.config.stack
        tensors = stack.architecture.empty_state(stack, batch, like)
        return State(tensors, torch.zeros(batch, dtype=torch.int64, device=like.device))

    def features(
        self,
        inputs: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, State]:
        """Features of all positions, [B,T,C], and the next state: a sequence may be cut anywhere.

        Inputs and lengths as in `forward`. ValueError if the model reads in both directions, for
        which it needs whole rows.
        """
        if self.config.bidirectional:
            raise ValueError("this model reads rows from both ends; give it whole rows")
        self._check(inputs, lengths, None, state)
        x = self._embedded(inputs, dtype)
        if state is None:
            state = self.empty_state(len(inputs), dtype=x.dtype)
        x, tensors = self._through("blocks", x, state, lengths)
        read = inputs.shape[1] if lengths is None else lengths
        return self.ln_out(x), State(tensors, state.tokens + read)

    def _read(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        state = self.empty_state(len(x), dtype=x.dtype)
        forward, _ = self._through("blocks", x, state, lengths)
        out = cast(Tensor, self.ln_out(forward))
        if not self.config.bidirectional:
            return out
        order = reversed_places(x.shape[1], lengths, x.device).expand(len(x), -1)
        back, _ = self._through("reverse_blocks", _reordered(x, order), state, lengths)
        return torch.cat([out, _reordered(self.reverse_ln_out(back), order)], dim=-1)

    def _through(
        self, name: str, x: Tensor, state: State, lengths: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return through(
            self._stacks()[name],
            self.config.stack,
            x,
            state.tensors,
            Reading(None, lengths),
            dropout=self.dropout,
            recompute=self.recompute,
        )


def reversed_places(length: int, lengths: Tensor | None, device: torch.device) -> Tensor:
    """Where each position of rows read from their ends comes from: [1,T], or [B,T] with lengths.

    Padding stays in its place behind the row.
    """
    places = torch.arange(length, device=device)[None]
    if lengths is None:
        return places.flip(1)
    mirrored = lengths[:, None] - 1 - places
    return torch.where(mirrored >= 0, mirrored, places)


def _reordered(x: Tensor, order: Tensor) -> Tensor:
    """Positions in another order: [B,T,C], [B,T] -> [B,T,C]."""
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))


def _blocks(stack: ModelConfig, generator: torch.Generator) -> nn.ModuleList:
    blocks = [Block(stack, layer) for layer in range(stack.num_layers)]
    for block in blocks:
        block.att.initialize(generator)
        block.ffn.initialize(generator)
    return nn.ModuleList(blocks)
