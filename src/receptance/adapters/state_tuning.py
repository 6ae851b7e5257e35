"""State tuning: the state in which every text begins is learned, and nothing else.

A new text begins as if the model had read something, namely a token of which, in each layer,
the inputs of the mixing are learned (time_shift, channel_shift), and value and key are too:
numerator e^key value, denominator e^key. That is every state there is of positive weight.
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
    """Four vectors per layer, each [L,C]: 4 L C numbers in all."""

    kind: ClassVar[str] = "state"

    def __init__(self, model: Model, options: StateTuningOptions, *, seed: int = 0) -> None:
        """Nothing is drawn from the seed; it is here because every adapter takes one."""
        super().__init__(options)
        if model.config.version != 4:
            raise ValueError(f"state tuning is for version 4, not {model.config.version}")
        sizes = model.config.num_layers, model.config.width
        device = model.emb.weight.device
        self.time_shift = nn.Parameter(torch.zeros(sizes, device=device))
        self.channel_shift = nn.Parameter(torch.zeros(sizes, device=device))
        self.value = nn.Parameter(torch.zeros(sizes, device=device))
        self.key = nn.Parameter(torch.full(sizes, float(options.start_key), device=device))

    def check_fits(self, model: Model) -> None:
        """ValueError if layers or width differ."""
        sizes = (model.config.num_layers, model.config.width)
        if sizes != tuple(self.value.shape):
            raise ValueError(
                f"this state is for {self.value.shape[0]} layers of width {self.value.shape[1]}; "
                f"the model has {sizes[0]} of width {sizes[1]}"
            )

    def tensors(self) -> dict[str, nn.Parameter]:
        """Four tensors [L,C]."""
        return dict(self.named_parameters())

    def initial_state(self, batch: int = 1, dtype: torch.dtype = torch.float32) -> State:
        """The state of `batch` rows that have read nothing, with gradients, shifts in dtype.

        Rows that a model resets within a batch (`resets`) begin empty, not here.
        """
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        # The exponent has no gradient anywhere, it cancels (ops.reference); so the key acts
        # through a factor that is always 1.
        weight = (self.key - self.key.detach()).exp()
        layers = {
            "time_shift": self.time_shift.to(dtype),
            "channel_shift": self.channel_shift.to(dtype),
            "numerator": (self.value * weight).to(wide),
            "denominator": weight.to(wide),
            "exponent": self.key.detach().to(wide),
        }
        tensors = {name: x[:, None].expand(-1, batch, -1) for name, x in layers.items()}
        return State(tensors, torch.zeros(batch, dtype=torch.int64, device=self.key.device))

    def fingerprint(self, model_fingerprint: str) -> str:
        """The model's own: where a state came from makes no difference to reading it."""
        return model_fingerprint
