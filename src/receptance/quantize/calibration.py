"""The inputs of a model's matrices on a text: the mean product of every two of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from receptance.model import Model
from receptance.model.parts import Linear

# The number of positions in one pass of the model.
_CHUNK = 256
# The bytes of products held at a time. Products that do not fit are collected by reading the text
# again.
_MEMORY = 2 << 30
LEAST_TOKENS = 64
"""The least number of tokens in a text for calibration."""


class Calibration:
    """The mean products of the inputs of each matrix of a model, over a text's tokens [R,T].

    If they are asked for in the order of `in_order`, they are collected with as few readings of the
    text as the memory (bytes) allows. The model computes in float32.
    """

    def __init__(self, model: Model, tokens: Tensor, *, memory: int = _MEMORY) -> None:
        if tokens.numel() < LEAST_TOKENS:
            raise ValueError(
                f"{tokens.numel()} tokens are too few to calibrate with; give a longer text"
            )
        self.model, self.tokens, self.memory = model, tokens, memory
        self._layers = {
            f"{name}.weight": layer
            for name, layer in model.named_modules()
            if isinstance(layer, Linear)
        }
        self._held: dict[str, Tensor] = {}

    def in_order(self, names: Iterable[str]) -> list[str]:
        """The names in the order in which their products are collected; other names come first."""
        place = {name: index for index, name in enumerate(self._layers)}
        return sorted(names, key=lambda name: place.get(name, -1))

    def moments(self, name: str) -> Tensor | None:
        """Mean products [K,K] float32 of the inputs of a matrix, by the name of its weight.

        None for the embedding, whose rows are looked up and multiplied with nothing.
        """
        if name not in self._layers:
            return None
        if name not in self._held:
            self._held = {}  # The old products are freed first, to make room for the next ones.
            self._held = self._collect(list(self._fitting(name)))
        return self._held[name]

    def _fitting(self, first: str) -> Iterator[str]:
        """The names from the first one on whose products fit into memory, at least that one."""
        names, room = list(self._layers), self.memory
        for name in names[names.index(first) :]:
            room -= 4 * self._layers[name].weight.shape[1] ** 2
            if room < 0 and name != first:
                return
            yield name

    @torch.no_grad()
    def _collect(self, names: list[str]) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}

        def add(name: str, x: Tensor) -> None:
            x = x.flatten(0, -2).float()
            if name in sums:
                sums[name].addmm_(x.T, x)
            else:
                sums[name] = x.T @ x

        with ExitStack() as hooks:
            for name in names:

                def hook(_: Any, inputs: tuple[Tensor], name: str = name) -> None:
                    add(name, inputs[0])

                handle = self._layers[name].register_forward_pre_hook(hook)
                hooks.callback(handle.remove)
            self._read()
        return {name: x.div_(self.tokens.numel()).cpu() for name, x in sums.items()}

    def _read(self) -> None:
        state = None
        for piece in self.tokens.to(self.model.device).split(_CHUNK, dim=1):
            _, state = self.model(piece, state, dtype=torch.float32)
