"""Weights that transformers divided by powers of two before it saved them.

When a RwkvModel of transformers is evaluated for the first time, it divides the output matrices of
block i by 2**(i // rescale_every) in place (modeling_rwkv.py, _rescale_layers). If it is saved
after that, the directory holds another model, and nothing in it says so. The only sign is that the
matrices halve from one group of blocks to the next. A model could have been trained to be like
that, so the user decides whether to undo it.
Multiplying by the same powers gives back every bit, except those that float16 had no room for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise

from torch import Tensor

from receptance.model.versions import architecture

# transformers divides the matrices whose outputs are added to the residual stream, of RWKV-4 only.
_OUTPUTS = tuple(f"{name}.weight" for name in architecture(4).residual_outputs)
# The largest distance of the step between neighboring blocks from a factor of 2, or of 1, in powers
# of two.
_MARGIN = 0.4


def exponent(name: str, every: int) -> int:
    """The power of two by which transformers divides a tensor of this official name."""
    if not name.endswith(_OUTPUTS):
        return 0
    return int(name.split(".")[1]) // every


class Unscaled(Mapping[str, Tensor]):
    """The tensors as they were before transformers divided them, computed when they are used."""

    def __init__(self, tensors: Mapping[str, Tensor], every: int) -> None:
        self._tensors = tensors
        self._every = every

    def __getitem__(self, name: str) -> Tensor:
        tensor, power = self._tensors[name], exponent(name, self._every)
        return tensor * 2.0**power if power else tensor

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def looks_rescaled(tensors: Mapping[str, Tensor], num_layers: int, every: int) -> bool:
    """Whether the output matrices halve at every block where transformers would have halved them.

    They must do so at each of these blocks, in both kinds of matrices, and on average nowhere else.
    False for a model of a single group of blocks, which transformers does not change.
    """
    if not 0 < every < num_layers:
        return False
    return all(_halves(tensors, kind, num_layers, every) for kind in _OUTPUTS)


def _halves(tensors: Mapping[str, Tensor], kind: str, num_layers: int, every: int) -> bool:
    sizes = [_log_size(tensors[f"blocks.{layer}.{kind}"]) for layer in range(num_layers)]
    if not all(map(math.isfinite, sizes)):
        return False
    steps = {layer: after - before for layer, (before, after) in enumerate(pairwise(sizes), 1)}
    borders = [step for layer, step in steps.items() if layer % every == 0]
    others = [step for layer, step in steps.items() if layer % every]
    inside = sum(others) / len(others) if others else 0.0
    return abs(inside) < _MARGIN and all(abs(step + 1) < _MARGIN for step in borders)


def _log_size(matrix: Tensor) -> float:
    """The binary logarithm of the root mean square of some rows."""
    rows = matrix[:: max(1, len(matrix) // 256)].double()
    square = float(rows.square().mean())
    return math.log2(square) / 2 if square > 0 else -math.inf
