"""The mechanisms of Table 1 in plain torch, and the operations and bytes that they take.

A mechanism reads q, k and v [T,d] of one head causally into `out` [T,d]. None keeps more than it
has to: what has a recurrent form goes through its text token by token.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from receptance.ops import wkv4

Read = Callable[[Tensor, Tensor, Tensor, Tensor], object]


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """A row of Table 1: what the paper says of it, and the mechanism itself."""

    time: str
    """The time of the table, in words."""
    space: str
    """The space of the table, in words."""
    read: Read
    steps: Callable[[int, int], float]
    """The time of T and d, up to a factor."""
    kept: Callable[[int, int], float]
    """The space of T and d beyond q, k, v and out, up to a factor."""
    dropped: str = ""
    """The term of the table's space that is not in `kept`: inputs, which all have."""
    fast: Read | None = None
    """A form that a machine runs well, if there is one, to be timed."""


def attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """Softmax of all scores of a position with those before it: [T,T]."""
    scores = q @ k.T
    scores /= math.sqrt(q.shape[1])
    later = torch.ones_like(scores, dtype=torch.bool).triu_(1)
    torch.mm(scores.masked_fill_(later, -math.inf).softmax(1), v, out=out)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """Katharopoulos et al. 2020: elu + 1 in place of the softmax, as a recurrence over [d,d]."""
    _recurrent(q, k, v, out, q.shape[1], lambda x: F.elu(x).add_(1))


def performer(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """Choromanski et al. 2021: d log d positive random features in place of the softmax."""
    width = q.shape[1]
    features = round(width * math.log(width))
    drawn = torch.randn(width, features, generator=torch.Generator().manual_seed(0))
    _recurrent(q, k, v, out, features, lambda x: (x @ drawn).sub_(x.square().sum() / 2).exp_())


def _recurrent(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, features: int, mapped: Callable[[Tensor], Tensor]
) -> None:
    sums, total = q.new_zeros(features, v.shape[1]), q.new_zeros(features)
    for t in range(len(q)):
        key, query = mapped(k[t]), mapped(q[t])
        sums.addr_(key, v[t])
        total.add_(key)
        out[t] = (query @ sums) / (query @ total)


def linear_attention_in_chunks(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, chunk: int = 64
) -> None:
    """The same as products of matrices, a chunk after another; T is a multiple of the chunk."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    values = torch.cat([v, v.new_ones(len(v), 1)], dim=1)
    sums = q.new_zeros(q.shape[1], values.shape[1])
    for at in range(0, len(q), chunk):
        some = slice(at, at + chunk)
        read = (q[some] @ k[some].T).tril_() @ values[some] + q[some] @ sums
        sums += k[some].T @ values[some]
        out[some] = read[:, :-1] / read[:, -1:]


def aft(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """Zhai et al. 2021: every pair of positions has a weight of its own, here -|t - i| / 100."""
    for t in range(len(q)):
        pairs = torch.arange(-t, 1.0).div_(100)
        weights = (k[: t + 1] + pairs[:, None]).exp_()
        total = weights.sum(0)
        out[t] = q[t].sigmoid() * weights.mul_(v[: t + 1]).sum(0) / total


def rwkv(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """WKV of equation 16 as its recurrence over [d], receptances included."""
    decay, bonus, state = *_vectors(q.shape[1]), None
    for t in range(len(q)):
        read, state = wkv4(
            decay, bonus, k[None, t : t + 1], v[None, t : t + 1], state, backend="reference"
        )
        out[t] = q[t].sigmoid() * read[0, 0]


def rwkv_at_once(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """The same by the kernel that this machine prefers."""
    read, _ = wkv4(*_vectors(q.shape[1]), k[None], v[None], None)
    torch.mul(q.sigmoid(), read[0], out=out)


def _vectors(width: int) -> tuple[Tensor, Tensor]:
    """Decays from fast to slow, and a bonus of 0."""
    return -torch.logspace(-2, 0, width), torch.zeros(width)


MECHANISMS: Mapping[str, Mechanism] = {
    "Transformer": Mechanism(
        time="O(T²d)",
        space="O(T² + Td)",
        read=attention,
        steps=lambda t, d: t * t * d,
        kept=lambda t, d: t * t,
        dropped="Td",
        fast=attention,
    ),
    "Linear Transformer": Mechanism(
        time="O(Td²)",
        space="O(Td + d²)",
        read=linear_attention,
        steps=lambda t, d: t * d * d,
        kept=lambda t, d: d * d,
        dropped="Td",
        fast=linear_attention_in_chunks,
    ),
    "Performer": Mechanism(
        time="O(Td² log d)",
        space="O(Td log d + d² log d)",
        read=performer,
        steps=lambda t, d: t * d * d * math.log(d),
        kept=lambda t, d: d * d * math.log(d),
        dropped="Td log d",
    ),
    "AFT-full": Mechanism(
        time="O(T²d)",
        space="O(Td)",
        read=aft,
        steps=lambda t, d: t * t * d,
        kept=lambda t, d: t * d,
    ),
    "RWKV": Mechanism(
        time="O(Td)",
        space="O(d)",
        read=rwkv,
        steps=lambda t, d: t * d,
        kept=lambda t, d: d,
        fast=rwkv_at_once,
    ),
}
"""The rows of Table 1 that are measured."""


def drawn(length: int, width: int) -> list[Tensor]:
    """q, k and v [T,d] and an empty out."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(length, width, generator=generator) for _ in range(3)]
    return [*inputs, torch.empty(length, width)]


def counted(read: Read, length: int, width: int) -> dict[str, int]:
    """The operations of a call, and the most bytes that it holds beyond q, k, v and out."""
    given = drawn(length, width)
    with Counter(given) as counter:
        read(*given)
    return {"operations": counter.operations, "bytes": counter.most}


class Counter(TorchDispatchMode):
    """Counts operations and bytes of all tensors that are made inside the block.

    Products of matrices count as torch's FLOP counter has them, everything else by the numbers that
    it writes or sums up. Views count nothing. Tensors that are given are there before, and those
    that are remembered count from the beginning until they are gone; whoever holds them inside the
    block makes them stay.
    """

    def __init__(self, given: Iterable[Tensor], remembered: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.operations = self.most = self._held = 0
        self._known = {x.untyped_storage().data_ptr() for x in given}
        for tensor in remembered:
            self._hold(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor)]
        made = [x for x in tensors if x.untyped_storage().data_ptr() not in self._known]
        if made or func._schema.is_mutable:
            self.operations += self._cost(func, args, kwargs or {}, out, tensors)
        for tensor in made:
            self._hold(tensor)
        return out

    def _cost(self, func: Any, args: Any, kwargs: Any, out: Any, tensors: list[Tensor]) -> int:
        if func._overloadpacket in flop_registry:
            flops: int = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
            return flops
        read = [x.numel() for x in args if isinstance(x, Tensor)]
        return max(read + [x.numel() for x in tensors])

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self._known:
            return
        self._known.add(place)
        self._held += size
        self.most = max(self.most, self._held)
        # A tensor may be gone while a view of it is there, so the storage is asked.
        weakref.finalize(storage, self._release, place, size)

    def _release(self, place: int, size: int) -> None:
        self._known.discard(place)
        self._held -= size
