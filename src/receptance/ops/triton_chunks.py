"""What the Triton kernels of WKV-6 and WKV-7 share. Importing this imports triton.

A program takes a head of a row of the batch, in chunks of positions.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton's compiler gives the arguments their types.

import triton
import triton.language as tl


@triton.jit
def times(x, y):
    """A matrix product with the accuracy of float32: three of tensor cores."""
    return tl.dot(x, y, input_precision="tf32x3")


@triton.jit
def load(x, token, inside, column):
    """Some columns of a chunk's positions, float32; zero beyond the end."""
    at = token[:, None] + column[None, :]
    return tl.load(x + at, mask=inside[:, None], other=0.0).to(tl.float32)


@triton.jit
def store(x, token, inside, column, values):
    """Write some columns of a chunk's positions, none beyond the end."""
    at = token[:, None] + column[None, :]
    tl.store(x + at, values.to(x.dtype.element_ty), mask=inside[:, None])


@triton.jit
def tokens(head, first, T, H: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr):
    """Where the vectors of a chunk's positions begin, and whether they are inside the row."""
    position = first + tl.arange(0, CHUNK)
    return ((head // H * T + position) * H + head % H) * N, position < T


@triton.jit
def documents(resets, head, first, T, H: tl.constexpr, CHUNK: tl.constexpr):
    """The number of its document inside the chunk, for every position; and that of the last."""
    n = tl.arange(0, CHUNK)
    document, last = n * 0, 0
    if resets is not None:
        begins = tl.load(resets + head // H * T + first + n, mask=first + n < T, other=0)
        document, last = tl.cumsum(begins.to(tl.int32), 0), tl.sum(begins.to(tl.int32), 0)
    return document, last
