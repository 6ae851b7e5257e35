"""A model and its adapter as one: side by side in torch, or made one for the kernels."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from receptance.adapters import Adapter
from receptance.config import ModelConfig
from receptance.engine.base import EvaluationOnly
from receptance.model import Model
from receptance.model.modes import evaluating
from receptance.state import State


class AdaptedModel(EvaluationOnly):
    """An `Engine` whose adapter stays attached; rows without a state begin in the adapter's."""

    batch_invariant = False

    def __init__(self, model: Model, adapter: Adapter) -> None:
        self._model, self._adapter = model, adapter.attach(model)

    @property
    def config(self) -> ModelConfig:
        """The sizes of the model."""
        return self._model.config

    @property
    def device(self) -> torch.device:
        """The device that holds the model."""
        return self._model.device

    @property
    def head(self) -> Callable[[Tensor], Tensor]:
        """The function from features to logits: [...,C] -> [...,V]."""
        return self._model.head

    def features(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Features for the head, [B,T] -> [B,T,C], and the next state (see Model.features)."""
        if state is None:
            state = self._adapter.initial_state(len(tokens))
        return self._model.features(tokens, state, lengths=lengths, resets=resets)

    def fingerprint(self) -> str:
        """Identify the states that the model makes together with the adapter."""
        return self._adapter.fingerprint(self._model.fingerprint())

    @property
    def weight_bytes(self) -> int:
        """The bytes of all weights, the adapter's included."""
        return self._model.weight_bytes + self._adapter_bytes

    @property
    def bytes_per_token(self) -> int:
        """The bytes of weights that one token of one row reads: all but the embedding."""
        return self._model.bytes_per_token + self._adapter_bytes

    @property
    def _adapter_bytes(self) -> int:
        return sum(x.nbytes for x in self._adapter.parameters())

    def evaluating(self) -> AbstractContextManager[None]:
        """Switch dropout off inside a `with` block, for the model and for the adapter."""
        return evaluating(self._model, self._adapter)


def with_adapter(model: Model, adapter: Adapter, own: str) -> tuple[Model, str, State | None]:
    """Apply an adapter: the model, the fingerprint of its states, and the state rows begin in.

    An adapter of the weights is merged into the model, and rows begin empty. `own` is the
    fingerprint of the model alone.
    """
    states_of, initial = adapter.fingerprint(own), adapter.initial_state()
    if initial is None:
        # In a narrower type the sum would be rounded before it is packed, and small changes lost.
        return adapter.merge(model, torch.float32), states_of, None
    return model, states_of, initial.detach()
