"""Parameters and FLOPs, counted in the same way for all architectures, and sizes that match."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from receptance.evaluation.compare.families import Family, Shape

# Widths of feed-forward networks are multiples of the first, which kernels like, or, in models too
# small to match so, of the second.
_STEPS = (8, 1)
# Matched models differ at most by this share.
TOLERANCE = 0.02


@dataclass(frozen=True)
class Counts:
    """What a model has, and what it costs."""

    parameters: int
    """All values in all tensors."""
    non_embedding: int
    """Those without the embedding and the head, which all models of a size have alike."""
    forward_flops: int
    """The operations per token of a forward pass over a sequence of the context: two per weight in
    a matrix, the looked-up embedding excepted, and those that mix tokens."""

    @property
    def training_flops(self) -> int:
        """The operations of both passes; the backward pass costs twice the forward pass."""
        return 3 * self.forward_flops


def counts(family: Family, shape: Shape, context: int) -> Counts:
    """Count the tensors of a model as its own library makes it."""
    model = family.skeleton(shape)
    sizes = {id(x): x.numel() for x in model.parameters()}
    embedding, head = family.ends(model)
    matrices = sum(x.numel() for x in model.parameters() if x.dim() == 2 and x is not embedding)
    ends = {id(embedding), id(head)}
    return Counts(
        parameters=sum(sizes.values()),
        non_embedding=sum(n for key, n in sizes.items() if key not in ends),
        forward_flops=2 * matrices + family.mixing_flops(shape, context),
    )


def matched(
    family: Family,
    reference: Family,
    shape: Shape,
    context: int,
    by: Literal["parameters", "flops"] = "parameters",
) -> Shape:
    """The shape with the width of the feed-forward networks at which the family matches reference.

    shape is that of the reference. ValueError if no such width makes them equal within 2 %.
    """
    if family is reference:
        return shape

    def cost(which: Family, like: Shape) -> int:
        found = counts(which, like, context)
        return found.non_embedding if by == "parameters" else found.training_flops

    wanted = cost(reference, shape)
    # Both counts are linear in the width.
    one, two = (cost(family, replace(shape, ffn_width=width)) for width in (1, 2))
    width = 1 + (wanted - one) / (two - one)
    for step in _STEPS:
        fitted = replace(shape, ffn_width=max(step, step * round(width / step)))
        found = cost(family, fitted)
        if abs(found - wanted) <= TOLERANCE * wanted:
            return fitted
    raise ValueError(
        f"at {shape.width}x{shape.layers} {family.name} cannot have the {by} of "
        f"{reference.name}: {found:,} is as near as it comes to {wanted:,}; take a larger "
        "width, or fewer models"
    )
