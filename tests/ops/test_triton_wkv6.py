"""The Triton kernels of WKV-6: in numpy where there is no GPU, so with few heads and chunks."""

from __future__ import annotations

import pytest
import torch
from interpreting import (
    compiled_stack,
    interpreted,
    products_like_a_gpu,
    rounding_like_a_gpu,
)
from wkv6_cases import (
    CHUNK,
    GRADIENTS,
    Inputs,
    assert_same,
    draw,
    evaluate,
    evaluate_backend,
    truth,
)

from receptance.ops import available_backends, triton_launching, triton_wkv6
from receptance.ops.triton_launching import fits

pytest.importorskip("triton")
if not torch.cuda.is_available():
    interpreted("triton_chunks", "triton_wkv6_kernels")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Three products of tensor cores, which the fixture below takes, lose no more than float32 does.
BAR = 1e-6


@pytest.fixture(autouse=True)
def _as_on_a_gpu():
    with rounding_like_a_gpu(), products_like_a_gpu():
        yield


def run(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator, which at its door knows of no interpreter."""
    placed = (None if part is None else part.to(DEVICE) for part in x)
    out, state, _ = torch.ops.receptance.wkv6.default(*placed, "triton")
    return out.cpu(), state.cpu()


@pytest.mark.parametrize(
    ("time", "heads", "size", "options"),
    [
        pytest.param(CHUNK, 1, 16, {}, marks=pytest.mark.slow),
        (CHUNK + 3, 2, 16, {"masks": True}),
        pytest.param(CHUNK + 1, 1, 64, {"fresh": True}, marks=pytest.mark.slow),
        pytest.param(3 * CHUNK + 7, 2, 32, {"masks": True}, marks=pytest.mark.slow),
    ],
)
def test_against_the_definition(time, heads, size, options):
    x = draw(time, 2, time, heads, size, dtype=torch.float32, **options)
    assert_same(evaluate(run, x), truth(x), BAR)


@pytest.mark.slow
@pytest.mark.parametrize("decays", [(-12.0, -8.0), (-6.0, 9.0), (3.0, 5.0)])
def test_decays_of_any_strength(decays):
    """From nearly none to e^(-e^9), in one chunk and channel too."""
    x = draw(1, 1, 2 * CHUNK, 1, 16, dtype=torch.float32, decays=decays)
    assert_same(evaluate(run, x), truth(x), BAR)


@pytest.mark.slow
def test_a_slow_decay_behind_a_fast_one_is_exact():
    """A difference of sums that hold the fast one would have lost it."""
    x = draw(2, 1, CHUNK, 1, 16, dtype=torch.float32)
    x = x._replace(log_decay=torch.full_like(x.log_decay, -0.01))
    x.log_decay[:, 2] = -1e5
    assert_same(evaluate(run, x), truth(x), BAR)


@pytest.mark.slow
def test_narrow_inputs():
    x = draw(2, 1, CHUNK + 2, 1, 16, dtype=torch.bfloat16, masks=True)
    got, want = evaluate(run, x), truth(x)
    assert got.out.dtype == got.grads["key"].dtype == torch.bfloat16
    assert got.state.dtype == got.grads["log_decay"].dtype == torch.float32
    assert_same(got, want, 4e-3)


@pytest.mark.slow
def test_columns_of_a_state_in_any_number_of_programs(monkeypatch):
    x = draw(3, 1, CHUNK + 2, 1, 32, dtype=torch.float32)
    found = []
    for enough in (1, 2):
        monkeypatch.setattr(triton_launching, "ENOUGH", enough)
        found.append(run(x))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_inputs_need_not_be_contiguous_and_are_not_written_to():
    x = draw(4, 1, CHUNK + 2, 2, 16, dtype=torch.float32, masks=True)
    strided = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in x[:4]]
    before = x.clone()
    got = evaluate(run, x._replace(**dict(zip(GRADIENTS, strided, strict=False))))
    assert_same(got, evaluate(run, x), 0)
    for now, then in zip(x, before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize(
    ("size", "dtype"), [(16, torch.float64), (8, torch.float32), (24, torch.float32)]
)
def test_what_the_kernels_do_not_take_is_left_to_the_others(size, dtype):
    x = draw(5, 1, CHUNK + 2, 1, size, dtype=dtype)
    assert not fits(x.state)
    assert_same(evaluate(run, x), evaluate_backend("chunked", x), 0)


@pytest.mark.parametrize(("batch", "time"), [(2, 0), (0, 3), (1, 1)])
def test_few_tokens(batch, time):
    x = draw(6, batch, time, 1, 16, dtype=torch.float32)
    assert_same(evaluate(run, x), truth(x), 1e-6)


def test_offered_on_a_gpu_where_triton_is_installed(monkeypatch):
    assert available_backends("cuda", "wkv6") == ["triton", "chunked", "reference"]
    monkeypatch.setattr(triton_launching, "is_available", lambda: False)
    assert available_backends("cuda", "wkv6") == ["chunked", "reference"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "half", "options"),
    [
        *((name, "bf16", {"resets": None}) for name in triton_wkv6.WARPS),
        ("states", "fp32", {"PART": 16}),
        ("pairs_backward", "fp16", {}),
    ],
)
def test_every_kernel_compiles_for_a_gpu(name, half, options, tmp_path):
    """With few registers' worth of values in memory."""
    assert compiled_stack("triton_wkv6", name, half, options, tmp_path) <= 512
