"""Memory for weights: every token reads all of it in sequence, which huge pages make faster."""

from __future__ import annotations

import math
import mmap
from dataclasses import replace

import torch
from torch import Tensor

from receptance.quantize.packing import Kind, Layout, Packed, dtypes, shapes

_ALIGNMENT = 64  # This is the size of a cache line.


class Arena:
    """One piece of memory for the tensors of a model, in huge pages where Linux has them.

    The pages of a mapped file are scattered in memory, and a CPU stops prefetching at the end of
    each of them.
    """

    def __init__(self, nbytes: int) -> None:
        self._bytes, self._used = allocate(nbytes), 0

    def hold(self, tensor: Tensor) -> Tensor:
        """Copy a tensor into the next free bytes; one such copy keeps all of the memory alive."""
        place = self._bytes[self._used : self._used + tensor.nbytes]
        self._used += aligned(tensor.nbytes)
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def hold_packed(self, packed: Packed) -> Packed:
        """Copy the codes and parameters of a packed matrix into the next free bytes."""
        params = None if packed.params is None else self.hold(packed.params)
        return replace(packed, data=self.hold(packed.data), params=params)


def aligned(nbytes: int) -> int:
    """The bytes that a tensor of `nbytes` takes in an arena."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def room(kind: Kind, layout: Layout, outputs: int, inputs: int, group: int) -> int:
    """The bytes that a packed matrix of these sizes takes in an arena."""
    parts = zip(dtypes(kind), shapes(kind, layout, outputs, inputs, group), strict=True)
    return sum(aligned(d.itemsize * math.prod(s)) for d, s in parts if d and s)


def allocate(nbytes: int) -> Tensor:
    """Allocate memory that begins at a cache line, in huge pages where possible: [nbytes] uint8."""
    if not nbytes or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(nbytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
