"""The Triton kernels of WKV-4: in numpy where there is no GPU, so with few and small shapes.

With a GPU the whole suite runs them (wkv_cases.ON_GPU), and this file too. A token costs the
interpreter some milliseconds, rows and channels cost it nothing: cases are wide, not long, and
tiles are small.
"""

from __future__ import annotations

import importlib
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreting import interpreted, rounding_like_a_gpu, run_compiler
from test_wkv4 import BARS, assert_bitwise, assert_within_bars, scattered
from test_wkv4_algebra import run_in_pieces
from wkv_cases import (
    DEVICE,
    GRADIENTS,
    TRITON,
    Inputs,
    assert_same,
    draw,
    evaluate,
    evaluate_kernel,
    in_frame,
    relative_error,
    run,
    truth,
)

from receptance.ops import available_backends, triton_launching, triton_wkv4, wkv4
from receptance.ops.triton_wkv4 import VARIANTS, choose_variant

pytest.importorskip("triton")
pytestmark = [  # numpy's in the interpreter: of overflow, and of what Triton 3.6 does with arrays
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.*"),
]
every_variant = pytest.mark.parametrize("kernel", TRITON)
on_numpy = pytest.mark.skipif(DEVICE != "cpu", reason="a GPU runs what was compiled before")
if DEVICE == "cpu":
    LANES, FORWARD, BACKWARD = interpreted(
        "triton_wkv4_lanes", "triton_wkv4_forward", "triton_wkv4_backward"
    )

SIZES = ("CHUNK", "PIECES", "GROUP", "_SOME")
FULL = tuple(getattr(triton_wkv4, name) for name in SIZES)
CHUNK, PIECES, GROUP, SOME = 4, 4, 8, 2
TILE = PIECES * GROUP
# Rows that end at every kind of border, so that one call tests them all.
ENDS = sorted(
    {0, 1, SOME, 2 * TILE + 3} | {x + i for x in (CHUNK, GROUP, TILE) for i in (-1, 0, 1)}
)


def set_sizes(monkeypatch, *sizes: int) -> None:
    for name, size in zip(SIZES, sizes, strict=True):
        monkeypatch.setattr(triton_wkv4, name, size)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    set_sizes(monkeypatch, CHUNK, PIECES, GROUP, SOME)
    with rounding_like_a_gpu():
        yield


def ragged(seed: int, time: int, **options) -> Inputs:
    """Rows of all those lengths, some with resets."""
    x = draw(seed, len(ENDS), time, 7, masks=True, **options)
    return x._replace(lengths=torch.tensor(ENDS).clamp(max=time))


# ---- what they compute --------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize(
    ("time", "masks"), [(CHUNK, False), (TILE, False), (2 * TILE + 3, False), (2 * TILE + 3, True)]
)
def test_against_the_definition(kernel, time, masks):
    x = ragged(time, time) if masks else draw(time, 2, time, 5)
    want = truth(x)
    got = evaluate_kernel(kernel, x, want.state.exponent)
    assert_same(got, want, 1e-11)


@on_numpy
@every_variant
def test_whole_tiles_of_ordinary_keys_go_the_quick_way(kernel, monkeypatch):
    x = draw(1, 2, 2 * TILE, 9, dtype=torch.float32, fresh=True)
    x = x._replace(lengths=torch.tensor([2 * TILE] * 2), resets=torch.zeros(2, 2 * TILE).bool())
    want = truth(x)
    for module in (FORWARD, BACKWARD):
        monkeypatch.delattr(module, "_careful")
    assert_within_bars(evaluate_kernel(kernel, x, want.state.exponent), want, torch.float32)


@on_numpy
@every_variant
def test_the_careful_way_alone(kernel, monkeypatch):
    x = draw(1, 2, 2 * TILE, 9)
    want = truth(x)
    for module in (FORWARD, BACKWARD):
        monkeypatch.setattr(module, "HIGH", LANES.LOW)
    assert_same(evaluate_kernel(kernel, x, want.state.exponent), want, 1e-11)


@every_variant
@pytest.mark.parametrize("decays", [(-14, -10), (-6, 2)])
def test_gradients_pass_keys_that_are_far_apart(kernel, decays):
    """What a piece adds to them may be huge in its own frame, and is not in that of its start."""
    x = draw(7, 64, 2 * TILE, 4, dtype=torch.float32, decays=decays, fresh=True)
    x = x._replace(key=25 * x.key, bonus=torch.tensor([34.0, 20.0, 0.0, -20.0]))
    want = truth(x)
    got = evaluate_kernel(kernel, x, want.state.exponent)
    for name in ("key", "value"):
        assert relative_error(got.grads[name], want.grads[name]) < 2e-5, name


@pytest.mark.slow
@every_variant
@pytest.mark.parametrize("odd", ["key", "value", "numerator", "bonus"])
def test_a_channel_that_needs_care_changes_no_other(kernel, odd):
    """Too far apart for the quick way: in a piece, in the state, in what is divided."""
    x = draw(1, 3, 2 * TILE, 5, dtype=torch.float32)
    changed = x.clone()
    place, size = {
        "key": (changed.key[1, 5:], 200.0),
        "value": (changed.value[1, 5], 1e36),
        "numerator": (changed.numerator[1], 1e36),
        "bonus": (changed.bonus, 60.0),
    }[odd]
    place[..., 2] = size
    want = truth(changed)
    clean, got = (evaluate_kernel(kernel, x, want.state.exponent) for x in (x, changed))
    assert relative_error(got.out, want.out) < 5e-6  # 200 is a float32 to 8e-6
    others = torch.tensor([0, 1, 3, 4])
    assert torch.equal(got.out[..., others], clean.out[..., others])
    for name in ("key", "value"):
        assert torch.equal(got.grads[name][..., others], clean.grads[name][..., others]), name


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("kernel", ["triton", "triton-step"])
def test_a_single_token(kernel, masks):
    x = draw(0, 4, 1, 9, masks=masks)
    want = truth(x)
    assert_same(evaluate_kernel(kernel, x, want.state.exponent), want, 1e-13)


@pytest.mark.parametrize("kernel", ["triton", *TRITON])
@pytest.mark.parametrize(("batch", "time"), [(2, 0), (0, 3)])
def test_nothing_to_do(kernel, batch, time):
    x = draw(0, batch, time, 3)
    want = truth(x)
    assert_same(evaluate_kernel(kernel, x, want.state.exponent), want, 0)


@every_variant
@pytest.mark.parametrize("dtype", BARS)
def test_error_against_float64_on_the_same_rounded_inputs(kernel, dtype):
    x = draw(3, 16, 70, 33, dtype=dtype)
    want = truth(x)
    got = evaluate_kernel(kernel, x, want.state.exponent)
    assert got.out.dtype == got.grads["key"].dtype == dtype
    assert_within_bars(got, want, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("decays", [(-6, 2), (-12, -4)])
def test_error_over_many_chunks(decays, monkeypatch):
    set_sizes(monkeypatch, *FULL)
    x = draw(3, 1, 2048, 64, dtype=torch.float32, decays=decays)
    want = truth(x)
    assert_within_bars(
        evaluate_kernel("triton-chunked", x, want.state.exponent), want, torch.float32
    )


@pytest.mark.slow
def test_a_slow_decay_survives_a_serial_walk():
    x = draw(3, 1, 512, 64, dtype=torch.float32, decays=(-12, -4))
    want = truth(x)
    out, state = run("triton-serial", x)
    assert relative_error(out, want.out) < 3e-7
    denominator = in_frame(state, want.state.exponent)[1]
    assert (denominator / want.state.denominator - 1).abs().max() < 1e-6


# ---- laws ---------------------------------------------------------------------------------------


@settings(max_examples=3)
@given(time=st.integers(1, 20), fraction=st.floats(0, 1), kernel=st.sampled_from(TRITON))
def test_cutting_anywhere_changes_nothing(time, fraction, kernel):
    x = draw(time, 3, time, 5, masks=True)
    want = truth(x)
    pieces = run_in_pieces(kernel, [round(fraction * time)])
    assert_same(evaluate(pieces, x, want.state.exponent), want, 1e-10)


def test_cutting_moves_the_borders_of_chunks():
    x = ragged(1, 2 * TILE + 3)
    want = truth(x)
    pieces = run_in_pieces("triton-chunked", [GROUP + 3])
    assert_same(evaluate(pieces, x, want.state.exponent), want, 1e-10)


@pytest.mark.slow
@settings(max_examples=20)
@given(
    seed=st.integers(0, 999),
    time=st.integers(1, 2 * TILE + 3),
    decays=st.sampled_from([(-14, -10), (-8, 2), (-2, 14)]),
    keys=st.sampled_from([(0.5, 0), (2, 60), (10, -30), (25, 0), (50, 0)]),
    bonus=st.sampled_from([1, 10, 30]),
    options=st.fixed_dictionaries({"fresh": st.booleans(), "masks": st.booleans()}),
    kernel=st.sampled_from(TRITON),
)
def test_no_keys_are_too_much(seed, time, decays, keys, bonus, options, kernel):
    """Up to what float32 loses in keys, exponents and bonus that are so large."""
    x = draw(seed, 8, time, 5, dtype=torch.float32, decays=decays, **options)
    x = x._replace(key=keys[0] * x.key + keys[1], bonus=bonus * x.bonus)
    want = truth(x)
    got = evaluate_kernel(kernel, x, want.state.exponent)
    bound = 2e-5 + 3e-6 * float(x.key.abs().max() + x.bonus.abs().max())
    assert relative_error(got.out, want.out) < bound
    for name in ("key", "value"):
        assert relative_error(got.grads[name], want.grads[name]) < bound, name


@every_variant
def test_a_nan_does_not_pass_a_reset_either_way(kernel):
    at, time = TILE + 3, TILE + GROUP
    x = draw(4, 2, time, 3, dtype=torch.float32)
    resets = torch.zeros(2, time, dtype=torch.bool)
    resets[:, at] = True
    x.numerator[0], x.value[0, 5], x.key[1, at + 2] = torch.nan, torch.inf, torch.nan
    leaves = [x.key.requires_grad_(), x.value.requires_grad_()]
    out, state = run(kernel, x._replace(resets=resets))
    assert out[0, at:].isfinite().all() and state.numerator[0].isfinite().all()
    assert out[1, :at].isfinite().all() and out[1, at + 2 :].isnan().all()
    grads = torch.autograd.grad(out.sum() + state.numerator.sum(), leaves)
    assert all(g[0, at:].isfinite().all() and g[1, :at].isfinite().all() for g in grads)


@every_variant
def test_what_stands_beyond_a_rows_end_is_not_read(kernel):
    x = ragged(5, TILE + 3, dtype=torch.float32)
    beyond = torch.arange(TILE + 3) >= x.lengths[:, None]
    dirty = x._replace(
        key=x.key.masked_fill(beyond[..., None], torch.nan),
        value=x.value.masked_fill(beyond[..., None], torch.inf),
        resets=x.resets | beyond,
    )
    frame = torch.zeros(len(ENDS), 7)
    clean, got = evaluate_kernel(kernel, x, frame), evaluate_kernel(kernel, dirty, frame)
    assert_bitwise(got, clean)
    assert not got.out[beyond].any() and not got.grads["key"][beyond].any()
    assert torch.equal(got.state.exponent[0], x.exponent[0])  # a row of no tokens


@every_variant
def test_lengths_beyond_the_row_are_harmless(kernel):
    x = draw(0, 2, 5, 3)
    want = run(kernel, x._replace(lengths=torch.tensor([5, 0])))
    got = run(kernel, x._replace(lengths=torch.tensor([9, -1])))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extremes_stay_finite(kernel, dtype):
    """Every decay with every kind of key: a row for the keys, a channel for the decay."""
    x = draw(0, 6, 40, 8, dtype=torch.float32, decays=(-14, 12), fresh=True)
    sign = x.key.sign()
    for row, key in enumerate((40 * sign, 300 * sign, 1000 * sign, sign * 0 - 1e4, sign * 0 + 1e4)):
        x.key[row] = key[row]
    x.log_decay[0], x.bonus[:4] = 0, torch.tensor([30.0, -30.0, 30.0, -30.0])
    x = x.to(dtype)
    want = truth(x)
    got = evaluate_kernel(kernel, x, want.state.exponent)
    assert all(t.isfinite().all() for t in (got.out, *got.state, *got.grads.values()))
    # The average over one value: what that is divided by, it was multiplied by.
    torch.testing.assert_close(got.out[:, 0], x.value[:, 0], rtol=3e-7, atol=0)
    assert got.out.abs().max() <= x.value.abs().max() * (1 + 2**-7)


# ---- nothing is left to chance ------------------------------------------------------------------


@pytest.mark.slow
@every_variant
def test_the_same_bits_on_repeat_and_in_blocks_of_any_size(kernel, monkeypatch):
    x = ragged(0, TILE + 3, dtype=torch.float32)
    frame = torch.zeros(len(ENDS), 7)
    first = evaluate_kernel(kernel, x, frame)
    for block in (1024, 16):
        monkeypatch.setattr(triton_wkv4, "_INTERPRETED", block)
        assert_bitwise(evaluate_kernel(kernel, x, frame), first)


@pytest.mark.slow
@every_variant
def test_no_output_shows_memory_that_was_never_written(kernel, monkeypatch):
    x = ragged(0, TILE + 3, dtype=torch.float32)
    frame = torch.zeros(len(ENDS), 7)
    want = evaluate_kernel(kernel, x, frame)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert_bitwise(evaluate_kernel(kernel, x, frame), want)
    finally:
        torch.use_deterministic_algorithms(False)


@every_variant
def test_inputs_need_not_be_contiguous_and_are_not_written_to(kernel):
    x = draw(0, 3, TILE + 1, 6, dtype=torch.float32, masks=True)
    strided = Inputs(*(scattered(part) for part in x[:7]), x.resets.t().contiguous().t(), x.lengths)
    before, frame = x.clone(), torch.zeros(3, 6)
    assert_bitwise(evaluate_kernel(kernel, strided, frame), evaluate_kernel(kernel, x, frame))
    assert all(torch.equal(now, then) for now, then in zip(x, before, strict=True))


# ---- as a backend -------------------------------------------------------------------------------


def test_opcheck():
    x = draw(0, 2, 3, 4, masks=True, dtype=torch.float32).placed("triton")
    leaves = {name: getattr(x, name).clone().requires_grad_() for name in GRADIENTS}
    op, back = torch.ops.receptance.wkv4.default, torch.ops.receptance.wkv4_backward.default
    torch.library.opcheck(op, (*x._replace(**leaves), "triton"))
    out, numerator, denominator, _, starts = op(*x, "triton")
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(y.shape, generator=generator).to(y) for y in (out, numerator, denominator)]
    torch.library.opcheck(back, (*grads, *x[:4], starts, x.resets, x.lengths, "triton"))


def test_compiles_as_one_graph_with_gradients():
    x = draw(0, 2, 3, 4, dtype=torch.float32)

    def loss(key):
        out, state = run("triton", x._replace(key=key))
        return out.square().sum() + state.numerator.sum()

    plain, traced = x.key.clone().requires_grad_(), x.key.clone().requires_grad_()
    loss(plain).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(traced).backward()
    assert torch.equal(plain.grad, traced.grad)


def test_the_choice_of_a_variant_depends_on_the_shape_alone():
    shapes = {(1, 1, 64): "step", (512, 1, 4096): "step", (8, 128, 768): "serial"}
    shapes |= {(8, 4096, 768): "chunked", (1, 8192, 5120): "chunked", (64, 4096, 1024): "serial"}
    assert {shape: choose_variant(*shape) for shape in shapes} == shapes
    assert set(shapes.values()) == set(VARIANTS)


def test_offered_on_a_gpu_where_triton_is_installed(monkeypatch):
    assert available_backends("cuda") == ["triton", "chunked", "reference"]
    monkeypatch.setattr(triton_launching, "is_available", lambda: False)
    assert available_backends("cuda") == ["chunked", "reference"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("Failed to find C compiler. Please\nspecify"), "Failed to find C compiler"),
        (subprocess.CalledProcessError(1, ["gcc", "x" * 999]), "the C compiler failed"),
    ],
)
def test_a_machine_without_a_compiler_is_told_so_in_one_line(monkeypatch, error, reason):
    class Driver:
        @property
        def active(self):
            raise error

    monkeypatch.setattr(importlib.import_module("triton.runtime"), "driver", Driver())
    with pytest.raises(ValueError, match=f"{reason}.* wants gcc and Python's headers") as caught:
        triton_launching.check_launcher()
    assert "\n" not in str(caught.value)


def test_refused_on_a_cpu():
    x = draw(0, 1, 2, 3)
    with pytest.raises(ValueError, match=r"no wkv4 backend 'triton' on cpu; available: .*chunked"):
        wkv4(*x[:4], backend="triton")


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_the_benchmark_checks_before_it_times(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    benchmark = importlib.import_module("gpu_wkv4")
    assert set(benchmark.gate(DEVICE, (2, 11, 24))) == {"Walk", "chunked", "serial"}
    assert set(benchmark.gate(DEVICE, (2, 1, 24))) == {"Walk", "step"}
    forward = triton_wkv4.forward

    def wrong(*arguments):
        out, numerator, *others = forward(*arguments)
        return out, numerator * 1.01, *others

    monkeypatch.setattr(triton_wkv4, "forward", wrong)
    with pytest.raises(SystemExit, match="chunked is wrong: numerator after is off by"):
        benchmark.gate(DEVICE, (2, 3, 24))


# ---- for a GPU that is not here -----------------------------------------------------------------

COMPILE = r"""
import importlib
import re
import subprocess
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from receptance.ops import triton_wkv4

NARROW = ("key", "value", "out", "grad_out", "grad_key", "grad_value")
OTHER = {"resets": "*u8", "lengths": "*i64", "T": "i32", "N": "i32", "rows": "i32"}
SMALL = {"C": 64, "CHUNK": 4, "PIECES": 2, "GROUP": 4, "SOME": 2, "BLOCK": 16}

def build(name, half, wide, warps=1, registers=None, **flags):
    kernel = getattr(importlib.import_module("receptance.ops.triton_wkv4_" + name), name)
    constants = SMALL | {"ROUGH": wide == "fp32"} | flags
    constants = {n: v for n, v in constants.items() if n in kernel.arg_names}
    pointers = {n: "*" + (half if n in NARROW else wide) for n in kernel.arg_names}
    signature = pointers | {n: t for n, t in OTHER.items() if n in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    options = {"num_warps": warps, "enable_fp_fusion": True, "maxnreg": registers}
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert not re.search(r"\b(atom|red)\.", done.asm["ptx"])
    print(name, len(done.asm["cubin"]))
    return done.asm["cubin"]

for name in ("forward", "backward"):
    build(name, "fp16", "fp32")
    build(name, "bf16", "fp32", PIECES=1)
    build(name, "fp64", "fp64", resets=None)
build("forward", "bf16", "fp32", PIECES=1, GROUP=1, SOME=1)

# The one that needs the most registers: what does not fit into them is a small part.
block, warps, registers = triton_wkv4.CONFIGURATIONS["backward"][0]
full = {"CHUNK": triton_wkv4.CHUNK, "PIECES": triton_wkv4.PIECES, "GROUP": triton_wkv4.CHUNK}
full |= {"SOME": triton_wkv4._SOME, "BLOCK": block, "resets": None, "lengths": None}
cubin = build("backward", "bf16", "fp32", warps, registers, **full)
open("backward.cubin", "wb").write(cubin)
tool = triton.knobs.nvidia.cuobjdump.path
used = subprocess.run([tool, "-res-usage", "backward.cubin"], capture_output=True, text=True)
assert int(used.stdout.partition(" STACK:")[2].partition(" ")[0]) <= 128, used.stdout
"""


@pytest.mark.slow
def test_every_kernel_compiles_for_a_gpu(tmp_path):
    assert len(run_compiler(COMPILE, tmp_path).splitlines()) == 8
