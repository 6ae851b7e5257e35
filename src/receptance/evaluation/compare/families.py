"""The architectures that are compared: how each is made, counted, trained, saved and run.

An architecture is trained through an objective, a module of the form of `training.Objective`:
(batch, state, total) -> (what to minimize, cross entropy, next state), where a state of None stands
for rows that have read nothing. Its dtype is that of activations.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from receptance.config import ModelConfig
from receptance.engine import load_engine
from receptance.engine.base import Engine
from receptance.model import Model
from receptance.model.versions import VERSIONS
from receptance.state import State
from receptance.storage.checkpoint import save
from receptance.tokenizer import Tokenizer
from receptance.training.objective import Objective
from receptance.training.options import TrainOptions

# Each number of a recurrent state is decayed, added to, multiplied and summed at every token.
_STATE_OPERATIONS = 4


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a model of any architecture."""

    vocab_size: int
    """V."""
    width: int
    """C, the channels of the residual stream."""
    layers: int
    """L."""
    ffn_width: int
    """F, the hidden width of the feed-forward networks."""


class Decoder(Protocol):
    """A model that generates one row of text, token by token."""

    def read(self, tokens: Tensor) -> None:
        """Read tokens [T] after all those that were read before."""
        ...

    def step(self) -> None:
        """Generate the most likely token and read it."""
        ...

    @property
    def remembered(self) -> list[Tensor]:
        """What the model remembers of the text: its state, or keys and values."""
        ...


class Family(ABC):
    """One architecture at all sizes."""

    name: str
    """The name in options, figures and file names."""
    label: str
    """What it is, in a few words."""

    @abstractmethod
    def usual_ffn_width(self, width: int) -> int:
        """F of a model of this width that is matched to nothing."""

    def check(self, shape: Shape) -> None:  # noqa: B027 Most architectures take any sizes.
        """ValueError for sizes that this architecture cannot have."""

    @abstractmethod
    def skeleton(self, shape: Shape) -> nn.Module:
        """The model without memory for its weights, to be counted."""

    @abstractmethod
    def ends(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """The matrices of the embedding and of the head [V,C]."""

    @abstractmethod
    def mixing_flops(self, shape: Shape, context: int) -> int:
        """The forward FLOPs per token, in all layers, that combine a token with those before it.

        These are what comes on top of the products with matrices of weights, as the mean over the
        positions of a sequence of this length.
        """

    @abstractmethod
    def objective(self, shape: Shape, options: TrainOptions) -> nn.Module:
        """A new model with its objective; starting values are drawn from the seed in options."""

    def model(self, objective: nn.Module) -> nn.Module:
        """The model in an objective."""
        model: nn.Module = objective.get_submodule("model")
        return model

    def learning_rate_scales(self, model: nn.Module) -> Mapping[str, float]:
        """The factors of the learning rate that differ from 1, by parameter name."""
        return {}

    def is_decayed(self, shape: Shape) -> Callable[[str, torch.Size], bool]:
        """Whether weight decay acts on a parameter, by its name and shape: on matrices."""
        return lambda name, size: sum(n > 1 for n in size) >= 2

    def carried(self, model: nn.Module) -> Engine | None:
        """The model as an engine if it can read a text of any length in pieces, else None."""
        return None

    @abstractmethod
    def save(self, model: nn.Module, folder: Path, tokenizer: Tokenizer) -> None:
        """Write a model in the format of its own library."""

    @abstractmethod
    def decoder(self, folder: Path) -> Decoder:
        """Load what `save` wrote into what generates text fastest on a CPU."""


class RWKV(Family):
    """A version of RWKV, trained by this package and run by its engines."""

    def __init__(self, version: float) -> None:
        self.version = version
        self.name, self.label = f"rwkv{version}", f"RWKV-{version}"

    def config(self, shape: Shape) -> ModelConfig:
        """The configuration of a model of these sizes."""
        return ModelConfig(
            version=self.version,
            vocab_size=shape.vocab_size,
            width=shape.width,
            num_layers=shape.layers,
            ffn_width=shape.ffn_width,
        )

    def usual_ffn_width(self, width: int) -> int:
        return VERSIONS[self.version].default_ffn_width(width)

    def check(self, shape: Shape) -> None:
        self.config(shape)

    def skeleton(self, shape: Shape) -> Model:
        with torch.device("meta"):
            return Model(self.config(shape))

    def ends(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        assert isinstance(model, Model)
        return model.emb.weight, model.head.weight

    def mixing_flops(self, shape: Shape, context: int) -> int:
        config = self.config(shape)
        state = config.architecture.state_shapes(config)
        return _STATE_OPERATIONS * shape.layers * sum(map(math.prod, state.values()))

    def objective(self, shape: Shape, options: TrainOptions) -> Objective:
        bound = options.rates[0]  # as in `receptance train`
        return Objective(
            Model(self.config(shape), seed=options.seed, embedding_bound=bound), options
        )

    def learning_rate_scales(self, model: nn.Module) -> Mapping[str, float]:
        assert isinstance(model, Model)
        return model.learning_rate_scales()

    def is_decayed(self, shape: Shape) -> Callable[[str, torch.Size], bool]:
        return VERSIONS[self.version].is_weight_decayed

    def carried(self, model: nn.Module) -> Engine | None:
        assert isinstance(model, Model)
        return model

    def save(self, model: nn.Module, folder: Path, tokenizer: Tokenizer) -> None:
        assert isinstance(model, Model)
        save(model, folder, tokenizer)

    def decoder(self, folder: Path) -> Decoder:
        return EngineDecoder(load_engine(folder)[0])


class EngineDecoder:
    """An engine of this package, with the state of its row."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.state: State | None = None
        self.next = torch.zeros(1, 1, dtype=torch.int64, device=engine.device)

    @torch.no_grad()
    def read(self, tokens: Tensor) -> None:
        """Read tokens, and choose the next one."""
        features, self.state = self.engine.features(tokens[None], self.state)
        self.next = self.engine.head(features[:, -1:]).argmax(-1)

    @torch.no_grad()
    def step(self) -> None:
        """Read the token that was chosen last, and choose the next one."""
        logits, self.state = self.engine(self.next, self.state)
        self.next = logits.argmax(-1)

    @property
    def remembered(self) -> list[Tensor]:
        """The parts of the state; nothing before the first token."""
        return [] if self.state is None else [*self.state.tensors.values()]
