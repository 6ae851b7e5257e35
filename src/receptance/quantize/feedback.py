"""Quantizing to int4 with feedback: weights rounded later undo the errors of those before them.

Inputs are not independent. With H the mean of x x' over the inputs x of a text, the mean squared
error of an output is d' H d, where d are the errors of its weights. Inputs are rounded one after
another, and the error of each is handed on to the weights that are not rounded yet, as well as
H allows: with H^-1 = U' U, U upper triangular, an error e of input j changes weight k > j by
-e U[j,k] / U[j,j] (Frantar et al., GPTQ, arXiv 2210.17323, section 3, step 3).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from receptance.quantize.codes import Quantized, check_group
from receptance.quantize.rounding import check_finite, nearest, parameters

# Damping (GPTQ's percdamp): this share of the mean of H's diagonal is added to the diagonal.
# Without it, inputs that hardly vary would be handed all the errors.
_DAMPING = 0.01
# The number of outputs that are rounded at a time; it bounds the memory, for a head has many.
_OUTPUTS = 4096


def quantize_with_feedback(weight: Tensor, moments: Tensor, group: int | None = None) -> Quantized:
    """The int4 codes of a matrix [N,K] for inputs whose mean products are moments [K,K].

    ValueError if a number is not finite.
    """
    group = check_group("int4", group)
    check_finite(weight)
    inputs = weight.shape[1]
    if moments.shape != (inputs, inputs) or not moments.isfinite().all():
        raise ValueError(
            f"mean products {list(moments.shape)} of {inputs} inputs; wanted finite numbers "
            f"[{inputs},{inputs}]"
        )
    # Only the ratios of the moments matter, so they are scaled to about 1, where float32 is in no
    # danger of overflow or underflow. A power of two keeps every digit.
    _, exponent = math.frexp(float(moments.diagonal().double().mean()))
    moments = (moments.double() * 2.0**-exponent).float()
    importance, spread = moments.diagonal(), _spread(moments)
    pieces = weight.split(_OUTPUTS)
    parts = [_quantize(piece, group, importance, spread) for piece in pieces]
    codes, scale, minimum = (torch.cat(x, dim=1).T.contiguous() for x in zip(*parts, strict=True))
    return Quantized("int4", group, codes, scale, minimum)


def _spread(moments: Tensor) -> Tensor:
    """U, upper triangular, with U' U the inverse of the damped moments [K,K]."""
    damped = moments.clone()
    mean = float(damped.diagonal().mean())
    damped.diagonal().add_(_DAMPING * mean if mean > 0 else 1)
    # Flipping both axes turns Cholesky's lower triangle into an upper one, R, with moments = R R'.
    root = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    return torch.linalg.solve_triangular(root, torch.eye(len(root)), upper=True)


def _quantize(
    weight: Tensor, group: int, importance: Tensor, spread: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The codes [K,N] of some outputs, and their scales and minimums [K/G,N]."""
    left = weight.float().T.clone(memory_format=torch.contiguous_format)
    codes = torch.empty_like(left, dtype=torch.uint8)
    params = []
    for start in range(0, len(left), group):
        stop = min(start + group, len(left))
        inputs = slice(start, stop)
        weights = left[inputs].T.contiguous()
        counted = importance[inputs].expand(weights.shape)
        scale, minimum = parameters(weights, "int4", counted)
        errors = _round(left[inputs], scale, minimum, spread[inputs, inputs], codes[inputs])
        left[stop:].addmm_(spread[inputs, stop:].T, errors, alpha=-1)
        params.append((scale.bfloat16(), minimum.bfloat16()))
    scales, minimums = (torch.stack(x) for x in zip(*params, strict=True))
    return codes, scales, minimums


def _round(left: Tensor, scale: Tensor, minimum: Tensor, spread: Tensor, codes: Tensor) -> Tensor:
    """Round the inputs of a group [G,N] in turn, write their codes, return errors / U[j,j]."""
    errors = torch.empty_like(left)
    for j in range(len(left)):
        code = nearest(left[j], scale, minimum, "int4")
        codes[j] = code
        errors[j] = (left[j] - torch.addcmul(minimum, code, scale)) / spread[j, j]
        left[j + 1 :].addr_(spread[j, j + 1 :], errors[j], alpha=-1)
    return errors
