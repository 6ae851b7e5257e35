"""How an operator becomes a custom op of torch, with a second one for its gradient.

A custom op takes tensors one by one: the fields of the operator's input tuple, in order, and then
the name of the backend. Only this module knows that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from receptance.ops.backends import KERNELS

Shape = tuple[int, ...]


class Operator(NamedTuple):
    """What distinguishes one operator from another.

    The first fields of `inputs` are differentiable, as many as there are `gradients`. The fields of
    `backward_inputs` are gradients of results (grad_...), inputs of the same name, and one more:
    the states that the forward pass kept.
    """

    name: str
    inputs: type[Any]  # the NamedTuple of a forward pass
    backward_inputs: type[Any]  # the NamedTuple of a backward pass
    results: tuple[str, ...]  # for every result but the last, an input of its shape and dtype
    gradients: tuple[str, ...]  # for every gradient, a backward input of its shape and dtype
    kept_shape: Callable[[Any, int], Shape]  # the shape of so many kept states, for given inputs


def register(operator: Operator) -> None:
    """Define receptance::NAME and receptance::NAME_backward, with shapes and derivatives."""
    name, forward_inputs = operator.name, operator.inputs
    backward_inputs, kernels = operator.backward_inputs, KERNELS[operator.name]
    fields = backward_inputs._fields
    from_results = [field for field in fields if field.startswith("grad_")]

    def forward(*flat: Any) -> tuple[Tensor, ...]:
        return kernels[flat[-1]].forward(forward_inputs(*flat[:-1]))

    def forward_shapes(*flat: Any) -> tuple[Tensor, ...]:
        x = forward_inputs(*flat[:-1])
        results = [_like(getattr(x, field)) for field in operator.results]
        count = kernels[flat[-1]].kept_states(x.key.shape[1])
        kept = results[-1].new_empty(operator.kept_shape(x, count))
        return *results, kept

    def backward(*flat: Any) -> tuple[Tensor, ...]:
        return kernels[flat[-1]].backward(backward_inputs(*flat[:-1]))

    def backward_shapes(*flat: Any) -> tuple[Tensor, ...]:
        x = backward_inputs(*flat[:-1])
        return tuple(_like(getattr(x, field)) for field in operator.gradients)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, ctx.backend = forward_inputs(*inputs[:-1]), inputs[-1]
        ctx.save_for_backward(*(getattr(x, f, output[-1]) for f in fields[len(from_results) :]))

    def differentiate(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x = backward_inputs(*grads[: len(from_results)], *ctx.saved_tensors)
        found = getattr(torch.ops.receptance, f"{name}_backward").default(*x, ctx.backend)
        return *found, *[None] * (len(forward_inputs._fields) + 1 - len(found))

    def differentiate_twice(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"{name} has no autograd formula for its second derivative")

    # This does what torch.library.custom_op does, without its wrapper, which costs as much time as
    # a small step.
    for op, function, shapes, signature in (
        (name, forward, forward_shapes, _schema(forward_inputs, len(operator.results) + 1)),
        (
            f"{name}_backward",
            backward,
            backward_shapes,
            _schema(backward_inputs, len(operator.gradients)),
        ),
    ):
        torch.library.define(f"receptance::{op}", signature)
        torch.library.impl(f"receptance::{op}", "CompositeExplicitAutograd", function)
        torch.library.register_fake(f"receptance::{op}", shapes)
    torch.library.register_autograd(
        f"receptance::{name}", differentiate, setup_context=setup_context
    )
    torch.library.register_autograd(f"receptance::{name}_backward", differentiate_twice)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _schema(arguments: type[Any], results: int) -> str:
    """The signature of an op: a tensor for every field, then the backend -> so many tensors."""
    optional = arguments._field_defaults
    tensors = [f"Tensor{'?' * (name in optional)} {name}" for name in arguments._fields]
    return f"({', '.join(tensors)}, str backend) -> ({', '.join(['Tensor'] * results)})"
