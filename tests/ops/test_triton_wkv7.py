"""The Triton kernels of WKV-7: in numpy where there is no GPU, so with few heads and chunks."""

from __future__ import annotations

import pytest
import torch
from interpreting import (
    compiled_stack,
    interpreted,
    products_like_a_gpu,
    rounding_like_a_gpu,
)
from wkv7_cases import (
    CHUNK,
    GRADIENTS,
    Inputs,
    assert_same,
    draw,
    evaluate,
    evaluate_backend,
    truth,
)

from receptance.ops import available_backends, triton_launching, triton_wkv7
from receptance.ops.triton_launching import fits

pytest.importorskip("triton")
if not torch.cuda.is_available():
    interpreted("triton_chunks", "triton_wkv7_kernels")
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
    out, state, _ = torch.ops.receptance.wkv7.default(*placed, "triton")
    return out.cpu(), state.cpu()


@pytest.mark.parametrize(
    ("time", "heads", "size", "options"),
    [
        pytest.param(CHUNK, 2, 16, {}, marks=pytest.mark.slow),
        (2 * CHUNK + 3, 2, 16, {"masks": True}),
        pytest.param(CHUNK + 1, 1, 64, {"fresh": True}, marks=pytest.mark.slow),
        pytest.param(5 * CHUNK + 7, 2, 32, {"masks": True}, marks=pytest.mark.slow),
        pytest.param(2 * CHUNK, 1, 128, {}, marks=pytest.mark.slow),
    ],
)
def test_against_the_definition(time, heads, size, options):
    x = draw(time, 2, time, heads, size, dtype=torch.float32, **options)
    assert_same(evaluate(run, x), truth(x), BAR)


@pytest.mark.slow
@pytest.mark.parametrize("decays", [(-2.0, -1.5), (-1e-5, 0.0)])
def test_the_strongest_decays_and_the_weakest(decays):
    x = draw(1, 1, 3 * CHUNK, 1, 32, dtype=torch.float32, decays=decays)
    assert_same(evaluate(run, x), truth(x), 3 * BAR)


@pytest.mark.slow
def test_one_direction_that_is_written_again_and_again():
    """Powers of the triangular matrix would be large and cancel."""
    x = draw(1, 1, 2 * CHUNK, 1, 16, dtype=torch.float32)
    x = x._replace(removal=x.removal[:, :1].expand_as(x.removal))
    x = x._replace(replacement=-x.removal)
    assert_same(evaluate(run, x), truth(x), BAR)


@pytest.mark.slow
def test_narrow_inputs():
    x = draw(2, 1, CHUNK + 2, 2, 16, dtype=torch.bfloat16, masks=True)
    got, want = evaluate(run, x), truth(x)
    assert got.out.dtype == got.grads["key"].dtype == torch.bfloat16
    assert got.state.dtype == got.grads["log_decay"].dtype == torch.float32
    assert_same(got, want, 4e-3)


@pytest.mark.slow
def test_rows_of_a_state_in_any_number_of_programs(monkeypatch):
    x = draw(3, 1, CHUNK + 2, 1, 32, dtype=torch.float32)
    found = []
    for enough in (1, 2):
        monkeypatch.setattr(triton_launching, "ENOUGH", enough)
        found.append(evaluate(run, x))
    assert_same(found[0], found[1], 1e-6)


@pytest.mark.slow
def test_inputs_need_not_be_contiguous_and_are_not_written_to():
    x = draw(4, 1, CHUNK + 2, 2, 16, dtype=torch.float32, masks=True)
    strided = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in x[:6]]
    before = x.clone()
    got = evaluate(run, x._replace(**dict(zip(GRADIENTS, strided, strict=False))))
    assert_same(got, evaluate(run, x), 0)
    for now, then in zip(x, before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (16, {"dtype": torch.float64}),
        (8, {"dtype": torch.float32}),
        (24, {"dtype": torch.float32}),
        (16, {"dtype": torch.float32, "decays": (-9.0, 0.0)}),
    ],
)
def test_what_the_kernels_do_not_take_is_left_to_the_others(size, options):
    x = draw(5, 1, CHUNK + 2, 1, size, **options)
    assert_same(evaluate(run, x), evaluate_backend("chunked", x), 0)
    assert fits(x.state) == (options["dtype"] == torch.float32 and size == 16)


@pytest.mark.parametrize(("batch", "time"), [(2, 0), (0, 3), (1, 1)])
def test_few_tokens(batch, time):
    x = draw(6, batch, time, 1, 16, dtype=torch.float32)
    assert_same(evaluate(run, x), truth(x), 1e-6)


def test_offered_on_a_gpu_where_triton_is_installed(monkeypatch):
    assert available_backends("cuda", "wkv7") == ["triton", "chunked", "reference"]
    monkeypatch.setattr(triton_launching, "is_available", lambda: False)
    assert available_backends("cuda", "wkv7") == ["chunked", "reference"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "half", "options"),
    [
        *((name, "bf16", {"resets": None}) for name in triton_wkv7.WARPS),
        ("solve", "fp32", {"N": 32, "starts": None}),
        ("states", "fp32", {"PART": 16}),
        ("writers_backward", "fp16", {}),
    ],
)
def test_every_kernel_compiles_for_a_gpu(name, half, options, tmp_path):
    """With few registers' worth of values in memory: two states of 64 x 64 and much else."""
    assert compiled_stack("triton_wkv7", name, half, options, tmp_path) <= 512
