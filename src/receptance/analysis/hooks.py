"""`record` and `patch`: read and write what a model computes, under a name for each intermediate.

Both act on all calls of the model inside a `with` block. A text may be read in one call or token by
token; positions are counted over all calls, and what is recorded is the same.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from receptance.analysis.places import Spot, chosen
from receptance.analysis.watching import token_by_token, watching
from receptance.model import Model

Change = float | Tensor | Callable[[Tensor], Tensor]
"""What is written: a number, a tensor [B or 1, T or 1, ...], or a function of the old value."""


class Cache(Mapping[str, Tensor]):
    """What was recorded, by name: tensors [B,T,...] over all tokens that were read so far."""

    def __init__(self, known: Sequence[str]) -> None:
        self._pieces: dict[str, list[Tensor]] = {name: [] for name in known}

    def add(self, name: str, value: Tensor) -> None:
        """Append what one call computed, [B,t,...], to what is known of a name."""
        self._pieces[name].append(value)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._pieces:
            raise KeyError(f"{name} was not recorded; these were: {', '.join(self._pieces)}")
        pieces = self._pieces[name]
        if not pieces:
            raise KeyError(f"{name} has not been computed yet: call the model inside `with record`")
        if len(pieces) > 1:
            pieces[:] = [torch.cat(pieces, dim=1)]
        return pieces[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def stack(self, name: str) -> Tensor:
        """One tensor [L,B,T,...] of the same name in all recorded blocks, such as "att.wkv"."""
        found = [key for key in self if key.split(".", 2)[2:] == [name]]
        if not found:
            raise KeyError(f"{name} was recorded in no block")
        return torch.stack([self[key] for key in found])

    def __repr__(self) -> str:
        rows = [f"  {name}: {about}" for name, about in self._about()]
        return "\n".join([f"Cache of {len(self)} intermediates", *rows])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{html.escape(about)}</td></tr>"
            for name, about in self._about()
        )
        return f"<table><tr><th>intermediate</th><th>values</th></tr>{rows}</table>"

    def _about(self) -> Iterator[tuple[str, str]]:
        for name, pieces in self._pieces.items():
            if not pieces:
                yield name, "not computed"
                continue
            value = self[name]
            spread = value.detach().float().std(correction=0).item() if value.numel() else 0.0
            kind = str(value.dtype).removeprefix("torch.")
            yield name, f"{kind} {[*value.shape]}, deviation {spread:.3g}"


@contextmanager
def record(model: Model, *patterns: str, detach: bool = True) -> Iterator[Cache]:
    """Record intermediates of all calls of the model inside the `with` block.

    Names are those of `names(model)`; in a pattern `*` stands for one part of a name and `**` for
    any number of parts, as in "blocks.*.att.wkv" and "blocks.3.**". What `patch` writes is recorded
    as it was written. A block whose state is recorded runs token by token, with the same result.
    With detach=False the tensors keep their autograd history. ValueError for a pattern that
    matches nothing.
    """
    found = chosen(model, patterns)
    cache = Cache([spot.name for spot in found])
    with ExitStack() as stack:
        for spot in found:
            _enter(stack, model, spot, _Reader(spot, cache, detach))
        yield cache


@contextmanager
def patch(
    model: Model, pattern: str, change: Change, *, where: Sequence[int] | Tensor | None = None
) -> Iterator[None]:
    """Write intermediates in all calls of the model inside the `with` block; see `record`.

    change is a number, a tensor that fits [B,T,...] by broadcasting (one that was recorded of the
    same text, for example), or a function of the tensor [B,t,...] that a call computed. where
    chooses positions: their numbers, counted from the first token read inside the block, or bools
    [B or 1, T]. None means everywhere.

    ValueError for a pattern that matches nothing, a change that does not fit, or, at the end of the
    block, a position that was never computed: the change would have had no effect there.
    """
    mask = _mask(where, model.device)
    writers = [_Writer(spot, change, mask) for spot in chosen(model, [pattern])]
    with ExitStack() as stack:
        for writer in writers:
            _enter(stack, model, writer.spot, writer)
        yield
    for writer in writers:
        writer.check_reached()


def _enter(stack: ExitStack, model: Model, spot: Spot, watcher: _Watching) -> None:
    if model.recompute:
        raise ValueError(
            "the model recomputes activations in the backward pass, where they would be seen "
            "twice; set model.recompute = False first"
        )
    stack.enter_context(watching(spot.owner, spot.attribute, watcher))
    if spot.block is not None:
        stack.enter_context(token_by_token(spot.block))


def _mask(where: Sequence[int] | Tensor | None, device: torch.device) -> Tensor | None:
    """Positions or bools as bools [B or 1, T]."""
    if where is None:
        return None
    mask = torch.as_tensor(where, device=device)
    if mask.dtype == torch.bool:
        if mask.dim() != 2:
            raise ValueError(f"where is bools {[*mask.shape]}; wanted [B or 1, T]")
        return mask
    if mask.dim() != 1 or mask.is_floating_point() or not mask.numel() or int(mask.min()) < 0:
        raise ValueError(f"where is {where!r}; wanted numbers of positions, which begin at 0")
    return torch.zeros(1, int(mask.max()) + 1, dtype=torch.bool, device=device).index_fill_(
        1, mask.long(), True
    )


class _Watching:
    """A watcher that takes one tensor out of arguments or results, and may put another back."""

    writes = False

    def __init__(self, spot: Spot) -> None:
        self.spot = spot

    def see(self, value: Tensor) -> Tensor:
        """Look at the tensor [B,t,...] of one call, and return the one that takes its place."""
        raise NotImplementedError

    def before(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if self.spot.place.side != "argument":
            return arguments
        return self._seen(arguments)

    def after(self, result: Any) -> Any:
        if self.spot.place.side != "result":
            return result
        return self._seen(result) if isinstance(result, tuple) else self.see(result)

    def _seen(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        index, field = self.spot.place.number, self.spot.field
        old = values[index]
        if field is None:
            new = self.see(old)
        elif not values[0].shape[1]:  # A call without tokens leaves no state after a token.
            return values
        else:
            new = old._replace(**{field: self.see(getattr(old, field)[:, None])[:, 0]})
        return *values[:index], new, *values[index + 1 :]


class _Reader(_Watching):
    def __init__(self, spot: Spot, cache: Cache, detach: bool) -> None:
        super().__init__(spot)
        self._cache, self._detach = cache, detach

    def see(self, value: Tensor) -> Tensor:
        self._cache.add(self.spot.name, value.detach() if self._detach else value)
        return value


class _Writer(_Watching):
    writes = True

    def __init__(self, spot: Spot, change: Change, mask: Tensor | None) -> None:
        super().__init__(spot)
        self._change, self._mask, self._read = change, mask, 0

    def see(self, value: Tensor) -> Tensor:
        begin, end = self._read, self._read + value.shape[1]
        self._read = end
        new = self._new(value, begin, end)
        if self._mask is None:
            return new
        here = self._mask[:, begin:end]
        here = torch.nn.functional.pad(here, (0, value.shape[1] - here.shape[1]))
        if here.shape[0] not in (1, value.shape[0]):
            raise ValueError(f"where has {here.shape[0]} rows and the text {value.shape[0]}")
        return torch.where(here.reshape(*here.shape, *[1] * (value.dim() - 2)), new, value)

    def _new(self, value: Tensor, begin: int, end: int) -> Tensor:
        """The change for the positions from begin to end, in the shape of the old value."""
        if callable(self._change):
            new = self._change(value)
            self._check(isinstance(new, Tensor) and new.shape == value.shape, new, value)
            return new
        if not isinstance(self._change, Tensor):
            return torch.full_like(value, self._change)
        new = self._change.to(value.device, value.dtype)
        if new.dim() == value.dim() and new.shape[1] > 1:
            chosen_end = end if self._mask is None else min(end, self._mask.shape[1])
            self._check(chosen_end <= max(begin, new.shape[1]), new, value)
            new = new[:, begin:end]
            # Positions that the change does not have are not chosen; they get any value.
            missing = value.shape[1] - new.shape[1]
            new = torch.cat([new, new.new_zeros(len(new), missing, *new.shape[2:])], dim=1)
        try:
            return new.expand_as(value)
        except RuntimeError:
            self._check(False, new, value)
            raise

    def _check(self, fits: bool, new: Any, value: Tensor) -> None:
        if not fits:
            found = [*new.shape] if isinstance(new, Tensor) else type(new).__name__
            raise ValueError(
                f"{self.spot.name} is {[*value.shape]} at position {self._read - value.shape[1]}, "
                f"and what is to be written is {found}"
            )

    def check_reached(self) -> None:
        """ValueError if a chosen position was never computed."""
        if self._mask is not None and bool(self._mask[:, self._read :].any()):
            last = int(self._mask.any(0).nonzero().max())
            raise ValueError(
                f"{self.spot.name} was not changed at position {last}: the model read "
                f"{self._read} tokens inside the block"
            )
