"""Are two sets of weights the same model? Answered with one tensor of each in memory."""

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

_PROBE = (1, 64)
_ROWS = 1 << 12  # of the head that are float32 at once

# What rounding moves the smallest float16 numbers, which scales of quantized blocks may be.
_SCALE_ERROR = 2.0**-25

Same = Callable[[str, Tensor, Tensor], bool]
"""Whether two tensors of this name are the same, as far as the type of the second one allows."""


@dataclass(frozen=True)
class Difference:
    """How far the logits of two sets of weights are apart, on the same tokens."""

    largest: float
    """Of all logits."""
    relative: float
    """The same by the largest logit there is."""


@torch.no_grad()
def probe(config: ModelConfig, tensors: Mapping[str, Tensor]) -> Tensor:
    """Logits on tokens that are the same every time, computed in float32: [B,T,V].

    Each tensor is asked for when it is needed, and let go. None stays in memory as float32.
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
    """Let the modules have their tensors while they compute and no longer."""

    def give(module: nn.Module, prefix: str) -> None:
        for name, _ in list(module.named_parameters(recurse=False)):
            tensor = tensors[f"{prefix}.{name}"]
            # Matrices are widened when they are used; decays have to be before.
            value = tensor if tensor.dim() == 2 else tensor.float()
            setattr(module, name, nn.Parameter(value, requires_grad=False))

    def take(module: nn.Module) -> None:
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))

    for prefix, module in model.named_modules():
        module.register_forward_pre_hook(lambda module, _, prefix=prefix: give(module, prefix))
        module.register_forward_hook(lambda module, *_: take(module))


def difference(wanted: Tensor, got: Tensor) -> Difference:
    """Between logits: [B,T,V] twice; not a number if some of them are none."""
    largest = float((wanted - got).abs().max())
    return Difference(largest, largest / max(float(wanted.abs().max()), 1e-30))


def differing(
    config: ModelConfig, there: Mapping[str, Tensor], here: Mapping[str, Tensor], same: Same
) -> list[str]:
    """The names of tensors that are not the same in two sets of weights."""
    return [name for name in tensor_shapes(config) if not same(name, there[name], here[name])]


def equal(there: Tensor, here: Tensor, dtype: torch.dtype) -> bool:
    """Whether the values there are, rounded to a type, those here, to the bit."""
    pairs = zip(chunks(there), chunks(here), strict=True)
    return all(torch.equal(_bits(x.to(dtype).to(y.dtype)), _bits(y)) for x, y in pairs)


def _bits(values: Tensor) -> Tensor:
    # As numbers, NaN differs from itself, and -0 does not from 0.
    return values.view(torch.uint8)


def near(there: Tensor, here: Tensor, block: int, share: float) -> bool:
    """Whether values differ by at most a share of the largest one in their block of so many."""
    for x, y in zip(chunks(there), chunks(here), strict=True):
        blocks = x.float().view(-1, block)
        error = (blocks - y.view(-1, block)).abs().amax(1)
        if not (error <= share * blocks.abs().amax(1) + _SCALE_ERROR / share).all():
            return False
    return True
