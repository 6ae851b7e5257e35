"""The part that all writers share: tensors go to disk a few million values at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from receptance.formats.ggml import quantize
from receptance.model.architecture import Shape

Schema = Mapping[str, tuple[torch.dtype, Shape]]
"""The type and shape of each tensor of a file by name, in the order in which they are written."""

# The number of values that are converted and written at a time.
_AT_ONCE = 1 << 22


def chunks(tensor: Tensor) -> Iterator[Tensor]:
    """The values in order, in pieces of some millions: [...] -> [n] each, n a multiple of 32."""
    return iter(tensor.detach().reshape(-1).split(_AT_ONCE))


def pieces(name: str, tensor: Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    """The bytes of the values converted to another type, in pieces of some megabytes.

    ValueError when a finite value becomes infinite.
    """
    for values in chunks(tensor):
        converted = values.to("cpu", dtype)
        if bool((converted.isinf() & values.cpu().isfinite()).any()):
            raise ValueError(
                f"{name} has values too large for {str(dtype).removeprefix('torch.')}; "
                "choose another dtype="
            )
        yield converted.contiguous().view(torch.uint8).numpy().data


def blocks(name: str, tensor: Tensor, kind: str) -> Iterator[memoryview]:
    """The bytes of the values as quantized blocks of ggml, in pieces of some megabytes.

    ValueError when a block has values that are not finite, or too large for its scale.
    """
    try:
        for values in chunks(tensor):
            yield quantize(values.float().numpy(), kind).data
    except ValueError as error:
        raise ValueError(f"{name} cannot be written as {kind}: {error}") from None
