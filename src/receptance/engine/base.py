"""What generation, chat and scoring ask of whatever runs a model."""

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

    @property
    def weight_bytes(self) -> int:
        """The memory of all weights."""
        ...

    @property
    def bytes_per_token(self) -> int:
        """The bytes of weights that a step over one row reads: all but the embedding."""
        ...

    def evaluating(self) -> AbstractContextManager[None]:
        """A block in which nothing is random: a model in training mode drops nothing out in it."""
        ...

    def save_state(self, state: State, path: str | Path) -> None:
        """Write a state of this engine to a file (see `State.save`)."""
        ...

    def load_state(self, path: str | Path) -> State:
        """Read a state of this engine from a file, on its device (see `State.load`)."""
        ...


class OneCall:
    """What follows from the other methods of an `Engine`, for an engine that only evaluates."""

    def evaluating(self) -> AbstractContextManager[None]:
        """A block that changes nothing: this engine has no training mode."""
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
        """Logits [B,T,V] for the token after each position, and the state."""
        features, state = self.features(tokens, state, lengths=lengths, resets=resets)
        return self.head(features), state


class NotCopied:
    """An engine of which there is no copy, because its kernels know addresses in its own memory."""

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} is neither copied nor pickled, because its kernels hold "
            "addresses of its memory; share this one, or load another with load_engine"
        )
