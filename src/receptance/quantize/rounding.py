"""Rounding a matrix to codes.

The scale of int8 comes from the largest weight of a group. For int4 the smallest and the largest
weight would do too, but a narrower range that clips them serves the other weights better. So
several ranges are tried. Each gives codes, least squares give the best scale and minimum for these
codes, and the pair with the smallest error after rounding to bfloat16 is kept.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from receptance.quantize.codes import Quantized, QuantizedKind, ceil_div, check_group

HIGHEST = {"int8": 127, "int4": 15}
"""The largest code of each format."""

# The shares of a group's range that are tried as cuts at either end. Finer steps, or more of them,
# lower the squared error of a trained model's weights by 0.3 % only.
_CUTS = (0.0, 0.025, 0.05, 0.075, 0.1)
_REFITS = 2
# The number of weights that are rounded together; they fit into the cache of a core.
_CHUNK = 1 << 18

# The scales and the minimums of M groups: [M] each, numbers that bfloat16 holds exactly.
Params = tuple[Tensor, Tensor]


def quantize(
    weight: Tensor,
    kind: QuantizedKind,
    group: int | None = None,
    importance: Tensor | None = None,
    *,
    search: bool = True,
) -> Quantized:
    """The codes of a matrix [N,K] of any float type.

    group None means 128 for int8 and 64 for int4. importance [K] >= 0 weighs the squared errors
    of an input's weights in int4's search; without search, int4 spans exactly the weights of a
    group. ValueError if a number is not finite.
    """
    group = check_group(kind, group)
    check_finite(weight)
    _check_importance(importance, weight)
    rows = max(1, _CHUNK // weight.shape[1])
    parts = [_quantize(piece, kind, group, importance, search) for piece in weight.split(rows)]
    codes, scale, minimum = (torch.cat(x) for x in zip(*parts, strict=True))
    return Quantized(kind, group, codes, scale, minimum if kind == "int4" else None)


def check_finite(weight: Tensor) -> None:
    """ValueError unless the weights are a matrix of finite floats."""
    if weight.dim() != 2 or not weight.is_floating_point() or not weight.numel():
        raise ValueError(f"{weight.dtype} {list(weight.shape)} is no matrix of float weights")
    if not weight.isfinite().all():
        bad = int((~weight.isfinite()).sum())
        raise ValueError(f"{bad} of its {weight.numel()} weights are infinite or not numbers")


def _check_importance(importance: Tensor | None, weight: Tensor) -> None:
    if importance is None:
        return
    if importance.shape != weight.shape[1:] or not (importance >= 0).all():
        raise ValueError(
            f"importance {list(importance.shape)} of the inputs of {list(weight.shape)} weights; "
            f"wanted [{weight.shape[1]}] numbers of at least 0"
        )


def _quantize(
    weight: Tensor, kind: QuantizedKind, group: int, importance: Tensor | None, search: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The codes [N,K] of some rows, and their scales and minimums [N,K/G]."""
    rows, inputs = weight.shape
    missing = -inputs % group
    if missing and importance is None:
        importance = torch.ones(inputs)
    # The last group is filled up with copies of its last weight, whose errors count for nothing.
    filled = torch.cat([weight, weight[:, -1:].expand(-1, missing)], dim=1)
    groups = filled.float().view(-1, group)
    if importance is not None:
        padded = torch.cat([importance.float(), torch.zeros(missing)]).view(1, -1, group)
        importance = padded.expand(rows, -1, -1).reshape(groups.shape)
    scale, minimum = parameters(groups, kind, importance, search=search)
    codes = nearest(groups, scale[:, None], minimum[:, None], kind).view(rows, -1)[:, :inputs]
    params = [x.view(rows, ceil_div(inputs, group)).bfloat16() for x in (scale, minimum)]
    return codes.to(torch.int8 if kind == "int8" else torch.uint8), params[0], params[1]


def nearest(w: Tensor, scale: Tensor, minimum: Tensor, kind: QuantizedKind) -> Tensor:
    """The codes that are nearest to weights, as floats; the shapes need only broadcast."""
    lowest = -HIGHEST[kind] if kind == "int8" else 0
    return ((w - minimum) * _inverse(scale)).round_().clamp_(lowest, HIGHEST[kind])


def parameters(
    w: Tensor, kind: QuantizedKind, importance: Tensor | None = None, *, search: bool = True
) -> Params:
    """The scale and the minimum (0 for int8) of each group of weights [M,G], in float32.

    importance [M,G] weighs the squared errors.
    """
    if kind == "int8":
        scale = _rounded(w.abs().amax(1) / HIGHEST[kind])
        return scale, torch.zeros_like(scale)
    plain = _spanned(w)
    if not search:
        return plain
    best = _Search(w, importance).run(plain)
    # The search computes errors from sums, which rounding may have blurred.
    better = _error(w, best, importance) < _error(w, plain, importance)
    return torch.where(better, best[0], plain[0]), torch.where(better, best[1], plain[1])


def _spanned(w: Tensor) -> Params:
    """The scale and the minimum that span each group from its smallest to its largest weight."""
    low, high = w.amin(1), w.amax(1)
    minimum = _rounded_down(low)
    return _rounded((high / HIGHEST["int4"]) - minimum / HIGHEST["int4"]), minimum


def _error(w: Tensor, params: Params, importance: Tensor | None) -> Tensor:
    """The weighted sums of squared errors of groups [M,G]: [M]."""
    scale, minimum = (x[:, None] for x in params)
    codes = nearest(w, scale, minimum, "int4")
    squares = torch.addcmul(minimum, codes, scale).sub_(w).square_()
    return (squares if importance is None else squares.mul_(importance)).sum(1)


class _Search:
    """A search for the scale and the minimum of each group of weights [M,G].

    Least squares give the best pair for the codes of a candidate. Both the pair and its error are
    computed from sums over the group.
    """

    def __init__(self, w: Tensor, importance: Tensor | None) -> None:
        self.w, self.importance = w, importance
        self.weighted = w if importance is None else w * importance
        self.total: Tensor | float = w.shape[1] if importance is None else importance.sum(1)
        self.sum = self.weighted.sum(1)
        self.squares = (self.weighted * w).sum(1)

    def run(self, plain: Params) -> Params:
        """The best scale and minimum that were found, or those of plain."""
        best = *plain, _error(self.w, plain, self.importance)
        low, high = self.w.amin(1), self.w.amax(1)
        span = high - low
        for a, b in itertools.product(_CUTS, _CUTS):
            best = _better(best, self.fit(span * ((1 - a - b) / HIGHEST["int4"]), low + span * a))
        for _ in range(_REFITS):
            best = _better(best, self.fit(best[0], best[1]))
        return best[0], best[1]

    def fit(self, scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best scale and minimum for the codes of a candidate, and their error: [M] each."""
        inverse = _inverse(scale)
        codes = torch.addcmul((-minimum * inverse)[:, None], self.w, inverse[:, None])
        codes = codes.round_().clamp_(0, HIGHEST["int4"])
        counted = codes if self.importance is None else codes * self.importance
        n, w, q = self.total, self.sum, counted.sum(1)
        qq, qw = (counted * codes).sum(1), (codes * self.weighted).sum(1)
        # Where all codes of a group are equal this is NaN, and `_better` keeps the other pair.
        scale = _rounded((qw - q * w / n) / (qq - q * q / n))
        minimum = _rounded((w - scale * q) / n)
        error = self.squares + scale * (scale * qq + 2 * (minimum * q - qw))
        return scale, minimum, error + minimum * (minimum * n - 2 * w)


def _better(
    one: tuple[Tensor, Tensor, Tensor], other: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    wins = other[2] < one[2]
    scale, minimum, error = (torch.where(wins, b, a) for a, b in zip(one, other, strict=True))
    return scale, minimum, error


def _inverse(scale: Tensor) -> Tensor:
    """The inverse of each scale, and 0 for a scale of 0."""
    return torch.where(scale != 0, 1 / scale, 0)


def _rounded(x: Tensor) -> Tensor:
    """The nearest bfloat16 number, where subnormal ones, whose inverse may overflow, become 0."""
    limits = torch.finfo(torch.bfloat16)
    x = x.clamp(-limits.max, limits.max).bfloat16().float()
    return torch.where(x.abs() < limits.tiny, 0, x)


def _rounded_down(x: Tensor) -> Tensor:
    """The largest bfloat16 number that is not above x, so that no weight lies below the range."""
    near = x.bfloat16()
    below = torch.nextafter(near, torch.tensor(-torch.inf, dtype=near.dtype))
    found = torch.where(near.float() > x, below, near).float()
    return found.clamp(min=torch.finfo(torch.bfloat16).min)
