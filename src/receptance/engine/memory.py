"""Memory for weights, which every token reads from one end to the other."""

from __future__ import annotations

import math
import mmap
from dataclasses import replace

import torch
from torch import Tensor

from receptance.quantize.packing import Kind, Layout, Packed, dtypes, shapes

_ALIGNMENT = 64  # a line of the cache


class Arena:
    """One piece of memory for the tensors of a model, in huge pages where Linux has them.

    The pages of a mapped file lie scattered, and a processor's prefetching ends with each of them.
    """

    def __init__(self, nbytes: int) -> None:
        self._bytes, self._used = allocate(nbytes), 0

    def hold(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor in the next bytes; the memory lives as long as any of them."""
        place = self._bytes[self._used : self._used + tensor.nbytes]
        self._used += aligned(tensor.nbytes)
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def hold_packed(self, packed: Packed) -> Packed:
        """The same matrix, its codes and parameters copied into the next bytes."""
        params = None if packed.params is None else self.hold(packed.params)
        return replace(packed, data=self.hold(packed.data), params=params)


def aligned(nbytes: int) -> int:
    """What a tensor of so many bytes takes in an arena."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def room(kind: Kind, layout: Layout, outputs: int, inputs: int, group: int) -> int:
    """Bytes that a packed matrix takes in an arena."""
    parts = zip(dtypes(kind), shapes(kind, layout, outputs, inputs, group), strict=True)
    return sum(aligned(d.itemsize * math.prod(s)) for d, s in parts if d and s)


def allocate(nbytes: int) -> Tensor:
    """Memory of its own [nbytes] uint8, beginning at a line of the cache."""
    if not nbytes or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(nbytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
