"""Less memory for the backward pass, without a word of it in the model.

Half of what autograd would save of a block are sums and products of elements, the inputs of its
matrices. They are cheap to compute from tensors that are saved anyway, so `Recomputing` saves how
they were computed instead. It watches a forward pass from outside, as torch's function modes do.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_Key = tuple[int, int, torch.dtype]


class _Recipe(NamedTuple):
    """How a tensor is computed again."""

    function: Callable[..., Tensor]
    arguments: tuple[Any, ...]


class _Known(NamedTuple):
    """A tensor of this forward pass that need not be saved, for as long as it lives."""

    tensor: weakref.ref[Tensor]
    recipe: _Recipe


class Recomputing(TorchFunctionMode):
    """A context for forward passes; gradients are the same, to the bit.

    - Mixtures (torch.lerp), products and squares are recomputed in the backward pass.
    - What was concatenated is read from the concatenation, so only one of the two is kept.
    - The gradient of a square is computed in two passes over memory, autograd's takes four.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[_Key, _Known] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        super().__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        self._hooks.__exit__(kind, error, trace)
        self._known.clear()

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the function; note how its result is computed if that is cheap."""
        if not torch.is_grad_enabled():
            return function(*args, **(kwargs or {}))
        if function is Tensor.square:
            return self._note(_Square.apply(*args), torch.square, args)
        out = function(*args, **(kwargs or {}))
        if function is torch.cat and isinstance(args[0], list):
            self._note_parts(out, args[0], (kwargs or {}).get("dim", 0))
        elif not kwargs and function in (torch.lerp, Tensor.mul):
            self._note(out, function, args)
        return out

    def _note(self, out: Tensor, function: Callable[..., Tensor], args: tuple[Any, ...]) -> Tensor:
        if out.requires_grad and out.is_contiguous():
            key = _key(out)
            living = weakref.ref(out, lambda _: self._known.pop(key, None))
            kept = tuple(self._kept(x) if isinstance(x, Tensor) else x for x in args)
            self._known[key] = _Known(living, _Recipe(function, kept))
        return out

    def _kept(self, argument: Tensor) -> Tensor:
        """A tensor without its history or, if it was concatenated, its place in the whole."""
        known = self._find(argument)
        return (
            known.arguments[0] if known and known.function is Tensor.detach else argument.detach()
        )

    def _note_parts(self, whole: Tensor, parts: list[Tensor], dim: int) -> None:
        start = 0
        for part in parts:
            place = whole.detach().narrow(dim, start, part.shape[dim])
            if part.numel():
                self._note(part, Tensor.detach, (place,))
            start += part.shape[dim]

    def _pack(self, saved: Tensor) -> Tensor | tuple[_Recipe, torch.Size]:
        recipe = self._find(saved) if saved.is_contiguous() else None
        return saved if recipe is None else (recipe, saved.shape)

    def _find(self, tensor: Tensor) -> _Recipe | None:
        """The recipe of a tensor, or of the one that it is a view of all elements of."""
        known = self._known.get(_key(tensor))
        return None if known is None or known.tensor() is None else known.recipe


def _unpack(packed: Tensor | tuple[_Recipe, torch.Size]) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    recipe, shape = packed
    with torch.no_grad():
        return recipe.function(*recipe.arguments).reshape(shape)


def _key(tensor: Tensor) -> _Key:
    return tensor.data_ptr(), tensor.numel(), tensor.dtype


class _Square(torch.autograd.Function):
    """x^2, with the gradient 2 x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (x * grads[0]).mul_(2)
