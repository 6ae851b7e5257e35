"""Quantizing all tensors of a model, one after another."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from receptance.quantize.calibration import Calibration
from receptance.quantize.codes import Quantized, QuantizedKind, check_group
from receptance.quantize.feedback import quantize_with_feedback
from receptance.quantize.rounding import quantize


def quantize_tensors(
    tensors: Mapping[str, Tensor],
    kind: QuantizedKind,
    group: int | None = None,
    calibration: Calibration | None = None,
    matrices: Collection[str] | None = None,
) -> Iterator[tuple[str, Quantized | Tensor]]:
    """A model's tensors by official name: matrices as codes, all others as float32.

    Tensors are quantized one at a time, so that memory holds only the largest of them beside those
    that the caller keeps. group None means 128 for int8 and 64 for int4. matrices are the names of
    the tensors to quantize (`Architecture.layouts`); None means all tensors with two axes.
    ValueError names a tensor with values that are not finite.
    """
    if matrices is None:
        matrices = {name for name, x in tensors.items() if x.dim() == 2}
    group = check_group(kind, group)
    if calibration and kind == "int8":
        raise ValueError("int8 is exact enough without a text to calibrate with; leave it out")
    names = calibration.in_order(tensors) if calibration else list(tensors)
    for name in names:
        tensor = tensors[name].detach().cpu()
        try:
            if name in matrices:
                yield name, _quantize(name, tensor, kind, group, calibration)
            else:
                yield name, _as_float32(tensor)
        except ValueError as error:
            raise ValueError(f"{name} cannot be quantized: {error}") from None


def _quantize(
    name: str, tensor: Tensor, kind: QuantizedKind, group: int, calibration: Calibration | None
) -> Quantized:
    moments = calibration.moments(name) if calibration else None
    if moments is None:
        return quantize(tensor, kind, group)
    return quantize_with_feedback(tensor, moments, group)


def _as_float32(tensor: Tensor) -> Tensor:
    """The tensor as float32, for those that are too small and too important to be quantized."""
    if not tensor.isfinite().all():
        raise ValueError("it has numbers that are infinite or none")
    return tensor.to(torch.float32)
