"""Telling whether two sets of weights are the same model, with one tensor of each in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from receptance.config import ModelConfig
from receptance.formats.names import tensor_shapes
from receptance.formats.writing import chunks
from receptance.model import Model
from receptance.model.parts import Reading

# The rows and tokens of the text that logits are computed for.
_PROBE = (1, 64)
# The number of the head's rows that are converted to float32 at a time.
_ROWS = 1 << 12
# Rounding to float16 moves the smallest of its numbers by at most this much. The scales of
# quantized blocks can be that small.
_SCALE_ERROR = 2.0**-25

Same = Callable[[str, Tensor, Tensor], bool]
"""Tells whether two tensors of a name are the same, as far as the type of the second allows."""


@dataclass(frozen=True)
class Difference:
    """The distance between the logits that two sets of weights give for the same tokens."""

    largest: float
    """The largest difference of any logit."""
    relative: float
    """The largest difference, divided by the largest logit."""


@torch.no_grad()
def probe(config: ModelConfig, tensors: Mapping[str, Tensor]) -> Tensor:
    """The logits of fixed tokens, computed in float32: [B,T,V].

    Each tensor is read when it is needed and released after that. No copy in float32 is kept.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, _PROBE, generator=generator)
    with torch.device("meta"):
        model = Model(config).eval()
    _lend(model, tensors)
    x = tensors["emb.weight"][tokens].float()
    handed: list[Tensor] = []
    for block in model.blocks:
        state = config.architecture.empty_layer(config, len(tokens), x)
        x, _, *handed = block(x, state, Reading(), 0.0, *handed)
    x = model.ln_out(x)
    rows = tensors["head.weight"].split(_ROWS)
    return torch.cat([F.linear(x, part.float()) for part in rows], dim=-1)


def _lend(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make every module read its tensors before it computes, and release them after that."""

    def give(module: nn.Module, prefix: str) -> None:
        for name, _ in list(module.named_parameters(recurse=False)):
            tensor = tensors[f"{prefix}.{name}"]
            # Modules convert a matrix to float32 when they use it, but expect float32 vectors.
            value = tensor if tensor.dim() == 2 else tensor.float()
            setattr(module, name, nn.Parameter(value, requires_grad=False))

    def take(module: nn.Module) -> None:
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))

    for prefix, module in model.named_modules():
        module.register_forward_pre_hook(lambda module, _, prefix=prefix: give(module, prefix))
        module.register_forward_hook(lambda module, *_: take(module))


def difference(wanted: Tensor, got: Tensor) -> Difference:
    """The distance between two sets of logits [B,T,V]; NaN if any of them is NaN."""
    largest = float((wanted - got).abs().max())
    return Difference(largest, largest / max(float(wanted.abs().max()), 1e-30))


def differing(
    config: ModelConfig, there: Mapping[str, Tensor], here: Mapping[str, Tensor], same: Same
) -> list[str]:
    """The names of tensors that are not the same in two sets of weights."""
    return [name for name in tensor_shapes(config) if not same(name, there[name], here[name])]


def equal(there: Tensor, here: Tensor, dtype: torch.dtype) -> bool:
    """Whether the values of `there`, rounded to a type, have exactly the bits of `here`."""
    pairs = zip(chunks(there), chunks(here), strict=True)
    return all(torch.equal(_bits(x.to(dtype).to(y.dtype)), _bits(y)) for x, y in pairs)


def _bits(values: Tensor) -> Tensor:
    # Bytes are compared because NaN is not equal to itself, while -0 is equal to 0.
    return values.view(torch.uint8)


def near(there: Tensor, here: Tensor, block: int, share: float) -> bool:
    """Whether no value is off by more than a share of the largest value in its block.

    A block is that many values in a row.
    """
    for x, y in zip(chunks(there), chunks(here), strict=True):
        blocks = x.float().view(-1, block)
        error = (blocks - y.view(-1, block)).abs().amax(1)
        if not (error <= share * blocks.abs().amax(1) + _SCALE_ERROR / share).all():
            return False
    return True
