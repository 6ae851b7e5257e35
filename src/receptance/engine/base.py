"""What generation, chat and scoring ask of whatever runs a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from receptance.config import ModelConfig
from receptance.state import State


class Engine(Protocol):
    """`Model` itself, or kernels that own its weights: one call, the same states in and out.

    Cutting a sequence anywhere, batching it with anything or padding it changes nothing.
    """

    @property
    def config(self) -> ModelConfig:
        """The sizes of the model."""
        ...

    @property
    def device(self) -> torch.device:
        """Where tokens are wanted and logits come."""
        ...

    @property
    def batch_invariant(self) -> bool:
        """Whether that holds to the bit, and not only to float rounding."""
        ...

    @property
    def head(self) -> Callable[[Tensor], Tensor]:
        """Logits of what `features` gave at any positions: [...,C] -> [...,V]."""
        ...

    def features(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """What goes into the head, [B,T] -> [B,T,C], and the state (arguments as of Model)."""
        ...

    def __call__(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Logits for the token after each position, [B,T] -> [B,T,V], and the state."""
        ...

    def fingerprint(self) -> str:
        """Whose states these are: the same for every dtype of one model."""
        ...


class OneCall:
    """`Engine.__call__` of an engine that has the other methods."""

    def __call__(
        self: Engine,
        tokens: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Logits [B,T,V] for the token after each position, and the state."""
        features, state = self.features(tokens, state, lengths=lengths, resets=resets)
        return self.head(features), state
