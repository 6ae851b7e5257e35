"""The WKV-6 operator: what it computes, how exactly, in every shape and dtype, and at its door."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wkv6_cases import (
    CHUNK,
    GRADIENTS,
    USUAL,
    Inputs,
    assert_same,
    draw,
    errors,
    evaluate,
    evaluate_backend,
    every_backend,
    run,
    serial,
    truth,
    weights,
    with_reference,
)

from receptance.ops import available_backends, wkv6, wkv6_chunked
from receptance.ops.backends import choose_backend

# The largest errors that are allowed against float64. They are never raised to make a test pass.
BARS_FLOAT32 = {
    "out": 1e-6,
    "state": 1e-6,
    **{f"gradient of {name}": 2e-6 for name in GRADIENTS},
    "gradient of log_decay": 5e-6,
}
WIDE = ("log_decay", "bonus", "state")
BFLOAT16 = 5e-3
NARROW = (
    "out",
    *(f"gradient of {name}" for name in GRADIENTS if name not in WIDE),
)
BARS_BFLOAT16 = BARS_FLOAT32 | dict.fromkeys(NARROW, BFLOAT16)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


# ---- the definition -----------------------------------------------------------------------------


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("masks", [True, False])
def test_the_two_oracles_agree(fresh, masks):
    for seed in range(3):
        x = draw(seed, 3, 21, 2, 4, fresh=fresh, masks=masks)
        assert_same(evaluate(weights, x), truth(x), 1e-12)


def test_a_key_finds_all_values_that_were_stored_under_it():
    """What the delta rule of wkv7 is for: here values under one key add up."""
    key = torch.eye(4)[None, [0, 1, 0], None]
    value = torch.tensor([1.0, 2.0, 5.0])[None, :, None, None].expand(1, 3, 1, 4)
    bonus = torch.full((1, 4), 0.5)
    out, state = wkv6(key, torch.zeros_like(key), key, value, bonus)
    assert torch.equal(state[0, 0, 0], torch.full((4,), 6.0))
    assert torch.equal(state[0, 0, 1], torch.full((4,), 2.0))
    assert out[0, :, 0, 0].tolist() == [0.5, 1.0, 1 + 0.5 * 5]


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_constant_decay_is_the_same_decay_at_every_token(backend):
    """The case of RWKV-5, gradients included."""
    x = draw(0, 2, CHUNK + 3)
    decay = x.log_decay[0, 0].clone().requires_grad_()
    found = []
    for every in (decay, decay.expand(x.key.shape)):
        out, state = run(backend, x._replace(log_decay=every))
        found.append((out, state, torch.autograd.grad(out.sum() + state.sum(), decay)[0]))
    torch.testing.assert_close(*found)


# ---- gradients ----------------------------------------------------------------------------------


def leaves_of(x: Inputs) -> list[torch.Tensor]:
    return [getattr(x, name).clone().requires_grad_() for name in GRADIENTS]


def with_leaves(backend: str, x: Inputs, *leaves: torch.Tensor):
    return run(backend, x._replace(**dict(zip(GRADIENTS, leaves, strict=True))))


@every_backend
@pytest.mark.parametrize("time", [3, CHUNK + 3])
def test_gradcheck_of_every_entry(backend, time):
    x = draw(0, 1, time, 1, 2)
    assert torch.autograd.gradcheck(functools.partial(with_leaves, backend, x), leaves_of(x))


@every_backend
@pytest.mark.parametrize(
    ("time", "masks", "fresh"), [(2, True, True), (50, True, False), (50, False, True)]
)
def test_gradcheck_in_random_directions(backend, time, masks, fresh):
    x = draw(time, 3, time, 2, 3, masks=masks, fresh=fresh)
    function = functools.partial(with_leaves, backend, x)
    assert torch.autograd.gradcheck(function, leaves_of(x), fast_mode=True)


@every_backend
def test_a_second_derivative_is_refused_not_wrong(backend):
    x = draw(0, 1, 3)
    key = x.key.requires_grad_()
    out, _ = run(backend, x)
    (grad,) = torch.autograd.grad(out.sum(), key, create_graph=True)
    with pytest.raises(RuntimeError, match="wkv6 has no autograd formula"):
        grad.sum().backward()


@every_backend
@pytest.mark.parametrize("wanted", GRADIENTS)
def test_one_argument_alone_can_want_a_gradient(backend, wanted):
    x = draw(0, 2, 20)
    leaf = getattr(x, wanted).clone().requires_grad_()
    found = []
    for name in (backend, "reference"):
        out, _ = run(name, x._replace(**{wanted: leaf}))
        found.append(torch.autograd.grad(out.sum(), leaf)[0])
    torch.testing.assert_close(*found)


# ---- as a torch operator ------------------------------------------------------------------------


def test_the_signatures_of_the_flat_ops():
    """Exported programs hold them, so they stay as they are."""
    ops = torch.ops.receptance.wkv6.default, torch.ops.receptance.wkv6_backward.default
    shared = "".join(f"Tensor {name}, " for name in GRADIENTS[:5])
    rest = "Tensor? resets, Tensor? lengths, str backend"
    assert [str(op._schema) for op in ops] == [
        f"receptance::wkv6({shared}Tensor state, {rest}) -> ({', '.join(['Tensor'] * 3)})",
        f"receptance::wkv6_backward(Tensor grad_out, Tensor grad_state, {shared}Tensor starts, "
        f"{rest}) -> ({', '.join(['Tensor'] * 6)})",
    ]


@every_backend
@pytest.mark.parametrize(
    ("time", "masks", "dtype"),
    [(1, False, torch.bfloat16), (CHUNK + 3, False, torch.float32), (5, True, torch.float32)],
)
def test_opcheck_of_the_forward_op(backend, masks, dtype, time):
    x = draw(0, 2, time, masks=masks, dtype=dtype)
    x = x._replace(**dict(zip(GRADIENTS, leaves_of(x), strict=True)))
    torch.library.opcheck(torch.ops.receptance.wkv6.default, (*x, backend))


@every_backend
@pytest.mark.parametrize(("time", "masks"), [(1, False), (CHUNK + 3, True)])
def test_opcheck_of_the_backward_op(backend, masks, time):
    x = draw(0, 2, time, masks=masks, dtype=torch.float32)
    out, state, starts = torch.ops.receptance.wkv6(*x, backend)
    arguments = (out, state, *x[:5], starts, x.resets, x.lengths, backend)
    torch.library.opcheck(torch.ops.receptance.wkv6_backward.default, arguments)


@every_backend
def test_compiles_as_one_graph_with_gradients(backend):
    x = draw(0, 2, CHUNK + 3, dtype=torch.float32)

    def loss(*leaves):
        out, state = with_leaves(backend, x, *leaves)
        return out.square().sum() + state.sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = leaves_of(x)
        results.append(torch.autograd.grad(function(*leaves), leaves))
    torch.testing.assert_close(*results, rtol=0, atol=0)


# ---- accuracy -----------------------------------------------------------------------------------

ACCURACY = {
    # name: (batch, time, heads, size, dtype, decays as in USUAL)
    "short": (3, 3 * CHUNK + 7, 3, 16, torch.float32, USUAL),
    "short-bfloat16": (3, 3 * CHUNK + 7, 3, 16, torch.bfloat16, USUAL),
    "hardly a decay": (1, 200, 2, 64, torch.float32, (-16, -9)),
    "constant and slow": (1, 2048, 1, 16, torch.float32, (-7, -7)),
    "long": (1, 2048, 1, 64, torch.float32, USUAL),
    "strong": (1, 100, 2, 16, torch.float32, (2, 3.4)),
    "all of it at every token": (1, 100, 2, 16, torch.float32, (3.9, 4.4)),
    "anything": (1, 300, 2, 16, torch.float32, (-16, 9)),
}


@functools.cache
def accuracy_case(name: str):
    batch, time, heads, size, dtype, decays = ACCURACY[name]
    x = draw(3, batch, time, heads, size, dtype=dtype, decays=decays)
    return x, truth(x)


@every_backend
@pytest.mark.parametrize("name", ACCURACY)
def test_error_against_float64_on_the_same_rounded_inputs(name, backend):
    x, want = accuracy_case(name)
    found = errors(evaluate_backend(backend, x), want)
    bars = BARS_BFLOAT16 if x.key.dtype == torch.bfloat16 else BARS_FLOAT32
    wrong = {part: (error, bars[part]) for part, error in found.items() if not error <= bars[part]}
    assert not wrong, f"(error, bar): {wrong}"


# ---- shapes and layouts -------------------------------------------------------------------------

TIMES = sorted({0, 1, 2, 3, 4, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7})


@every_backend
@pytest.mark.parametrize(
    ("batch", "time", "heads", "size"),
    [
        *((3, time, 2, 8) for time in TIMES),
        (1, CHUNK + 1, 1, 64),
        (2, CHUNK + 1, 3, 1),
        (1, CHUNK + 1, 2, 20),
        (0, CHUNK, 2, 4),
        (1, 300, 1, 3),
    ],
)
@pytest.mark.parametrize("masks", [False, True])
def test_every_shape(backend, batch, time, heads, size, masks):
    x = draw(time, batch, time, heads, size, masks=masks)
    got = evaluate_backend(backend, x)
    assert got.out.shape == (batch, time, heads, size)
    assert got.state.shape == (batch, heads, size, size)
    assert_same(got, truth(x), 1e-11)


@every_backend
@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32),
    batch=st.integers(1, 4),
    time=st.integers(0, 3 * CHUNK),
    heads=st.integers(1, 3),
    size=st.integers(1, 9),
    fresh=st.booleans(),
    masks=st.booleans(),
    strongest=st.sampled_from([-4.0, 0.0, 2.0, 6.0]),
)
def test_any_inputs_match_the_definition(
    backend, seed, batch, time, heads, size, fresh, masks, strongest
):
    x = draw(seed, batch, time, heads, size, fresh=fresh, masks=masks, decays=(-9.0, strongest))
    assert_same(evaluate_backend(backend, x), truth(x), 1e-10)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("time", [1, CHUNK + 1])
def test_dtypes_in_and_out(backend, dtype, time):
    got = evaluate_backend(backend, draw(0, 2, time, dtype=dtype))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert got.out.dtype == dtype and got.state.dtype == wide
    kept = WIDE
    assert all(got.grads[n].dtype == (wide if n in kept else dtype) for n in GRADIENTS)


def test_a_narrow_decay_gets_a_narrow_gradient():
    x = draw(0, 2, 5, dtype=torch.bfloat16)
    x = x._replace(log_decay=x.log_decay.bfloat16())
    got = evaluate_backend("chunked", x)
    assert got.grads["log_decay"].dtype == torch.bfloat16


@every_backend
def test_inputs_need_not_be_contiguous(backend):
    x = draw(0, 3, CHUNK + 5, dtype=torch.float32, masks=True)
    turned = {n: getattr(x, n).transpose(0, -1).contiguous().transpose(0, -1) for n in GRADIENTS}
    strided = x._replace(**turned)
    assert not strided.key.is_contiguous()
    assert_same(evaluate_backend(backend, strided), evaluate_backend(backend, x), 1e-6)


# ---- laws ---------------------------------------------------------------------------------------


def between(x: Inputs, start: int, stop: int, state: torch.Tensor) -> Inputs:
    """The tokens from start to stop, after a state."""
    part = {name: getattr(x, name)[:, start:stop] for name in GRADIENTS[:4]}
    resets = None if x.resets is None else x.resets[:, start:stop]
    lengths = None if x.lengths is None else (x.lengths - start).clamp(0, stop - start)
    return x._replace(**part, state=state, resets=resets, lengths=lengths)


@with_reference
@settings(max_examples=15)
@given(seed=st.integers(0, 99), cuts=st.lists(st.integers(0, 50), max_size=3), masks=st.booleans())
def test_cutting_changes_nothing_gradients_included(backend, seed, cuts, masks):
    x = draw(seed, 2, 50, masks=masks)

    def in_pieces(x: Inputs):
        state, outputs = x.state, []
        for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), 50], strict=True):
            out, state = run(backend, between(x, start, stop, state))
            outputs.append(out)
        return torch.cat(outputs, dim=1), state

    assert_same(evaluate(in_pieces, x), truth(x), 1e-11)


@with_reference
@pytest.mark.parametrize("far", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 3, CHUNK, CHUNK + 5])
def test_a_reset_wipes_even_a_broken_state(backend, far, at):
    x = draw(0, 2, 2 * CHUNK, dtype=torch.float32)
    resets = torch.zeros(2, 2 * CHUNK, dtype=torch.bool)
    resets[:, at] = True
    broken = x._replace(resets=resets, state=torch.full_like(x.state, far))
    empty = between(x, at, 2 * CHUNK, torch.zeros_like(x.state))
    out, state = run(backend, broken)
    wanted, final = run(backend, empty)
    torch.testing.assert_close(out[:, at:], wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-5)


@with_reference
def test_what_stands_beyond_a_row_has_no_effect_and_no_gradient(backend):
    x = draw(0, 3, 40, masks=True)
    lengths = torch.tensor([0, 13, 40])
    beyond = (torch.arange(40) >= lengths[:, None])[..., None, None]
    x = x._replace(lengths=lengths)
    clean = evaluate_backend(backend, x)
    broken = {n: getattr(x, n).masked_fill(beyond, math.nan) for n in GRADIENTS[:4]}
    other = evaluate_backend(backend, x._replace(**broken))
    assert torch.equal(clean.out, other.out) and torch.equal(clean.state, other.state)
    assert not clean.out.masked_select(beyond.expand_as(clean.out)).any()
    for name in GRADIENTS:
        assert torch.equal(clean.grads[name], other.grads[name]), name


@with_reference
@pytest.mark.parametrize("name", GRADIENTS[:4])
@pytest.mark.parametrize("at", [0, 2, CHUNK + 1])
def test_a_nan_is_not_swallowed_and_does_not_reach_back(backend, name, at):
    x = draw(0, 2, CHUNK + 5, dtype=torch.float32)
    getattr(x, name)[1, at, 1, 3] = math.nan
    out, state = run(backend, x)
    # What is read is not written: a receptance touches its own output alone.
    assert out[1, at, 1].isnan().any() if name == "receptance" else state[1, 1].isnan().any()
    out[1, at:, 1] = 0
    assert out.isfinite().all(), "spread"


@every_backend
@pytest.mark.parametrize("far", [-1e4, -math.inf])
def test_a_channel_may_forget_everything_at_once(backend, far):
    x = draw(0, 2, 2 * CHUNK, dtype=torch.float32)
    x.log_decay[:, CHUNK + 2, :, ::2] = far
    got, want = evaluate_backend(backend, x), truth(x)
    if far == -math.inf:  # Autograd multiplies a gradient of zero by it.
        for grads in (got.grads, want.grads):
            grads["log_decay"] = grads["log_decay"].masked_fill(x.log_decay == far, 0)
    assert_same(got, want, 1e-5)


@every_backend
@pytest.mark.parametrize("time", [1, CHUNK + 5])
def test_inputs_are_never_written_to(backend, time):
    x = draw(0, 3, time, dtype=torch.float32, masks=True)
    before = x.clone()
    evaluate_backend(backend, x)
    for name, now, then in zip(Inputs._fields, x, before, strict=True):
        assert torch.equal(now, then), name


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_equal_on_repeat(backend, dtype):
    x = draw(0, 3, 70, dtype=dtype, masks=True)
    one, other = evaluate_backend(backend, x), evaluate_backend(backend, x)
    assert torch.equal(one.out, other.out) and torch.equal(one.state, other.state)
    assert all(torch.equal(one.grads[n], other.grads[n]) for n in GRADIENTS)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("change", [("FEW", 1000), ("PIECE", CHUNK), ("PIECE", 2 * CHUNK)])
def test_every_way_through_chunked_gives_the_same(change, masks, monkeypatch):
    x = draw(0, 2, 5 * CHUNK + 3, masks=masks)
    want = evaluate_backend("chunked", x)
    monkeypatch.setattr(wkv6_chunked, *change)
    assert_same(evaluate_backend("chunked", x), want, 1e-12)


# ---- the front door -----------------------------------------------------------------------------


def arguments(**changes) -> dict:
    x = draw(0, 2, 4, dtype=torch.float32)
    return dict(zip(GRADIENTS, x, strict=False)) | changes


SHAPE = (2, 4, 2, 8)
REFUSED = {
    "key of three axes": (
        {"key": torch.zeros(2, 4, 16)},
        r"key is .*; it must be floats \[B,T,H,N\]",
    ),
    "integer keys": ({"key": torch.zeros(SHAPE).long()}, "it must be floats"),
    "value of another shape": ({"value": torch.zeros(2, 4, 2, 7)}, r"value is \[2, 4, 2, 7\]"),
    "value of another dtype": (
        {"value": torch.zeros(SHAPE).double()},
        "value is torch.float64 and key torch.float32",
    ),
    "a bonus for every channel in one row": (
        {"bonus": torch.zeros(16)},
        r"bonus is \[16\]; with this key it must be \[2, 8\]",
    ),
    "an integer bonus": ({"bonus": torch.zeros(2, 8).long()}, "bonus is torch.int64; it must be a"),
    "receptance elsewhere": (
        {"receptance": torch.zeros(SHAPE, device="meta")},
        "receptance is on meta and key on cpu",
    ),
    "a complex decay": (
        {"log_decay": torch.zeros(SHAPE, dtype=torch.complex64)},
        "log_decay is torch.complex64; it must be a float type",
    ),
    "state of other rows": ({"state": torch.zeros(1, 2, 8, 8)}, r"state is \[1, 2, 8, 8\]"),
    "state of another dtype": (
        {"state": torch.zeros(2, 2, 8, 8).bfloat16()},
        "state is torch.bfloat16; with torch.float32 keys it must be torch.float32",
    ),
    "resets that are no bools": ({"resets": torch.zeros(2, 4)}, "resets is torch.float32"),
    "lengths of another shape": ({"lengths": torch.tensor([1])}, r"lengths is \[1\]"),
    "lengths that are bools": ({"lengths": torch.ones(2) > 0}, "lengths is torch.bool"),
    "an unknown backend": ({"backend": "cuda"}, "no wkv6 backend 'cuda' on cpu; available: .*ref"),
    "a backend for GPUs": ({"backend": "triton"}, "no wkv6 backend 'triton' on cpu; available: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_door_refuses(name):
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as refusal:
        wkv6(**arguments(**changes))
    assert "\n" not in str(refusal.value)


@with_reference
@pytest.mark.parametrize("lengths", [[5, 1], [-1, 2]])
def test_lengths_beyond_the_row_are_harmless(backend, lengths):
    inside = torch.tensor(lengths).clamp(0, 4)
    want = wkv6(**arguments(lengths=inside, backend=backend))
    got = wkv6(**arguments(lengths=torch.tensor(lengths), backend=backend))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@with_reference
def test_an_absent_state_is_zero(backend):
    given_state = wkv6(**arguments(state=torch.zeros(2, 2, 8, 8), backend=backend))
    absent = wkv6(**arguments(state=None, backend=backend))
    torch.testing.assert_close(absent, given_state, rtol=0, atol=0)


def test_the_first_backend_is_the_default():
    assert choose_backend("wkv6", torch.device("cpu"), None) == available_backends("cpu", "wkv6")[0]
    assert available_backends("meta", "wkv6") == ["chunked", "reference"]


def test_the_oracle_is_the_reference():
    x = draw(0, 1, 5)
    torch.testing.assert_close(run("reference", x), serial(x), rtol=0, atol=0)
