"""The interface between what runs a model and what uses it: generation, chat, scoring."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from receptance.config import ModelConfig
from receptance.state import State


class Engine(Protocol):
    """What runs a model: `Model` itself, or kernels that own its weights.

    Every engine keeps one law: cutting a sequence anywhere, batching it with anything or padding
    it changes no result.
    """

    @property
    def config(self) -> ModelConfig:
        """The sizes of the model."""
        ...

    @property
    def device(self) -> torch.device:
        """The device on which the engine takes tokens and returns logits."""
        ...

    @property
    def batch_invariant(self) -> bool:
        """Whether a row's results are equal to the bit in every batch, not only up to rounding."""
        ...

    @property
    def head(self) -> Callable[[Tensor], Tensor]:
        """The function from features, at any positions, to logits: [...,C] -> [...,V]."""
        ...

    def features(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Features for the head, [B,T] -> [B,T,C], and the next state (see Model.features)."""
        ...

    def __call__(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Logits for the token after each position, [B,T] -> [B,T,V], and the next state."""
        ...

    def fingerprint(self) -> str:
        """Identify the model that states belong to; it is the same for all dtypes of a model."""
        ...

    @property
    def weight_bytes(self) -> int:
        """The bytes of all weights."""
        ...

    @property
    def bytes_per_token(self) -> int:
        """The bytes of weights that one token of one row reads: all but the embedding."""
        ...

    def evaluating(self) -> AbstractContextManager[None]:
        """Switch dropout off inside a `with` block."""
        ...

    def save_state(self, state: State, path: str | Path) -> None:
        """Write a state of this engine to a file (see `State.save`)."""
        ...

    def load_state(self, path: str | Path) -> State:
        """Read a state of this engine from a file, on its device (see `State.load`)."""
        ...


class EvaluationOnly:
    """The methods of an `Engine` that follow from its others, for an engine without training."""

    def evaluating(self) -> AbstractContextManager[None]:
        """Open a `with` block that changes nothing, because this engine has no training mode."""
        return nullcontext()

    def save_state(self: Engine, state: State, path: str | Path) -> None:
        """Write a state of this engine to a file (see `State.save`)."""
        state.save(path, self.fingerprint())

    def load_state(self: Engine, path: str | Path) -> State:
        """Read a state of this engine from a file, on its device (see `State.load`)."""
        return State.load(path, self.fingerprint()).to(self.device)

    def __call__(
        self: Engine,
        tokens: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Logits for the token after each position, [B,T] -> [B,T,V], and the next state."""
        features, state = self.features(tokens, state, lengths=lengths, resets=resets)
        return self.head(features), state


class NotCopied:
    """An engine that refuses to be copied, because its kernels hold addresses of its memory."""

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} is neither copied nor pickled, because its kernels hold "
            "addresses of its memory; share this one, or load another with load_engine"
        )
