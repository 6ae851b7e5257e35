"""What stands around the layers of a classifier, regressor or forecaster: inputs and a head.

The inputs are token ids or vectors of numbers; the head sees the mean of a row's features, its last
feature, or every feature. Padding a row or batching it with others changes no result.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from receptance.model.config import ModelConfig
from receptance.model.inputs import check_inputs
from receptance.state import State

Pooling = Literal["mean", "last", "every"]

_HEAD_SCALE = 0.5  # as in the language model


@dataclass(frozen=True, kw_only=True)
class SequenceConfig:
    """The sizes and the form of an `Answering` model; making one checks them."""

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


class Answering(nn.Module, ABC):
    """A model that answers a question about a sequence, or about each of its positions.

    Subclasses have the layers. `dropout` acts in training mode, after the input and inside the
    layers; with `recompute` the backward pass recomputes the activations inside each layer instead
    of saving them.
    """

    def __init__(
        self,
        config: SequenceConfig,
        feature_width: int,
        generator: torch.Generator,
        *,
        dropout: float,
        embedding_bound: float,
    ) -> None:
        """feature_width is the size of what `_read` returns for a position."""
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; it must be at least 0 and less than 1")
        self.config, self.dropout = config, dropout
        self.recompute = False
        stack = config.stack
        if config.channels:
            self.input = Affine(config.channels, stack.width)
            self.input.draw(generator)
        else:
            weight = torch.empty(stack.vocab_size, stack.width)
            weight.uniform_(-embedding_bound, embedding_bound, generator=generator)
            self.emb = nn.Embedding(stack.vocab_size, stack.width, _weight=weight)
        if config.pairs:
            self.joint = Affine(4 * feature_width, feature_width)
            self.joint.draw(generator)
        self.head = Affine(feature_width, config.outputs)
        nn.init.orthogonal_(self.head.weight, gain=_HEAD_SCALE, generator=generator)

    @abstractmethod
    def _read(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """The features of embedded rows: [B,T,C] -> [B,T,W]."""

    @abstractmethod
    def state_size(self, length: int) -> int:
        """How many numbers are kept of a row that was read to this length, in all layers."""

    def learning_rate_scales(self) -> dict[str, float]:
        """The factors of the learning rate that differ from 1, by parameter name."""
        return {}

    def is_weight_decayed(self, name: str, shape: torch.Size) -> bool:
        """Whether weight decay acts on a parameter, as it does on matrices."""
        return self.config.stack.architecture.is_weight_decayed(name, shape)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.head.weight.device

    @property
    def num_parameters(self) -> int:
        """The number of values in all parameters."""
        return sum(x.numel() for x in self.parameters())

    @property
    def forward_flops_per_token(self) -> int:
        """Two operations per weight of a matrix, except for the embedding, per position."""
        found = self.named_parameters()
        return 2 * sum(x.numel() for name, x in found if x.dim() == 2 and name != "emb.weight")

    @property
    def training_flops_per_token(self) -> int:
        """The operations of both passes; the backward pass costs about twice the forward pass."""
        return 3 * self.forward_flops_per_token

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
        x = self._read(self._embedded(inputs, dtype), lengths)
        if self.config.pooling == "every":
            return cast(Tensor, self.head(x if places is None else x[places]))
        x = pooled(x, lengths, self.config.pooling)
        if self.config.pairs:
            one, other = x[0::2], x[1::2]
            x = F.relu(self.joint(torch.cat([one, other, one * other, one - other], dim=-1)))
        return cast(Tensor, self.head(x))

    def _embedded(self, inputs: Tensor, dtype: torch.dtype | None) -> Tensor:
        dtype = dtype or self.head.weight.dtype
        x = self.input(inputs.to(dtype)) if self.config.channels else self.emb(inputs)
        return F.dropout(x.to(dtype), self.dropout, self.training)

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
    def draw(self, generator: torch.Generator) -> None:
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
