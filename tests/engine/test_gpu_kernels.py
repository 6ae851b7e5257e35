"""The kernels of a decoding step, each against its definition."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from gpu_cases import (
    DEVICE,
    EXACT,
    KINDS,
    LARGE,
    ON_GPU,
    ROUNDING,
    assert_near,
    every_kind,
    narrow,
    widened,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from receptance.engine.gpu_weights import stacked, times
from receptance.ops import WKVState, reference
from receptance.ops.arguments import Inputs
from receptance.ops.triton_products import Tiles, product
from receptance.ops.triton_steps import average, embed, mix, time_mix
from receptance.ops.triton_weights import dequantize
from receptance.quantize.codes import GROUPS


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def groups(kind: str) -> tuple[int | None, ...]:
    return GROUPS.get(kind, (None,))


# ---- weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "group"), [(k, g) for k in KINDS for g in groups(k)])
@pytest.mark.parametrize("inputs", [16, 33, 160])
def test_weights_come_back_bit_by_bit(kind, group, inputs):
    parts = [narrow(randn(n, inputs, seed=n).cpu(), kind, group) for n in (40, 7, 7)]
    weights = stacked(parts, DEVICE)
    assert (weights.outputs, weights.matrices) == (54, 3)
    wanted = torch.cat([widened(x) for x in parts])
    assert torch.equal(dequantize(weights, slice(None), torch.float32).cpu(), wanted)
    assert torch.equal(dequantize(weights, slice(40, 47), torch.float32).cpu(), wanted[40:47])


# ---- products -----------------------------------------------------------------------------------


@settings(max_examples=20)
@given(
    kind=st.sampled_from(KINDS),
    group=st.integers(0, 2),
    sizes=st.tuples(st.integers(1, 40), st.sampled_from([0, 5, 16])),
    inputs=st.sampled_from([16, 33, 130]),
    batch=st.integers(1, 9),
    epilogue=st.sampled_from(["store", "activate", "add", "gate"]),
    tiles=st.sampled_from([LARGE, Tiles(dot_rows=16, row_steps=1)]),
)
def test_products_equal_their_definition(kind, group, sizes, inputs, batch, epilogue, tiles):
    first, rest = sizes
    outputs = [first, rest, rest] if rest else [first]
    group = groups(kind)[group % len(groups(kind))]
    parts = [narrow(randn(n, inputs, seed=i).cpu(), kind, group) for i, n in enumerate(outputs)]
    x = randn(len(parts), batch, inputs, seed=8)
    before, gate = (randn(batch * sum(outputs), seed=i) for i in (9, 10))
    sums = [a.double() @ widened(w).double().to(DEVICE).T for a, w in zip(x, parts, strict=True)]
    if epilogue == "activate":
        sums = [sums[0].relu().square(), *(s.sigmoid() for s in sums[1:])]
    wanted = torch.cat([s.flatten() for s in sums])
    wanted = wanted * gate if epilogue == "gate" else wanted
    wanted = wanted + before if epilogue in ("add", "gate") else wanted

    out = before.clone() if epilogue in ("add", "gate") else torch.full_like(before, torch.nan)
    product(stacked(parts, DEVICE), x, out, epilogue, gate=gate, tiles=tiles)
    assert_near(out, wanted, ROUNDING[kind] if ON_GPU and batch > 1 else EXACT)


@every_kind
def test_large_products_round_no_more_than_their_type(kind):
    matrix = narrow(randn(24, 130).cpu(), kind)
    x = 300 * randn(5, 130, seed=1)  # squares of such keys leave float16
    wanted = x.square() @ widened(matrix).to(DEVICE).T
    assert_near(times(stacked([matrix], DEVICE), slice(None), x.square()), wanted, ROUNDING[kind])


def test_tiles_are_powers_of_two():
    with pytest.raises(ValueError, match="power of two"):
        Tiles(rows=3)


# ---- the rest of a step -------------------------------------------------------------------------


@pytest.mark.parametrize("width", [16, 33])
def test_mix_is_layer_norm_and_token_shift(width):
    x, shift = randn(3, width), randn(3, width, seed=1)
    weight, bias = randn(width, seed=2), randn(width, seed=3)
    shares = torch.rand(3, width, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    wanted = F.layer_norm(x, (width,), weight, bias, 1e-4)
    mixed = torch.lerp(shift, wanted, shares[:, None])

    out, after = torch.empty(3, 3, width, device=DEVICE), shift.clone()
    mix(x, (weight, bias, 1e-4), after, shares, out)
    torch.testing.assert_close(out, mixed)
    torch.testing.assert_close(after, wanted)

    plain = torch.empty(3, width, device=DEVICE)
    mix(x, (weight, bias, 1e-4), x, shares[:0], plain)
    torch.testing.assert_close(plain, wanted)


@every_kind
def test_an_id_that_is_no_token_gives_its_own_row_nan(kind):
    matrix = narrow(randn(20, 33).cpu(), kind)
    norm = randn(33, seed=1), randn(33, seed=2), 1e-5
    out = torch.empty(4, 33, device=DEVICE)
    embed(stacked([matrix], DEVICE), torch.tensor([3, -1, 19, 20], device=DEVICE), norm, out)
    rows = widened(matrix)[[3, 19]].to(DEVICE)
    torch.testing.assert_close(out[[0, 2]], F.layer_norm(rows, (33,), norm[0], norm[1]))
    assert out[[1, 3]].isnan().all()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("keys", [1, 300])
def test_average_is_the_reference(batch, keys):
    width = 33
    key, value, receptance = (randn(batch, width, seed=i) for i in range(3))
    key, decay, bonus = key * keys, -randn(width, seed=3).exp(), randn(width, seed=4)
    state = WKVState(
        randn(batch, width, seed=5), randn(batch, width, seed=6).abs(), randn(batch, width, seed=7)
    )
    x = Inputs(decay, bonus, key[:, None], value[:, None], *state)
    wanted, after = reference.wkv4(x)
    wanted = wanted[:, 0] * receptance.sigmoid()

    parts = tuple(x.clone() for x in state)
    out = torch.empty_like(key)
    average(torch.stack([key, value, receptance]), decay, bonus, parts, out)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(parts, after)

    # Matrices of ones on the diagonal: what is read is what comes out of them.
    parts, weights = tuple(x.clone() for x in state), [torch.eye(width) for _ in range(3)]
    x = torch.stack([key, value, receptance])
    time_mix(stacked(weights, DEVICE), x, decay, bonus, parts, out, tiles=LARGE)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(parts, after)


# ---- what the interpreter cannot tell -----------------------------------------------------------

COMPILE = """
import os
os.environ.pop("TRITON_INTERPRET", None)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
import torch
from receptance.ops import triton_products, triton_steps, triton_weights

POINTERS = dict(scale="*bf16", minimum="*bf16", tokens="*i64")
NUMBERS = dict(epsilon="fp32") | dict.fromkeys(
    "batch inputs first rest size width vocabulary start count".split(), "i32")
DATA = dict(float32="*fp32", bfloat16="*bf16", float16="*fp16", int8="*i8", int4="*u8")
TILE = dict(WARPS=1, INTERPRETED=False, INPUTS=768)
def weights(kind):
    dtype = torch.int8 if kind.startswith("int") else getattr(torch, kind)
    data = torch.empty(1, 384 if kind == "int4" else 768, dtype=dtype)
    return triton_weights.Weights(kind, 128, 1, 0, 768, data, data, data)

rows, _, options = triton_products.Tiles().launch(weights("bfloat16"), 1)
ROW = dict(ROWS=rows, BATCH=1, options=options)
ONE = dict(batch=1, rest=1, **TILE, **ROW)  # Triton compiles ones in

def check(kernel, kind="float32", options=None, **constants):
    types = POINTERS | NUMBERS | {"data": DATA[kind]}
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in names}
    values = {(names.index(n),): value for n, value in constants.items()}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in names if "*" in signature[n]}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    done = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert done.asm["cubin"] and done.metadata.shared <= 99 * 1024  # what GeForce GPUs have
    # Between the loads of one row's weights nothing waits; before the state is written all do.
    barriers = done.asm["ptx"].count("bar.sync")
    assert constants.get("BATCH") != 1 or barriers == (kernel is triton_steps._time_mix_kernel)

for kind in DATA:
    form = dict(kind=kind, KIND=kind, GROUP=64 if kind == "int4" else 128)
    check(triton_products._product_kernel, EPILOGUE="gate", ROWS=16, BATCH=8, **TILE, **form)
    if kind in ("int8", "int4"):
        rows, block, options = triton_products.Tiles().launch(weights(kind), 64)
        check(triton_products._product_kernel, EPILOGUE="gate", ROWS=rows, BATCH=block,
              options=options, **TILE, **(form | dict(GROUP=128)))
    if kind != "float16":
        check(triton_products._product_kernel, EPILOGUE="gate", **ONE, **form)
check(triton_products._product_kernel, EPILOGUE="activate", **ONE, **form)
del TILE["INPUTS"]
check(triton_steps._time_mix_kernel, batch=1, WIDTH=768, **TILE, **ROW, **form)
check(triton_steps._time_mix_kernel, ROWS=16, BATCH=8, WIDTH=768, **TILE, **form)
check(triton_steps._embed_kernel, WIDE=1024, **form)
check(triton_weights._dequantize_kernel, ROWS=32, WIDE=128, **form)
for mixes in (0, 3):
    check(triton_steps._mix_kernel, MIXES=mixes, WIDE=1024, batch=1)
check(triton_steps._average_kernel, BLOCK=256)
"""


@pytest.mark.slow
def test_every_kernel_compiles_for_an_h200(tmp_path):
    """Without a GPU: types, layouts and tensor core shapes are checked by the compiler."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={"PATH": "/usr/bin:/bin", "TRITON_CACHE_DIR": str(tmp_path), "HOME": str(tmp_path)},
    )
    if "0 active drivers" in done.stderr:
        pytest.skip("this triton compiles only where a GPU is")
    assert done.returncode == 0, done.stderr[-2000:]
