"""Products of matrices with few rows, for decoding: every weight is read once, sums are float32."""
# mypy: disable-error-code="no-untyped-def, assignment, var-annotated"
# ruff: noqa: RUF005
# Triton gives the annotations of kernels a meaning of its own, and does not know (*totals, x).

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import triton
import triton.language as tl
from torch import Tensor

from receptance.ops.triton_weights import Weights

Epilogue = Literal["store", "activate", "add", "gate"]

# The most rows of one program: more do not fit into shared memory beside the weights.
_LARGEST_BLOCK = 64
_MOST_WARPS = 16


@dataclass(frozen=True)
class Tiles:
    """How a product is divided into programs. These are the numbers to tune first on a new GPU."""

    rows: int = 2
    """Outputs of one program when there is one row."""
    row_steps: int = 5
    """How often each warp of that program reads 512 numbers of a row; this decides their number."""
    dot_rows: int = 16
    """Outputs of one program for a batch."""
    warps: int = 4
    """Warps of that program."""
    shared: int = 64
    """KiB of shared memory for the groups of inputs under way: two at least, eight at most."""
    most_floats: int = 16
    """Rows of the largest batch with float weights that is multiplied here; torch has the rest."""
    most_codes: int = 64
    """The same for int8 and int4 weights, which torch could multiply only after a conversion."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1 or (value & (value - 1) and name != "row_steps"):
                raise ValueError(f"tiles have {name} {value}; it must be a power of two")

    def most(self, kind: str) -> int:
        """Rows of the largest batch for weights of a kind."""
        return self.most_codes if kind in ("int8", "int4") else self.most_floats

    def launch(self, weights: Weights, batch: int) -> tuple[int, int, dict[str, int]]:
        """The outputs and rows of one program, and the options of its launch."""
        if batch == 1:
            warps = triton.cdiv(weights.data.shape[1], 512 * self.row_steps)
            return self.rows, 1, {"num_warps": min(triton.next_power_of_2(warps), _MOST_WARPS)}
        block = min(triton.next_power_of_2(batch), _LARGEST_BLOCK)
        group = self.dot_rows * weights.group_bytes + block * weights.form[1] * 4
        stages = 1 + min(max(self.shared * 1024 // group, 2), 8)
        return self.dot_rows, block, {"num_warps": self.warps, "num_stages": stages}


@triton.jit
def _row_sums(
    data, scale, minimum, x, row, left,
    INPUTS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """Products of the rows from `row` on [R], of which `left` are there, with one x [K]: [R].

    All vectors have one shape and all weights are loaded first, so that every thread keeps its own
    numbers: Triton converts no layout and puts no barrier between two loads. Each thread sums codes
    by 16, and such sums are scaled.
    """
    coded: tl.constexpr = KIND == "int8" or KIND == "int4"
    groups: tl.constexpr = (INPUTS + GROUP - 1) // GROUP
    packed: tl.constexpr = GROUP // 2 if KIND == "int4" else GROUP
    stored: tl.constexpr = groups * packed if coded else INPUTS
    span: tl.constexpr = 512 * WARPS
    within, part = tl.arange(0, span), tl.arange(0, span // 16) * 16
    totals, weights = (), ()
    for _r in tl.static_range(ROWS):
        totals = totals + (tl.zeros([span // 16 if coded else span], tl.float32),)
    for first in tl.static_range(0, stored, span):
        for r in tl.static_range(ROWS):
            place = first + within
            real = (place < stored) & (within * 0 + r < left)
            at = data + ((row.to(tl.int64) + r) * stored + place)
            weights = weights + (tl.load(at, real, 0),)
    for first in tl.static_range(0, stored, span):
        place, param = first + within, (first + part) // packed
        k = place // packed * GROUP + place % packed if KIND == "int4" else place
        near = tl.load(x + k, k < INPUTS, 0)
        if KIND == "int4":
            far = tl.load(x + (k + packed), k + packed < INPUTS, 0)
            both = _by_threads(near + far, WARPS)
        later = ()
        for r in tl.static_range(ROWS):
            weight = weights[first // span * ROWS + r]
            if coded:
                at = (row.to(tl.int64) + r) * groups + param
                real = (param < groups) & (part * 0 + r < left)
                factor = tl.load(scale + at, real, 0).to(tl.float32)
                if KIND == "int4":
                    least = tl.load(minimum + at, real, 0).to(tl.float32)
                    low, high = _sixteen_more(weight, 19), _sixteen_more(weight, 15)
                    sums = factor * _by_threads(low * near + high * far, WARPS)
                    sums += (least - 16 * factor) * both
                else:
                    sums = factor * _by_threads(weight.to(tl.float32) * near, WARPS)
            else:
                sums = weight.to(tl.float32) * near
            later = later + (totals[r] + sums,)
        totals = later
    row_sums = tl.zeros([ROWS], tl.float32)
    for r in tl.static_range(ROWS):
        row_sums = tl.where(tl.arange(0, ROWS) == r, tl.sum(totals[r], 0), row_sums)
    return row_sums


@triton.jit
def _by_threads(x, WARPS: tl.constexpr):
    """Sums of 16 neighbors each, which are held by one thread."""
    return tl.sum(tl.reshape(x, [32 * WARPS, 16]), 1)


@triton.jit
def _sixteen_more(byte, shift: tl.constexpr):
    """16 plus a 4-bit code as a float: its bits go to the mantissa's top, which is fast."""
    return (((byte.to(tl.int32) << shift) & 0x780000) | 0x41800000).to(tl.float32, bitcast=True)


@triton.jit
def _rounded(x, INTERPRETED: tl.constexpr):
    """x as bfloat16, but unchanged in the interpreter, which multiplies its bits as integers."""
    return x if INTERPRETED else x.to(tl.bfloat16)


@triton.jit
def _dot_sums(
    data, scale, minimum, x, row, left, b, batch,
    INPUTS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    BATCH: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The same products with x [B,K] on tensor cores: [R,B]. Codes stay exact and x is rounded.

    x is rounded to bfloat16, or to TF32 where the weights are float16, whose range x could exceed.
    """
    packed: tl.constexpr = GROUP // 2 if KIND == "int4" else GROUP
    groups: tl.constexpr = (INPUTS + GROUP - 1) // GROUP
    within = tl.arange(0, packed)
    b_real = (b < batch)[None, :]
    x += b.to(tl.int64)[None, :] * INPUTS
    row_real = tl.arange(0, ROWS) < left
    row = row.to(tl.int64) + tl.arange(0, ROWS)
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
    data, scale, minimum, x, row, left, b, batch,
    INPUTS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    BATCH: tl.constexpr, WARPS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Products of rows from `row` on, as many as are left, with x [B,K]: [R,B], or [R] of one."""
    if BATCH == 1:
        sums = _row_sums(data, scale, minimum, x, row, left, INPUTS, KIND, GROUP, ROWS, WARPS)
    else:
        sums = _dot_sums(data, scale, minimum, x, row, left, b, batch, INPUTS,
                         KIND, GROUP, ROWS, BATCH, INTERPRETED)  # fmt: skip
    return sums


@triton.jit
def places_of(n, b, size, batch, BATCH: tl.constexpr):
    """Where the products of rows [R] belong in [B,N], and which of these rows exist."""
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
    ROWS: tl.constexpr, BATCH: tl.constexpr, WARPS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Multiply x [M,B,K] with M matrices; out holds the M results [B,N] one after another."""
    each = tl.cdiv(rest, ROWS)
    later = tl.program_id(0) - tl.cdiv(first, ROWS)
    matrix = tl.where(later < 0, 0, later // each + 1)
    before = tl.where(later < 0, 0, first + later // each * rest)
    size = tl.where(later < 0, first, rest)
    start = tl.where(later < 0, tl.program_id(0), later % each) * ROWS
    n = start + tl.arange(0, ROWS)
    b = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    x += tl.cast(matrix, tl.int64) * batch * INPUTS
    sums = sums_of(data, scale, minimum, x, before + start, size - start, b, batch, INPUTS,
                   KIND, GROUP, ROWS, BATCH, WARPS, INTERPRETED)  # fmt: skip
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
    """Multiply every matrix with its own input in one launch: x [M,B,K] float32, out M times [B,N].

    "activate" takes the square of the relu of the first matrix and the sigmoid of the others, "add"
    adds to what out holds, "gate" does so after multiplying with gate, of the shape of out.
    """
    tiles, batch = tiles or Tiles(), x.shape[-2]
    rows, block, sizes = tiles.launch(weights, batch)
    programs = triton.cdiv(weights.first, rows)
    if weights.rest:
        programs += (weights.matrices - 1) * triton.cdiv(weights.rest, rows)
    _product_kernel[(programs, triton.cdiv(batch, block))](
        *weights.arguments(), x, out, out if gate is None else gate, batch, weights.first,
        max(weights.rest, 1), weights.inputs, *weights.form, epilogue, rows, block,
        sizes["num_warps"], not x.is_cuda, **sizes,
    )  # fmt: skip
