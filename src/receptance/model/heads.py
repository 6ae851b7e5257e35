"""Classifiers, regressors and forecasters: RWKV blocks between inputs of any kind and a head.

The blocks are those of the language model, and embedding, blocks and last layer norm have its
names. The inputs are token ids or vectors of numbers; the head sees the mean of a row's features,
its last feature, or every feature. Padding a row or batching it with others changes no result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from receptance.model.config import ModelConfig
from receptance.model.inputs import check_inputs
from receptance.model.parts import LayerNorm, Reading
from receptance.model.rwkv import FINAL_EPSILON, Block, learning_rate_scales, through
from receptance.state import State

Pooling = Literal["mean", "last", "every"]

_HEAD_SCALE = 0.5  # as in the language model


@dataclass(frozen=True, kw_only=True)
class SequenceConfig:
    """The sizes and the form of a `SequenceModel`; making one checks them."""

    stack: ModelConfig
    """Version, width and layers of the blocks. Its vocab_size is the number of token ids; vectors
    need none, and then it is 1."""
    outputs: int
    """K, the number of classes, or of numbers to predict."""
    channels: int = 0
    """D, the size of each position's vector; 0 means token ids."""
    pooling: Pooling = "mean"
    """What the head sees of a row: the mean of its features, the last one, or every one."""
    bidirectional: bool = False
    """Whether a second stack of as many blocks reads each row from its end."""
    pairs: bool = False
    """Whether rows 2i and 2i + 1 are two parts of one example, about which there is one answer."""

    def __post_init__(self) -> None:
        for name, least in (("outputs", 1), ("channels", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.pooling not in get_args(Pooling):
            raise ValueError(
                f"pooling is {self.pooling!r}; it must be one of {', '.join(get_args(Pooling))}"
            )
        if self.pairs and self.pooling == "every":
            raise ValueError("a pair of rows has one answer: set pooling to mean or last")

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return asdict(self) | {"stack": self.stack.to_dict()}

    @classmethod
    def from_dict(cls, fields: Any) -> SequenceConfig:
        """The inverse of to_dict; ValueError if fields are missing, unknown or wrong."""
        try:
            return cls(**{**fields, "stack": ModelConfig.from_dict(fields["stack"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"these are not the sizes of a sequence model: {error}") from None


class SequenceModel(nn.Module):
    """An RWKV stack that answers a question about a sequence, or about each of its positions.

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
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; it must be at least 0 and less than 1")
        self.config, self.dropout = config, dropout
        self.recompute = False
        generator = torch.Generator().manual_seed(seed)
        stack = config.stack
        if config.channels:
            self.input = Affine(config.channels, stack.width)
            self.input.uniform_(generator)
        else:
            weight = torch.empty(stack.vocab_size, stack.width)
            weight.uniform_(-embedding_bound, embedding_bound, generator=generator)
            self.emb = nn.Embedding(stack.vocab_size, stack.width, _weight=weight)
        self.blocks = _blocks(stack, generator)
        self.ln_out = LayerNorm(stack.width, FINAL_EPSILON)
        if config.bidirectional:
            self.reverse_blocks = _blocks(stack, generator)
            self.reverse_ln_out = LayerNorm(stack.width, FINAL_EPSILON)
        width = self.feature_width
        if config.pairs:
            self.joint = Affine(4 * width, width)
            self.joint.uniform_(generator)
        self.head = Affine(width, config.outputs)
        nn.init.orthogonal_(self.head.weight, gain=_HEAD_SCALE, generator=generator)

    @property
    def feature_width(self) -> int:
        """The size of a feature: C, or 2C for both directions."""
        return self.config.stack.width * (2 if self.config.bidirectional else 1)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.head.weight.device

    @property
    def state_size(self) -> int:
        """How many numbers a row's state holds, in all layers."""
        return sum(x.numel() for x in self.empty_state(1).tensors.values())

    def learning_rate_scales(self) -> dict[str, float]:
        """The factors of the learning rate that differ from 1, by parameter name."""
        return {
            name: scale
            for prefix, blocks in self._stacks()
            for name, scale in learning_rate_scales(prefix, blocks).items()
        }

    def is_weight_decayed(self, name: str, shape: torch.Size) -> bool:
        """Whether weight decay acts on a parameter, as it does on matrices."""
        return self.config.stack.architecture.is_weight_decayed(name, shape)

    @property
    def forward_flops_per_token(self) -> int:
        """Two operations per weight of a matrix, except for the embedding, per position."""
        found = self.named_parameters()
        return 2 * sum(x.numel() for name, x in found if x.dim() == 2 and name != "emb.weight")

    @property
    def training_flops_per_token(self) -> int:
        """The operations of both passes; the backward pass costs about twice the forward pass."""
        return 3 * self.forward_flops_per_token

    def _stacks(self) -> Iterator[tuple[str, list[Block]]]:
        yield "blocks", cast(list[Block], list(self.blocks))
        if self.config.bidirectional:
            yield "reverse_blocks", cast(list[Block], list(self.reverse_blocks))

    def empty_state(self, batch: int = 1, *, dtype: torch.dtype | None = None) -> State:
        """The state of rows that have read nothing."""
        weight = self.head.weight
        like = torch.empty(0, device=weight.device, dtype=dtype or weight.dtype)
        stack = self.config.stack
        tensors = stack.architecture.empty_state(stack, batch, like)
        return State(tensors, torch.zeros(batch, dtype=torch.int64, device=like.device))

    def forward(
        self,
        inputs: Tensor,
        *,
        lengths: Tensor | None = None,
        places: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Answers about rows of ids [B,T] or vectors [B,T,D]: [B,K], or [B,T,K] for every position.

        lengths [B], each in 1..T, is the number of real positions of each row; answers behind them
        mean nothing. places [B,T] bool picks N positions, whose answers are [N,K]. dtype is the
        type of activations (None: that of the parameters). ValueError if arguments do not fit.
        """
        self._check(inputs, lengths, places)
        x, _ = self._features(inputs, None, lengths, dtype)
        if self.config.pooling == "every":
            return cast(Tensor, self.head(x if places is None else x[places]))
        x = pooled(x, lengths, self.config.pooling)
        if self.config.pairs:
            one, other = x[0::2], x[1::2]
            x = F.relu(self.joint(torch.cat([one, other, one * other, one - other], dim=-1)))
        return cast(Tensor, self.head(x))

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
        x, tensors = self._features(inputs, state, lengths, dtype)
        read = inputs.shape[1] if lengths is None else lengths
        before = self.empty_state(len(inputs)) if state is None else state
        return x, State(tensors, before.tokens + read)

    def _features(
        self,
        inputs: Tensor,
        state: State | None,
        lengths: Tensor | None,
        dtype: torch.dtype | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        dtype = dtype or self.head.weight.dtype
        embedded = self.input(inputs.to(dtype)) if self.config.channels else self.emb(inputs)
        x = F.dropout(embedded.to(dtype), self.dropout, self.training)
        if state is None:
            state = self.empty_state(len(inputs), dtype=dtype)
        forward, tensors = self._through("blocks", x, state, lengths)
        if not self.config.bidirectional:
            return self.ln_out(forward), tensors
        order = reversed_places(x.shape[1], lengths, x.device).expand(len(x), -1)[..., None]
        back, _ = self._through("reverse_blocks", _reordered(x, order), state, lengths)
        back = _reordered(self.reverse_ln_out(back), order)
        return torch.cat([self.ln_out(forward), back], dim=-1), tensors

    def _through(
        self, name: str, x: Tensor, state: State, lengths: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return through(
            dict(self._stacks())[name],
            self.config.stack,
            x,
            state.tensors,
            Reading(None, lengths),
            dropout=self.dropout,
            recompute=self.recompute,
        )

    def _check(
        self,
        inputs: Tensor,
        lengths: Tensor | None,
        places: Tensor | None,
        state: State | None = None,
    ) -> None:
        """ValueError says which argument of a call does not fit the others or the model."""
        channels, pooling = self.config.channels, self.config.pooling
        ids = inputs
        if channels:
            if inputs.dim() != 3 or inputs.shape[-1] != channels or not inputs.is_floating_point():
                raise ValueError(
                    f"inputs are {inputs.dtype} {list(inputs.shape)}; wanted numbers "
                    f"[B,T,{channels}]"
                )
            ids = torch.zeros(inputs.shape[:2], dtype=torch.int64, device=inputs.device)
        check_inputs(self.config.stack, ids, state, lengths, None)
        if pooling != "every" and state is None:
            shortest = inputs.shape[1]
            if lengths is not None and lengths.is_cpu and lengths.numel():
                shortest = int(lengths.min())
            if not shortest:
                raise ValueError("a row is empty; there is nothing to pool, so leave it out")
        if places is None:
            return
        if pooling != "every":
            raise ValueError(f"places pick positions, and pooling is {pooling!r}; leave them out")
        if places.shape != ids.shape or places.dtype != torch.bool:
            raise ValueError(
                f"places are {places.dtype} {list(places.shape)}; wanted one bool for each of "
                f"{list(ids.shape)}"
            )


class Affine(nn.Module):
    """A matrix and a bias, cast to the dtype of the input: [...,in] -> [...,out]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    @torch.no_grad()
    def uniform_(self, generator: torch.Generator) -> None:
        """Draw weight and bias within 1 / sqrt(inputs), as torch's Linear does."""
        bound = self.weight.shape[1] ** -0.5
        for parameter in (self.weight, self.bias):
            parameter.uniform_(-bound, bound, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """[...,in] -> [...,out], in x's dtype."""
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def pooled(x: Tensor, lengths: Tensor | None, pooling: Pooling) -> Tensor:
    """The mean or the last of each row's real positions: [B,T,C] -> [B,C].

    What stands behind a row's length has no influence, whatever it is.
    """
    if lengths is None:
        return x[:, -1] if pooling == "last" else x.mean(dim=1)
    if pooling == "last":
        return x[torch.arange(len(x), device=x.device), lengths - 1]
    behind = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
    return x.masked_fill(behind[..., None], 0).sum(dim=1) / lengths[:, None].to(x.dtype)


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
    return x.gather(1, order.expand(-1, -1, x.shape[-1]))


def _blocks(stack: ModelConfig, generator: torch.Generator) -> nn.ModuleList:
    blocks = [Block(stack, layer) for layer in range(stack.num_layers)]
    for block in blocks:
        block.att.initialize(generator)
        block.ffn.initialize(generator)
    return nn.ModuleList(blocks)
