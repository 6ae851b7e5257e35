"""The WKV-4 operator: what it computes, how exactly, in every shape and dtype, and at its door."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wkv_cases import (
    CHUNK,
    GRADIENTS,
    Inputs,
    Result,
    assert_same,
    draw,
    errors,
    evaluate,
    evaluate_kernel,
    every_backend,
    every_kernel,
    quadratic,
    run,
    serial,
    truth,
)

from receptance.ops import WKVState, available_backends, chunked, native, wkv4
from receptance.ops.backends import choose_backend

# The largest errors that are allowed, as relative_error measures them against float64. They are
# never raised to make a test pass.
BARS_FLOAT32 = {
    "out": 1e-6,
    "gradient of log_decay": 5e-5,
    **{f"gradient of {name}": 5e-6 for name in GRADIENTS[1:]},
    "final numerator": 5e-6,
    "final denominator": 5e-6,
}
BFLOAT16 = 2.5e-3
BARS_BFLOAT16 = BARS_FLOAT32 | {
    "out": BFLOAT16,
    "gradient of key": BFLOAT16,
    "gradient of value": BFLOAT16,
}
BARS = {torch.float32: BARS_FLOAT32, torch.bfloat16: BARS_BFLOAT16, torch.float16: BARS_BFLOAT16}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def assert_within_bars(got: Result, want: Result, dtype: torch.dtype) -> None:
    found = errors(got, want)
    bars = BARS[dtype]
    wrong = {name: (error, bars[name]) for name, error in found.items() if not error <= bars[name]}
    assert not wrong, f"(error, bar): {wrong}"


def assert_bitwise(got: Result, want: Result) -> None:
    tensors = [(got.out, want.out), *zip(got.state, want.state, strict=True)]
    tensors += [(got.grads[name], want.grads[name]) for name in GRADIENTS]
    assert all(torch.equal(x, y) for x, y in tensors)


# ---- the definition -----------------------------------------------------------------------------


def test_reference_is_the_formula_of_the_paper():
    """Equation 16 with plain exponentials in plain floats, which moderate inputs permit."""
    x = draw(0, 2, 9, 3, fresh=True)
    out, _ = serial(x)
    for b, t, c in ((b, t, c) for b in range(2) for t in range(9) for c in range(3)):
        w, u = float(x.log_decay[c]), float(x.bonus[c])
        k, v = x.key[b, :, c].tolist(), x.value[b, :, c].tolist()
        weights = [math.exp((t - 1 - i) * w + k[i]) for i in range(t)] + [math.exp(u + k[t])]
        average = sum(e * y for e, y in zip(weights, v[: t + 1], strict=True)) / sum(weights)
        assert float(out[b, t, c]) == pytest.approx(average, rel=1e-13)


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("masks", [True, False])
def test_the_two_oracles_agree(fresh, masks):
    for seed in range(4):
        x = draw(seed, 3, 45, 5, fresh=fresh, masks=masks)
        want = truth(x)
        assert_same(evaluate(quadratic, x, want.state.exponent), want, 1e-12)


# ---- gradients ----------------------------------------------------------------------------------


def seen_from_outside(kernel, x, *leaves):
    """What a state means: the exponent is a constant to autograd, and cancels."""
    out, state = run(kernel, x._replace(**dict(zip(GRADIENTS, leaves, strict=True))))
    scale = state.exponent.detach().exp()
    return out, state.numerator * scale, state.denominator * scale


def leaves_of(x: Inputs) -> list[torch.Tensor]:
    return [getattr(x, name).clone().requires_grad_() for name in GRADIENTS]


@every_kernel
def test_gradcheck_of_every_entry(kernel):
    x = draw(0, 1, CHUNK + 3, 2)
    assert torch.autograd.gradcheck(functools.partial(seen_from_outside, kernel, x), leaves_of(x))


@every_kernel
@pytest.mark.parametrize(
    ("time", "masks", "fresh"), [(2, True, True), (70, True, False), (70, False, True)]
)
def test_gradcheck_in_random_directions(kernel, time, masks, fresh):
    x = draw(time, 3, time, 3, masks=masks, fresh=fresh)
    function = functools.partial(seen_from_outside, kernel, x)
    assert torch.autograd.gradcheck(function, leaves_of(x), fast_mode=True)


@every_backend
def test_a_second_derivative_is_refused_not_wrong(backend):
    x = draw(0, 1, 3, 2)
    key = x.key.requires_grad_()
    out, _ = run(backend, x)
    (grad,) = torch.autograd.grad(out.sum(), key, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


@every_backend
@pytest.mark.parametrize("wanted", GRADIENTS)
def test_one_argument_alone_can_want_a_gradient(backend, wanted):
    x = draw(0, 2, 5, 3)
    expected = truth(x).grads[wanted]
    leaf = getattr(x, wanted).clone().requires_grad_()
    frame = serial(x)[1].exponent
    got = evaluate_kernel(backend, x, frame).grads[wanted]
    out, _ = run(backend, x._replace(**{wanted: leaf}))
    (alone,) = torch.autograd.grad(out.sum(), leaf)
    (alone_expected,) = torch.autograd.grad(serial(x._replace(**{wanted: leaf}))[0].sum(), leaf)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(alone, alone_expected)


# ---- as a torch operator ------------------------------------------------------------------------


def test_the_signatures_of_the_flat_ops():
    """Exported programs hold them, so they stay as they are."""
    ops = torch.ops.receptance.wkv4.default, torch.ops.receptance.wkv4_backward.default
    shared = "Tensor log_decay, Tensor bonus, Tensor key, Tensor value, "
    state = "Tensor numerator, Tensor denominator, Tensor exponent, "
    grads = "Tensor grad_out, Tensor grad_numerator, Tensor grad_denominator, "
    rest = "Tensor? resets, Tensor? lengths, str backend"
    assert [str(op._schema) for op in ops] == [
        f"receptance::wkv4({shared}{state}{rest}) -> ({', '.join(['Tensor'] * 5)})",
        f"receptance::wkv4_backward({grads}{shared}Tensor starts, {rest}) -> "
        f"({', '.join(['Tensor'] * 6)})",
    ]


@every_backend
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_of_the_forward_op(backend, masks, dtype):
    x = draw(0, 2, CHUNK + 3, 4, masks=masks, dtype=dtype)
    leaves = dict(zip(GRADIENTS, leaves_of(x), strict=True))
    x = x._replace(**leaves).placed(backend)
    torch.library.opcheck(torch.ops.receptance.wkv4.default, (*x, backend))


@every_backend
@pytest.mark.parametrize("masks", [False, True])
def test_opcheck_of_the_backward_op(backend, masks):
    x = draw(0, 2, CHUNK + 3, 4, masks=masks, dtype=torch.float32).placed(backend)
    out, numerator, denominator, _, starts = torch.ops.receptance.wkv4(*x, backend)
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(y.shape, generator=generator).to(y) for y in (out, numerator, denominator)]
    arguments = (*grads, *x[:4], starts, x.resets, x.lengths, backend)
    torch.library.opcheck(torch.ops.receptance.wkv4_backward.default, arguments)


@every_backend
def test_compiles_as_one_graph_with_gradients(backend):
    x = draw(0, 2, CHUNK + 3, 4, dtype=torch.float32)

    def loss(*leaves):
        out, state = run(backend, x._replace(**dict(zip(GRADIENTS, leaves, strict=True))))
        return out.square().sum() + state.numerator.sum() + state.denominator.sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = leaves_of(x)
        results.append(torch.autograd.grad(function(*leaves), leaves))
    torch.testing.assert_close(*results, rtol=0, atol=0)


# ---- accuracy -----------------------------------------------------------------------------------

ACCURACY = {
    # name: (batch, time, width, dtype, decays); decays are -e^x
    "short": (3, 3 * CHUNK + 7, 33, torch.float32, (-6, 2)),
    "short-bfloat16": (3, 3 * CHUNK + 7, 33, torch.bfloat16, (-6, 2)),
    "short-float16": (3, 3 * CHUNK + 7, 33, torch.float16, (-6, 2)),
    "long": (1, 4096, 64, torch.float32, (-6, 2)),
    "long-bfloat16": (1, 4096, 64, torch.bfloat16, (-12, 2)),
    "slow": (1, 4096, 64, torch.float32, (-9, -9)),
    "slow-8192": (1, 8192, 64, torch.float32, (-12, -4)),
}


@functools.cache
def accuracy_case(name: str) -> tuple[Inputs, Result]:
    batch, time, width, dtype, decays = ACCURACY[name]
    x = draw(3, batch, time, width, dtype=dtype, decays=decays)
    return x, truth(x)


@every_kernel
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n == "slow-8192" else ()) for n in ACCURACY]
)
def test_error_against_float64_on_the_same_rounded_inputs(name, kernel):
    x, want = accuracy_case(name)
    assert_within_bars(evaluate_kernel(kernel, x, want.state.exponent), want, x.key.dtype)


# ---- shapes and layouts -------------------------------------------------------------------------

BORDERS = {size + i for size in (chunked.CHUNK, native.CHUNK) for i in (-1, 0, 1)}
TIMES = sorted({0, 1, 2, 3 * CHUNK + 7} | BORDERS)


@every_kernel
@pytest.mark.parametrize(
    ("batch", "time", "width"),
    [
        *((3, time, 33) for time in TIMES),
        *((1, CHUNK + 1, width) for width in (1, 31, 64, 768, 1000)),
        (8, CHUNK + 1, 31),
        (8, 1, 1000),
        (1, CHUNK * CHUNK + 1, 3),  # more chunks than a chunk has tokens
        (0, 5, 4),
    ],
)
@pytest.mark.parametrize("masks", [False, True])
def test_every_shape(kernel, batch, time, width, masks):
    x = draw(time, batch, time, width, masks=masks)
    want = truth(x)
    got = evaluate_kernel(kernel, x, want.state.exponent)
    assert got.out.shape == (batch, time, width)
    assert all(part.shape == (batch, width) for part in got.state)
    assert_same(got, want, 1e-11)


@every_backend
@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32),
    batch=st.integers(1, 4),
    time=st.integers(0, 3 * CHUNK),
    width=st.integers(1, 20),
    fresh=st.booleans(),
    masks=st.booleans(),
)
def test_any_inputs_match_the_definition(backend, seed, batch, time, width, fresh, masks):
    x = draw(seed, batch, time, width, fresh=fresh, masks=masks)
    want = truth(x)
    assert_same(evaluate_kernel(backend, x, want.state.exponent), want, 1e-10)


@every_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_in_and_out(kernel, dtype):
    x = draw(0, 2, 5, 3, dtype=dtype)
    got = evaluate_kernel(kernel, x, serial(x)[1].exponent)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert got.out.dtype == got.grads["key"].dtype == got.grads["value"].dtype == dtype
    assert {part.dtype for part in got.state} == {wide}
    assert {got.grads[name].dtype for name in ("log_decay", "bonus", "numerator")} == {wide}


def scattered(x: torch.Tensor) -> torch.Tensor:
    """The same numbers with gaps between them and the axes stored the other way round."""
    spaced = torch.full((*x.shape[::-1], 2), torch.nan, dtype=x.dtype)
    spaced[..., 0] = x.permute(*reversed(range(x.dim())))
    return spaced[..., 0].permute(*reversed(range(x.dim())))


@every_kernel
def test_inputs_need_not_be_contiguous(kernel):
    x = draw(0, 3, CHUNK + 5, 6, dtype=torch.float32, masks=True)
    strided = Inputs(*(scattered(part) for part in x[:7]), x.resets.t().contiguous().t(), x.lengths)
    assert not strided.key.is_contiguous()
    plain, other = run(kernel, x), run(kernel, strided)
    torch.testing.assert_close(other, plain, rtol=0, atol=0)

    grads = []
    for inputs in (x, strided):
        inputs = inputs._replace(
            **{name: getattr(inputs, name).detach().requires_grad_() for name in GRADIENTS}
        )
        out, _ = run(kernel, inputs)
        # The gradient of a sum is expanded from one number, the transposed one is strided.
        loss = out.sum() + (out.transpose(1, 2) * torch.arange(CHUNK + 5)).sum()
        grads.append(torch.autograd.grad(loss, [getattr(inputs, name) for name in GRADIENTS]))
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)


@every_kernel
def test_inputs_may_be_expanded(kernel):
    x = draw(0, 1, CHUNK + 5, 1, dtype=torch.float32)
    sizes = [(6,), (6,), *[(3, CHUNK + 5, 6)] * 2, *[(3, 6)] * 3]
    expanded = Inputs(*(part.expand(size) for part, size in zip(x[:7], sizes, strict=True)))
    want = run(kernel, expanded.clone())
    torch.testing.assert_close(run(kernel, expanded), want, rtol=0, atol=0)


# ---- nothing is left to chance ------------------------------------------------------------------


@every_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_equal_on_repeat(kernel, dtype):
    x = draw(0, 3, 70, 130, dtype=dtype, masks=True)
    results = [evaluate_kernel(kernel, x, torch.zeros(3, 130)) for _ in range(3)]
    for other in results[1:]:
        assert_bitwise(other, results[0])


@every_kernel
def test_bitwise_equal_with_any_number_of_threads(kernel):
    # Wide enough that torch, too, splits the work of one step of the chunked form. torch's exp2
    # has other bits in the elements that do not fill a vector, and threads decide which these
    # are: for the chunked form the promise holds where vectors divide the width.
    time, width = (4, 1024) if kernel == "chunked" else (2 * CHUNK, 1000)
    x = draw(0, 37, time, width, dtype=torch.float32, masks=True)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            results.append(evaluate_kernel(kernel, x, torch.zeros(37, width)))
    finally:
        torch.set_num_threads(threads)
    assert_bitwise(*results)


@every_kernel
@pytest.mark.parametrize("masks", [False, True])
def test_no_output_shows_memory_that_was_never_written(kernel, masks):
    x = draw(0, 3, CHUNK + 5, 37, dtype=torch.float32, masks=masks)
    frame = serial(x)[1].exponent
    want = evaluate_kernel(kernel, x, frame)
    fills = torch.utils.deterministic.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        assert torch.empty(1).isnan()
        poisoned = evaluate_kernel(kernel, x, frame)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fills
    assert_bitwise(poisoned, want)


@every_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_are_never_written_to(kernel, dtype):
    x = draw(0, 3, CHUNK + 5, 4, dtype=dtype, masks=True)
    before = x.clone()
    leaves = {name: getattr(x, name).requires_grad_() for name in GRADIENTS}
    out, state = run(kernel, x._replace(**leaves))
    loss = out.float().sum() + state.numerator.sum()
    torch.autograd.grad(loss, list(leaves.values()))
    for name, now, then in zip(Inputs._fields, x, before, strict=True):
        assert torch.equal(now, then), name


@every_kernel
def test_a_state_may_be_continued_twice(kernel):
    x = draw(0, 2, CHUNK, 4, dtype=torch.float32)
    _, state = run(kernel, x)
    again = x._replace(numerator=state[0], denominator=state[1], exponent=state[2])
    first = run(kernel, again)
    torch.testing.assert_close(run(kernel, again), first, rtol=0, atol=0)


# ---- extremes -----------------------------------------------------------------------------------


def extreme_keys(bound: float, time: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (2, time, width), generator=generator) * 2.0 - 1
    return bound * signs


EXTREMES = {
    **{f"keys at +-{bound}": {"key": bound} for bound in (40, 300, 1000)},
    "keys of -1e4": {"key": torch.tensor(-1e4)},
    "keys of 1e4": {"key": torch.tensor(1e4)},
    "bonus of 30": {"bonus": 30.0},
    "bonus of -30": {"bonus": -30.0},
    "no decay at all": {"log_decay": 0.0},
    "decay to almost nothing": {"log_decay": -math.exp(12)},
    "everything at once": {"key": 1000, "bonus": 30.0, "log_decay": -math.exp(5)},
}


def extreme_case(changes: dict, time: int, dtype: torch.dtype, fresh: bool) -> Inputs:
    x = draw(0, 2, time, 6, dtype=torch.float32, decays=(-14, 5), fresh=fresh)
    key = changes.get("key")
    if isinstance(key, int):
        x = x._replace(key=extreme_keys(key, time, 6))
    elif key is not None:
        x = x._replace(key=key.expand_as(x.key))
    for name in ("bonus", "log_decay"):
        if name in changes:
            x = x._replace(**{name: torch.full_like(getattr(x, name), changes[name])})
    return x.to(dtype)


@every_kernel
@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extremes_stay_finite(kernel, name, dtype):
    for fresh in (True, False):
        x = extreme_case(EXTREMES[name], 100, dtype, fresh)
        want = truth(x)
        got = evaluate_kernel(kernel, x, want.state.exponent)
        tensors = {"out": got.out, **got.state._asdict(), **got.grads}
        infinite = [n for n, tensor in tensors.items() if not tensor.isfinite().all()]
        assert not infinite
        if not fresh:
            continue
        # A weighted average of values lies between them, and the first one is the value itself.
        assert torch.equal(got.out[:, 0], x.value[:, 0])
        assert got.out.abs().max() <= x.value.abs().max() * (1 + 2**-7)
        if dtype == torch.float32 and name.startswith("keys at"):
            # float32 holds 4 decimals of an exponent of 1000.
            assert max(errors(got, want).values()) < 1e-4


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("name", ["log_decay", "key"])
def test_minus_infinity_is_a_limit(backend, name):
    """A token of weight 0, or a state that is gone after one: as with any number far below."""
    x = draw(0, 2, 3 * CHUNK, 4, dtype=torch.float32)
    place = (slice(None), slice(CHUNK, 2 * CHUNK + 3)) if name == "key" else slice(1, 3)
    found = []
    for far in (-1e29, -math.inf):
        changed = getattr(x, name).clone()
        changed[place] = far
        inputs = [t.requires_grad_() for t in (x._replace(**{name: changed}))[:4]]
        out, _ = wkv4(*inputs, x.state, backend=backend)
        found.append((out, *torch.autograd.grad(out.sum(), inputs)))
    assert all(t.isfinite().all() for t in found[1])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("backend", available_backends())
def test_exponents_are_constants(backend):
    x = draw(0, 2, 5, 3, dtype=torch.float32)
    state = WKVState(*(part.clone().requires_grad_() for part in x.state))
    out, after = wkv4(x.log_decay, x.bonus, x.key, x.value, state, backend=backend)
    found = torch.autograd.grad(out.sum() + after.numerator.sum(), list(state), allow_unused=True)
    assert found[2] is None and not after.exponent.requires_grad


@every_kernel
@pytest.mark.parametrize("decay", [-14.0, 5.0])
def test_extremes_over_8192_tokens(kernel, decay):
    x = draw(0, 1, 8192, 8, dtype=torch.float32, decays=(decay, decay), fresh=True)
    x = x._replace(key=40 * x.key)
    got = evaluate_kernel(kernel, x, run("chunked", x)[1].exponent)
    assert all(t.isfinite().all() for t in (got.out, *got.state, *got.grads.values()))
    assert torch.equal(got.out[:, 0], x.value[:, 0])
    assert got.out.abs().max() <= x.value.abs().max() * (1 + 1e-5)


@every_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [0, 5, CHUNK])
def test_a_nan_is_not_swallowed(kernel, dtype, at):
    for name in ("key", "value"):
        x = draw(0, 2, CHUNK + 5, 3, dtype=dtype)
        getattr(x, name)[1, at, 2] = torch.nan
        out, state = run(kernel, x)
        assert out[1, at:, 2].isnan().all(), f"{name}: swallowed"
        assert state.numerator[1, 2].isnan()
        out[1, at:, 2] = 0
        assert out.isfinite().all(), f"{name}: spread"


# ---- the front door -----------------------------------------------------------------------------


def arguments(**changes) -> dict:
    x = draw(0, 2, 4, 3, dtype=torch.float32)
    plain = {"log_decay": x.log_decay, "bonus": x.bonus, "key": x.key, "value": x.value}
    return plain | {"state": x.state} | changes


STATE = WKVState.empty(2, 3)
REFUSED = {
    "key of two axes": ({"key": torch.zeros(4, 3)}, r"key is \[4, 3\].*must be \[B,T,C\]"),
    "value of another shape": ({"value": torch.zeros(2, 4, 5)}, r"value \[2, 4, 5\]"),
    "value of another dtype": (
        {"value": torch.zeros(2, 4, 3).double()},
        "float32 and value torch.float64",
    ),
    "integer keys": (
        {"key": torch.zeros(2, 4, 3).long(), "value": torch.zeros(2, 4, 3).long()},
        "must be one float type",
    ),
    "a scalar for a key": (
        {"key": torch.tensor(1.0), "value": torch.tensor(1.0), "state": None},
        r"must be \[B,T,C\]",
    ),
    "value elsewhere": ({"value": torch.zeros(2, 4, 3, device="meta")}, "value is on meta"),
    "a complex decay": (
        {"log_decay": torch.zeros(3, dtype=torch.complex64)},
        "log_decay is torch.complex64; it must be a float type",
    ),
    "short decay": ({"log_decay": torch.zeros(2)}, r"log_decay is \[2\].*must be \[3\]"),
    "bonus of two axes": ({"bonus": torch.zeros(1, 3)}, r"bonus is \[1, 3\].*must be \[3\]"),
    "state of other rows": ({"state": WKVState.empty(1, 3)}, r"state.numerator is \[1, 3\]"),
    "state of another dtype": (
        {"state": WKVState.empty(2, 3, dtype=torch.float64)},
        "state.numerator is torch.float64.*must be torch.float32",
    ),
    "state in half precision": (
        {"state": STATE._replace(denominator=torch.zeros(2, 3).bfloat16())},
        "state.denominator is torch.bfloat16",
    ),
    "state elsewhere": (
        {"state": STATE._replace(exponent=torch.zeros(2, 3, device="meta"))},
        "state.exponent is on meta",
    ),
    "resets of another shape": (
        {"resets": torch.zeros(2, 5, dtype=torch.bool)},
        r"resets is \[2, 5\].*must be \[2, 4\]",
    ),
    "resets that are no bools": ({"resets": torch.zeros(2, 4)}, "resets is torch.float32"),
    "lengths of another shape": ({"lengths": torch.tensor([1])}, r"lengths is \[1\]"),
    "lengths that are no integers": ({"lengths": torch.zeros(2)}, "lengths is torch.float32"),
    "lengths that are bools": ({"lengths": torch.ones(2) > 0}, "lengths is torch.bool"),
    "an unknown backend": ({"backend": "cuda"}, "no wkv4 backend 'cuda' on cpu; available: .*ref"),
    "a backend for GPUs": ({"backend": "triton"}, "no wkv4 backend 'triton' on cpu; available: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_door_refuses(name):
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as refusal:
        wkv4(**arguments(**changes))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("lengths", [[5, 1], [-1, 2]])
@pytest.mark.parametrize("backend", available_backends())
def test_lengths_beyond_the_row_are_harmless(backend, lengths):
    """The contents of lengths are not looked at (on a GPU that would wait), but memory is safe."""
    inside = torch.tensor(lengths).clamp(0, 4)
    want = wkv4(**arguments(lengths=inside, backend=backend))
    got = wkv4(**arguments(lengths=torch.tensor(lengths), backend=backend))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_backend_that_is_not_there_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    assert available_backends() == ["chunked", "reference"]
    with pytest.raises(ValueError, match="no wkv4 backend 'native' on cpu; available: chunked, "):
        wkv4(**arguments(backend="native"))
    wkv4(**arguments())  # the automatic choice falls back


def test_kernels_are_only_offered_where_they_run():
    assert available_backends("meta") == ["chunked", "reference"]
    assert choose_backend("wkv4", torch.device("cpu"), None) == available_backends()[0]


def test_a_state_may_be_any_three_tensors():
    x = arguments()
    plain = wkv4(**x | {"state": tuple(x["state"])})
    torch.testing.assert_close(plain, wkv4(**x), rtol=0, atol=0)


@pytest.mark.parametrize("backend", available_backends())
def test_an_absent_state_is_the_empty_one(backend):
    given_state = wkv4(**arguments(state=STATE, backend=backend))
    absent = wkv4(**arguments(state=None, backend=backend))
    torch.testing.assert_close(absent, given_state, rtol=0, atol=0)


@pytest.mark.skipif(not native.is_available(), reason="the C++ kernels were not built")
def test_an_instruction_set_that_is_not_there_is_refused():
    x = draw(0, 1, 2, 3, dtype=torch.float32)
    with pytest.raises(ValueError, match="instruction set neon9 is not available"):
        native.forward(x, "neon9")


@pytest.mark.skipif(not native.is_available(), reason="kernels not built")
@pytest.mark.parametrize(("name", "wanted"), [("wkv4_forward", 14), ("wkv4_backward", 16)])
@pytest.mark.parametrize("difference", [-1, 1])
def test_the_kernels_refuse_another_number_of_addresses(name, wanted, difference):
    addresses = [0] * (wanted + difference)
    message = f"{name} takes {wanted} addresses and was given {len(addresses)}"
    with pytest.raises(ValueError, match=message):
        getattr(native.library(), name)(1, 1, 1, 0, 1, "", addresses)
