"""Laws of the WKV-4 operator: cutting, resets, ragged rows, linearity, independence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wkv_cases import (
    CHUNK,
    GRADIENTS,
    Inputs,
    assert_same,
    draw,
    evaluate,
    evaluate_kernel,
    every_backend,
    every_kernel,
    run,
    truth,
)

from receptance.ops import WKVState, available_backends

with_reference = pytest.mark.parametrize("backend", available_backends())


def after(x: Inputs, state: WKVState) -> Inputs:
    """The same inputs, continuing from a state."""
    numerator, denominator, exponent = state
    return x._replace(numerator=numerator, denominator=denominator, exponent=exponent)


def between(x: Inputs, start: int, stop: int) -> Inputs:
    """The tokens from start to stop."""
    part = slice(start, stop)
    return x._replace(
        key=x.key[:, part],
        value=x.value[:, part],
        resets=None if x.resets is None else x.resets[:, part],
        lengths=None if x.lengths is None else (x.lengths - start).clamp(0, stop - start),
    )


def run_in_pieces(kernel: str, cuts: list[int]):
    """The operator, called once for every piece, with the state carried over."""

    def operator(x: Inputs):
        state, outputs = x.state, []
        for start, stop in zip([0, *cuts], [*cuts, x.key.shape[1]], strict=True):
            out, state = run(kernel, after(between(x, start, stop), state))
            outputs.append(out)
        return torch.cat(outputs, dim=1), state

    return operator


# ---- cutting ------------------------------------------------------------------------------------


@every_kernel
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize(
    "cuts", [[0], [1], [CHUNK - 1], [CHUNK], [CHUNK + 1], [80], [7, 7, 39, 64, 79]]
)
def test_cutting_changes_nothing_gradients_included(kernel, masks, cuts):
    x = draw(1, 3, 80, 5, masks=masks)
    want = truth(x)
    frame = want.state.exponent
    assert_same(evaluate(run_in_pieces(kernel, cuts), x, frame), want, 1e-11)


@every_kernel
def test_one_token_at_a_time_is_the_same_in_float32(kernel):
    x = draw(2, 2, 70, 9, dtype=torch.float32)
    frame = truth(x).state.exponent.float()
    whole = evaluate_kernel(kernel, x, frame)
    assert_same(evaluate(run_in_pieces(kernel, list(range(1, 70))), x, frame), whole, 5e-6)


@every_backend
@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32),
    time=st.integers(1, 3 * CHUNK),
    fractions=st.lists(st.floats(0, 1), max_size=4),
    masks=st.booleans(),
)
def test_cutting_anywhere_changes_nothing(backend, seed, time, fractions, masks):
    x = draw(seed, 2, time, 3, masks=masks)
    cuts = sorted(round(fraction * time) for fraction in fractions)
    want = truth(x)
    frame = want.state.exponent
    assert_same(evaluate(run_in_pieces(backend, cuts), x, frame), want, 1e-10)


# ---- resets and ragged rows ---------------------------------------------------------------------


@every_kernel
@pytest.mark.parametrize("at", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 79])
def test_after_a_reset_nothing_is_left_of_what_was_before(kernel, at):
    x = draw(3, 2, 80, 4)
    resets = torch.zeros(2, 80, dtype=torch.bool)
    resets[1, at] = True
    out, state = run(kernel, x._replace(resets=resets))
    untouched, _ = run(kernel, x)
    fresh = after(between(x, at, 80), WKVState.empty(2, 4, dtype=torch.float64))
    fresh_out, fresh_state = run(kernel, fresh)
    torch.testing.assert_close(out[0], untouched[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out[1, :at], untouched[1, :at], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out[1, at:], fresh_out[1], rtol=1e-12, atol=1e-12)
    assert torch.equal(out[1, at], x.value[1, at])
    torch.testing.assert_close(
        [part[1] for part in state], [part[1] for part in fresh_state], rtol=1e-12, atol=1e-12
    )


@with_reference
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("at", [3, CHUNK, 66])
def test_a_nan_does_not_pass_a_reset(backend, bad, at):
    """Packed documents do not see each other, not even a broken one."""
    x = draw(4, 1, 80, 3, dtype=torch.float32)
    x.value[0, at] = bad
    x.numerator[0] = bad
    resets = torch.zeros(1, 80, dtype=torch.bool)
    resets[0, 70] = True
    value = x.value.requires_grad_()
    out, state = run(backend, x._replace(value=value, resets=resets))
    (grad,) = torch.autograd.grad(out[:, 70:].sum() + state.numerator.sum(), value)
    assert out[:, 70:].isfinite().all() and state.numerator.isfinite().all()
    assert grad[:, 70:].isfinite().all()
    assert not grad[:, :70].any()


@with_reference
def test_nothing_beyond_a_rows_end_has_any_effect(backend):
    lengths = torch.tensor([0, 1, CHUNK, 50, 80])
    x = draw(5, 5, 80, 4, dtype=torch.float32)._replace(lengths=lengths)
    beyond = torch.arange(80) >= lengths[:, None]
    generator = torch.Generator().manual_seed(0)
    resets = torch.rand(5, 80, generator=generator) < 0.1
    weight = torch.randn(5, 80, 4, generator=generator)
    results = []
    for garbage in (0.0, torch.nan, torch.inf, 1e30):
        filled = x._replace(
            key=x.key.masked_fill(beyond[..., None], garbage),
            value=x.value.masked_fill(beyond[..., None], -garbage),
            resets=resets | beyond if garbage else resets & ~beyond,
        )
        leaves = [getattr(filled, name).clone().requires_grad_() for name in GRADIENTS]
        filled = filled._replace(**dict(zip(GRADIENTS, leaves, strict=True)))
        out, state = run(backend, filled)
        # The gradient that comes back for those positions may be garbage as well.
        cotangent = weight.masked_fill(beyond[..., None], garbage)
        grads = torch.autograd.grad((out, state.numerator), leaves, (cotangent, x.numerator))
        results.append((out, *state, *grads))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)
    out, grads = results[0][0], dict(zip(GRADIENTS, results[0][4:], strict=True))
    for tensor in (out, grads["key"], grads["value"]):
        assert not tensor[beyond].any()


@every_kernel
def test_a_row_ends_where_its_length_says(kernel):
    x = draw(6, 4, 80, 3)
    lengths = torch.tensor([0, 1, CHUNK, 50])
    out, state = run(kernel, x._replace(lengths=lengths))
    for b, length in enumerate(lengths.tolist()):
        row = Inputs(*x[:2], *(part[b : b + 1] for part in x[2:7]))
        alone, alone_state = run(kernel, between(row, 0, length))
        torch.testing.assert_close(out[b, :length], alone[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            [part[b] for part in state], [part[0] for part in alone_state], rtol=1e-12, atol=1e-12
        )
    assert all(torch.equal(part[0], was[0]) for part, was in zip(state, x.state, strict=True))


@every_kernel
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_lengths_of_any_integer_type(kernel, dtype):
    x = draw(7, 3, 40, 3)
    lengths = torch.tensor([0, 7, 40])
    want = run(kernel, x._replace(lengths=lengths))
    torch.testing.assert_close(run(kernel, x._replace(lengths=lengths.to(dtype))), want)


# ---- algebra ------------------------------------------------------------------------------------


@every_kernel
def test_linear_in_values(kernel):
    x, y = draw(8, 2, 70, 3), draw(9, 2, 70, 3)
    y = y._replace(**{n: getattr(x, n) for n in x._fields if n not in ("value", "numerator")})

    def combine(p, q):
        return 2 * p - 3 * q

    both = x._replace(value=combine(x.value, y.value), numerator=combine(x.numerator, y.numerator))
    (out, state), (out_x, state_x), (out_y, state_y) = (run(kernel, z) for z in (both, x, y))
    close = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(out, combine(out_x, out_y), **close)
    torch.testing.assert_close(state[0], combine(state_x[0], state_y[0]), **close)
    torch.testing.assert_close(state[1:], state_x[1:], rtol=0, atol=0)


@every_kernel
def test_rows_and_channels_do_not_see_each_other(kernel):
    x = draw(10, 3, 70, 6, dtype=torch.float32)
    changed = x.clone()
    for part in (changed.key, changed.value, changed.numerator, changed.exponent):
        part[1] *= 3
        part[..., 4] += 1
    changed.bonus[4] += 1
    for plain, other in zip(
        evaluate_parts(kernel, x), evaluate_parts(kernel, changed), strict=True
    ):
        keep = [c for c in range(6) if c != 4]
        assert torch.equal(plain[[0, 2]][..., keep], other[[0, 2]][..., keep])


def evaluate_parts(kernel: str, x: Inputs) -> list[torch.Tensor]:
    """Everything about x that has rows and channels."""
    result = evaluate_kernel(kernel, x, torch.zeros_like(x.exponent))
    rows = ("key", "value", "numerator", "denominator")
    return [result.out, *result.state, *(result.grads[name] for name in rows)]


@every_kernel
@pytest.mark.parametrize("shift", [-3.0, 50.0])
def test_a_state_in_another_frame_is_the_same_state(kernel, shift):
    x = draw(11, 2, 40, 3)
    scale = torch.tensor(shift, dtype=torch.float64).exp()
    moved = x._replace(
        numerator=x.numerator * scale,
        denominator=x.denominator * scale,
        exponent=x.exponent - shift,
    )
    out, _ = run(kernel, moved)
    torch.testing.assert_close(out, run(kernel, x)[0], rtol=1e-12, atol=1e-12)


@every_kernel
@pytest.mark.parametrize("shift", [-7.5, 30.0])
def test_a_constant_added_to_all_keys_changes_nothing(kernel, shift):
    x = draw(12, 2, 40, 3)
    out, state = run(kernel, x)
    moved, moved_state = run(kernel, x._replace(key=x.key + shift, exponent=x.exponent + shift))
    torch.testing.assert_close(moved, out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moved_state.exponent, state.exponent + shift)


@every_kernel
def test_tilting_keys_against_the_decay_changes_nothing(kernel):
    x, tilt = draw(13, 2, 40, 3), -0.05
    tilted = x._replace(
        key=x.key + tilt * torch.arange(40, dtype=torch.float64)[:, None],
        log_decay=x.log_decay + tilt,
        bonus=x.bonus - tilt,
        exponent=x.exponent - tilt,
    )
    out, _ = run(kernel, tilted)
    torch.testing.assert_close(out, run(kernel, x)[0], rtol=1e-12, atol=1e-12)
