"""What the rest of the package asks of a version of RWKV."""

from __future__ import annotations

from typing import Literal

Layout = Literal["tiles", "rows", "embedding"]
"""How kernels want a matrix to lie in memory; see quantize.packing."""
