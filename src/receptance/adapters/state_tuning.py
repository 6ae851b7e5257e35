"""State tuning: only the state in which every text begins is learned.

The learned values stand for a state that the model itself could have reached. Each version defines
them (`Architecture.learnable_state`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from receptance.adapters.base import Adapter
from receptance.model import Model
from receptance.state import State


@dataclass(frozen=True, kw_only=True)
class StateTuningOptions:
    """The options of state tuning."""

    start_key: float = -4.0
    """Starting value of the learned key, which weighs the learned value against those of the text.
    At -4 a new state changes logits by a few percent, and its value has a gradient; at -10 the
    gradient is close to zero, and at 0 the model is disturbed before it has learned anything."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.start_key):
            raise ValueError(f"start_key is {self.start_key}; it must be a finite number")


class StateTuning(Adapter):
    """An adapter that learns the tensors of `Architecture.learnable_state`: each [L,...]."""

    kind: ClassVar[str] = "state"

    def __init__(self, model: Model, options: StateTuningOptions, *, seed: int = 0) -> None:
        """Ignore the seed, which every adapter takes: starting values are not random here."""
        super().__init__(options)
        self._config = model.config
        start = model.config.architecture.learnable_state(model.config, float(options.start_key))
        for name, value in start.items():
            self.register_parameter(name, nn.Parameter(value.to(model.device)))

    def check_fits(self, model: Model) -> None:
        """ValueError if version, layers or width differ."""
        own, other = self._config, model.config
        if (own.version, own.num_layers, own.width) != (
            other.version,
            other.num_layers,
            other.width,
        ):
            raise ValueError(
                f"this state is for {own.num_layers} layers of width {own.width} of "
                f"RWKV-{own.version}; the model has {other.num_layers} of width {other.width} of "
                f"RWKV-{other.version}"
            )

    def tensors(self) -> dict[str, nn.Parameter]:
        """The learned tensors, by name: each [L,...]."""
        return dict(self.named_parameters())

    def initial_state(self, batch: int = 1, dtype: torch.dtype = torch.float32) -> State:
        """The learned state of `batch` rows, with its gradients; dtype is that of activations.

        A row that `resets` starts afresh begins with the empty state instead.
        """
        learned = self.tensors()
        device = next(iter(learned.values())).device
        like = torch.empty(0, device=device, dtype=dtype)
        layers = self._config.architecture.learned_state(learned, like)
        tensors = {name: x[:, None].expand(-1, batch, *x.shape[1:]) for name, x in layers.items()}
        return State(tensors, torch.zeros(batch, dtype=torch.int64, device=device))

    def fingerprint(self, model_fingerprint: str) -> str:
        """The fingerprint of the model alone, because it reads on from any initial state."""
        return model_fingerprint
