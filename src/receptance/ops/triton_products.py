"""Products of matrices with few rows, for decoding: every weight read once, float32 sums."""
# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of kernels as its own.

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import triton
import triton.language as tl
from torch import Tensor

from receptance.ops.triton_weights import Weights

Epilogue = Literal["store", "activate", "add", "gate"]

# Rows of one program: more do not fit beside the weights.
_LARGEST_BLOCK = 64


@dataclass(frozen=True)
class Tiles:
    """How a product is cut: what to measure first on a new GPU."""

    rows: int = 4
    """Outputs of one program when there is one row."""
    groups: int = 8
    """Groups of inputs that it reads at once."""
    dot_rows: int = 16
    """Outputs of one program for a batch."""
    warps: int = 4
    stages: int = 3
    """Groups under way at once for a batch: of 4, int8 for 64 rows wants more than 99 KB."""
    most_floats: int = 16
    """Rows of the largest batch that is multiplied here, with float weights: torch has more."""
    most_codes: int = 64
    """The same for int8 and int4, which torch would want as floats."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1 or (value & (value - 1) and name != "stages"):
                raise ValueError(f"tiles have {name} {value}; it must be a power of two")

    def most(self, kind: str) -> int:
        """Rows of the largest batch for weights of a kind."""
        return self.most_codes if kind in ("int8", "int4") else self.most_floats

    def launch(self, batch: int) -> tuple[int, int, dict[str, int]]:
        """Outputs and rows of one program, and what its launch is told."""
        if batch == 1:
            return self.rows, 1, {"num_warps": self.warps}
        block = min(triton.next_power_of_2(batch), _LARGEST_BLOCK)
        return self.dot_rows, block, {"num_warps": self.warps, "num_stages": self.stages}


@triton.jit
def _row_sums(
    data, scale, minimum, x, row, row_real,
    INPUTS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Products of some rows [R] with one x [K]: [R]. Codes are summed by groups, then scaled."""
    row = row.to(tl.int64)
    if KIND == "int4" or KIND == "int8":
        packed: tl.constexpr = GROUP // 2 if KIND == "int4" else GROUP
        groups: tl.constexpr = (INPUTS + GROUP - 1) // GROUP
        within = tl.arange(0, packed)[None, :]
        total = tl.zeros([ROWS, GROUPS], tl.float32)
        for first in range(0, groups, GROUPS):
            group = first + tl.arange(0, GROUPS)
            real = row_real[:, None] & (group < groups)[None, :]
            k = group[:, None] * GROUP + within
            near = tl.load(x + k, k < INPUTS, 0)
            place = (row * (groups * packed))[:, None, None] + (group[:, None] * packed + within)
            code = tl.load(data + place, real[:, :, None], 0)
            param = row[:, None] * groups + group
            factor = tl.load(scale + param, real, 0).to(tl.float32)
            if KIND == "int4":
                k += packed
                far = tl.load(x + k, k < INPUTS, 0)
                low, high = (code & 15).to(tl.float32), (code >> 4).to(tl.float32)
                least = tl.load(minimum + param, real, 0).to(tl.float32)
                total += least * tl.sum(near + far, 1)
                total += factor * tl.sum(low * near + high * far, 2)
            else:
                total += factor * tl.sum(code.to(tl.float32) * near, 2)
    else:
        total = tl.zeros([ROWS, GROUPS * GROUP], tl.float32)
        for first in range(0, INPUTS, GROUPS * GROUP):
            k = first + tl.arange(0, GROUPS * GROUP)
            near = tl.load(x + k, k < INPUTS, 0)
            real = row_real[:, None] & (k < INPUTS)
            weight = tl.load(data + (row * INPUTS)[:, None] + k, real, 0)
            total += weight.to(tl.float32) * near
    return tl.sum(total, 1)


@triton.jit
def _rounded(x, INTERPRETED: tl.constexpr):
    """To bfloat16; not in the interpreter, which multiplies its bits as integers (triton 3.9)."""
    return x if INTERPRETED else x.to(tl.bfloat16)


@triton.jit
def _dot_sums(
    data, scale, minimum, x, row, row_real, b, batch,
    INPUTS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    BATCH: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The same with x [B,K] on tensor cores: [R,B]. Codes are exact there; x is rounded.

    x becomes bfloat16, and TF32 beside float16 weights, whose range it could leave.
    """
    packed: tl.constexpr = GROUP // 2 if KIND == "int4" else GROUP
    groups: tl.constexpr = (INPUTS + GROUP - 1) // GROUP
    within = tl.arange(0, packed)
    b_real = (b < batch)[None, :]
    x += b.to(tl.int64)[None, :] * INPUTS
    row = row.to(tl.int64)
    total = tl.zeros([ROWS, BATCH], tl.float32)
    for group in range(0, groups):
        k = group * GROUP + within
        near = tl.load(x + k[:, None], b_real & (k < INPUTS)[:, None], 0)
        if KIND == "int4":
            byte = tl.load(data + row[:, None] * (groups * packed) + group * packed + within[None],
                           row_real[:, None], 0)  # fmt: skip
            k += packed
            far = tl.load(x + k[:, None], b_real & (k < INPUTS)[:, None], 0)
            least = tl.load(minimum + row * groups + group, row_real, 0).to(tl.float32)
            near, far = _rounded(near, INTERPRETED), _rounded(far, INTERPRETED)
            plain = tl.sum(near.to(tl.float32), 0) + tl.sum(far.to(tl.float32), 0)
            sums = tl.dot((byte & 15).to(near.dtype), near)
            sums = tl.dot((byte >> 4).to(near.dtype), far, sums)
            total += least[:, None] * plain[None]
        elif KIND == "int8":
            code = tl.load(data + row[:, None] * (groups * GROUP) + k[None], row_real[:, None], 0)
            near = _rounded(near, INTERPRETED)
            sums = tl.dot(code.to(near.dtype), near)
        else:
            weight = tl.load(data + row[:, None] * INPUTS + k[None],
                             row_real[:, None] & (k < INPUTS)[None], 0)  # fmt: skip
            if KIND == "bfloat16":
                near = _rounded(near, INTERPRETED)
                total = tl.dot(weight.to(near.dtype), near, total)
            elif KIND == "float16":
                total = tl.dot(weight.to(tl.float32), near, total, input_precision="tf32")
            else:
                total = tl.dot(weight, near, total, input_precision="ieee")
        if KIND == "int4" or KIND == "int8":
            factor = tl.load(scale + row * groups + group, row_real, 0).to(tl.float32)
            total += factor[:, None] * sums
    return total


@triton.jit
def sums_of(
    data, scale, minimum, x, row, row_real, b, batch,
    INPUTS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    BATCH: tl.constexpr, GROUPS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Products of some rows [R] with x [B,K]: [R,B], or [R] if B is 1."""
    if BATCH == 1:
        sums = _row_sums(data, scale, minimum, x, row, row_real, INPUTS,
                         KIND, GROUP, ROWS, GROUPS)  # fmt: skip
    else:
        sums = _dot_sums(data, scale, minimum, x, row, row_real, b, batch, INPUTS,
                         KIND, GROUP, ROWS, BATCH, INTERPRETED)  # fmt: skip
    return sums


@triton.jit
def places_of(n, b, size, batch, BATCH: tl.constexpr):
    """Where the products of rows [R] belong in [B,N], and whether they are any."""
    if BATCH == 1:
        place, real = n.to(tl.int64), n < size
    else:
        place = b.to(tl.int64)[None, :] * size + n[:, None]
        real = (n < size)[:, None] & (b < batch)[None, :]
    return place, real


@triton.jit
def _product_kernel(
    data, scale, minimum, x, out, gate, batch, first, rest,
    INPUTS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, EPILOGUE: tl.constexpr,
    ROWS: tl.constexpr, BATCH: tl.constexpr, GROUPS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """x is [M,B,K] for M matrices, out as many [B,N] one behind the other."""
    each = tl.cdiv(rest, ROWS)
    later = tl.program_id(0) - tl.cdiv(first, ROWS)
    matrix = tl.where(later < 0, 0, later // each + 1)
    before = tl.where(later < 0, 0, first + later // each * rest)
    size = tl.where(later < 0, first, rest)
    n = tl.where(later < 0, tl.program_id(0), later % each) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    x += tl.cast(matrix, tl.int64) * batch * INPUTS
    sums = sums_of(data, scale, minimum, x, before + n, n < size, b, batch, INPUTS,
                 KIND, GROUP, ROWS, BATCH, GROUPS, INTERPRETED)  # fmt: skip
    place, real = places_of(n, b, size, batch, BATCH)
    place += tl.cast(before, tl.int64) * batch
    if EPILOGUE == "activate":
        key = tl.maximum(sums, 0.0)
        sums = tl.where(matrix == 0, key * key, 1 / (1 + tl.exp(-sums)))
    if EPILOGUE == "gate":
        sums *= tl.load(gate + place, real, 0)
    if EPILOGUE == "add" or EPILOGUE == "gate":
        sums += tl.load(out + place, real, 0)
    tl.store(out + place, sums, real)


def product(
    weights: Weights,
    x: Tensor,
    out: Tensor,
    epilogue: Epilogue = "store",
    *,
    gate: Tensor | None = None,
    tiles: Tiles | None = None,
) -> None:
    """Every matrix with its own input, in one launch: x [M,B,K] float32, out M times [B,N].

    "activate" takes the square of the relu of the first matrix and the sigmoid of the others, "add"
    adds to what out holds, "gate" does so after multiplying with gate, of the shape of out.
    """
    tiles, batch = tiles or Tiles(), x.shape[-2]
    rows, block, sizes = tiles.launch(batch)
    programs = triton.cdiv(weights.first, rows)
    if weights.rest:
        programs += (weights.matrices - 1) * triton.cdiv(weights.rest, rows)
    _product_kernel[(programs, triton.cdiv(batch, block))](
        *weights.arguments(), x, out, out if gate is None else gate, batch, weights.first,
        max(weights.rest, 1), weights.inputs, *weights.form, epilogue, rows, block,
        tiles.groups, not x.is_cuda, **sizes,
    )  # fmt: skip
