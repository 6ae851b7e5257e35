"""State tuning: the state in which every text begins is learned, and nothing else.

What is learned stands for a state that the model itself could have arrived at; the version says
what that is (`Architecture.learnable_state`).
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
    """A learned initial state."""

    start_key: float = -4.0
    """Starting value of the learned key: the weight of what is learned against that of the text.
    At -4 a new state changes logits by a few percent, and its value has a gradient; at -10 it has
    none to speak of, and at 0 the model is disturbed before it has learned anything."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.start_key):
            raise ValueError(f"start_key is {self.start_key}; it must be a finite number")


class StateTuning(Adapter):
    """What `Architecture.learnable_state` names, for all layers: each [L,...]."""

    kind: ClassVar[str] = "state"

    def __init__(self, model: Model, options: StateTuningOptions, *, seed: int = 0) -> None:
        """Nothing is drawn from the seed; it is here because every adapter takes one."""
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
        """All of them, each [L,...]."""
        return dict(self.named_parameters())

    def initial_state(self, batch: int = 1, dtype: torch.dtype = torch.float32) -> State:
        """The state of `batch` rows that have read nothing, with gradients, shifts in dtype.

        Rows that a model resets within a batch (`resets`) begin empty, not here.
        """
        learned = self.tensors()
        device = next(iter(learned.values())).device
        like = torch.empty(0, device=device, dtype=dtype)
        layers = self._config.architecture.learned_state(learned, like)
        tensors = {name: x[:, None].expand(-1, batch, *x.shape[1:]) for name, x in layers.items()}
        return State(tensors, torch.zeros(batch, dtype=torch.int64, device=device))

    def fingerprint(self, model_fingerprint: str) -> str:
        """The model's own: where a state came from makes no difference to reading it."""
        return model_fingerprint
