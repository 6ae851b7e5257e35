"""The C++ kernels of wkv6, in every instruction set of this machine, against the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from receptance.ops import native, wkv6, wkv6_native, wkv6_reference
from receptance.ops.arguments import Wkv6BackwardInputs, Wkv6Inputs

pytestmark = pytest.mark.skipif(not native.is_available(), reason="kernels not built")

RESULTS = ("out", "state", *(f"gradient of {name}" for name in Wkv6Inputs._fields[:6]))
# A relative root mean square; inputs are rounded to bfloat16 before, and results after.
BOUNDS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3}
every_set = pytest.mark.parametrize("instruction_set", native.instruction_sets())
CHUNK = wkv6_native.CHUNK


def draw(
    seed: int,
    *shape: int,
    dtype: torch.dtype = torch.float64,
    masks: bool = False,
    decays: tuple[float, float] = (-9, 2),
) -> Wkv6Inputs:
    """Random inputs [B,T,H,N], log_decay from -e^decays."""
    generator = torch.Generator().manual_seed(seed)
    batch, time, heads, size = shape

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    low, high = decays
    log_decay = -(low + (high - low) * torch.rand(shape, generator=generator).double()).exp()
    resets = torch.rand(batch, time, generator=generator) < 0.1 if masks else None
    lengths = torch.randint(time + 1, (batch,), generator=generator) if masks else None
    x = Wkv6Inputs(
        normal(*shape),
        log_decay,
        normal(*shape),
        normal(*shape),
        normal(heads, size),
        normal(batch, heads, size, size),
        resets,
        lengths,
    )
    wide = torch.promote_types(dtype, torch.float32)
    narrow = {name: getattr(x, name).to(dtype) for name in ("receptance", "key", "value")}
    kept = {name: getattr(x, name).to(wide) for name in ("log_decay", "bonus", "state")}
    return x._replace(**narrow, **kept)


def weights(x: Wkv6Inputs) -> tuple[Tensor, Tensor]:
    """The gradients of output and state: numbers that bfloat16 can hold."""
    generator = torch.Generator().manual_seed(9)
    shapes = ((x.value.shape, x.value.dtype), (x.state.shape, x.state.dtype))
    drawn = (torch.randn(shape, generator=generator).bfloat16().to(d) for shape, d in shapes)
    out, state = drawn
    return out, state


def wanted(x: Wkv6Inputs) -> list[Tensor]:
    """Output, state and the gradients, by autograd of the definition in float64."""
    leaves = [part.detach().double().requires_grad_() for part in x[:6]]
    out, state = wkv6_reference.wkv6(Wkv6Inputs(*leaves, x.resets, x.lengths))
    grads = torch.autograd.grad((out, state), leaves, [w.double() for w in weights(x)])
    return [out.detach(), state.detach(), *grads]


def found(x: Wkv6Inputs, instruction_set: str = "") -> list[Tensor]:
    """The same from the kernels."""
    out, state, starts = wkv6_native.forward(x, instruction_set)
    grad_out, grad_state = weights(x)
    inputs = Wkv6BackwardInputs(grad_out, grad_state, *x[:5], starts, x.resets, x.lengths)
    return [out, state, *wkv6_native.backward(inputs, instruction_set)]


def relative_error(got: Tensor, want: Tensor) -> float:
    size = want.double().square().mean().sqrt().clamp(min=1e-300)
    return float((got.double() - want.double()).square().mean().sqrt() / size)


def assert_same(got: list[Tensor], want: list[Tensor], bound: float) -> None:
    pairs = zip(RESULTS, got, want, strict=True)
    errors = {name: relative_error(a, b) for name, a, b in pairs if a.numel()}
    wrong = {name: error for name, error in errors.items() if not error <= bound}
    assert not wrong, f"beyond {bound:.0e}: {wrong}"


@every_set
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 2 * CHUNK + 5, 2, 64), (1, CHUNK, 3, 8), (2, 7, 1, 24), (1, 3, 2, 128), (2, 1, 1, 1)],
    ids=str,
)
def test_equals_the_definition(instruction_set, dtype, shape):
    x = draw(0, *shape, dtype=dtype)
    got = found(x, instruction_set)
    assert_same(got, wanted(x), BOUNDS[dtype])
    assert [part.dtype for part in got[2:]] == [part.dtype for part in x[:6]]


@every_set
@pytest.mark.parametrize("seed", range(4))
def test_resets_and_lengths(instruction_set, seed):
    x = draw(seed, 3, CHUNK + 9, 2, 20, masks=True)
    assert_same(found(x, instruction_set), wanted(x), 1e-14)


@every_set
def test_what_lies_beyond_a_row_is_not_read(instruction_set):
    x = draw(0, 3, CHUNK + 3, 2, 16)._replace(lengths=torch.tensor([0, 5, CHUNK]))
    clean = found(x, instruction_set)
    beyond = torch.arange(CHUNK + 3) >= x.lengths[:, None]
    dirty = [part.masked_fill(beyond[..., None, None], torch.nan) for part in x[:4]]
    got = found(Wkv6Inputs(*dirty, *x[4:]), instruction_set)
    assert all(torch.equal(one, other) for one, other in zip(got, clean, strict=True))
    for part in (got[0], *got[2:6]):
        assert not part[beyond].any()


@every_set
def test_a_reset_forgets_a_state_that_is_not_finite(instruction_set):
    resets = torch.zeros(2, 6, dtype=torch.bool)
    resets[:, 2] = True
    x = draw(0, 2, 6, 2, 16)._replace(resets=resets)
    clean = found(x, instruction_set)
    x.state[0] = torch.nan
    got = found(x, instruction_set)
    assert torch.equal(got[1], clean[1])
    assert torch.equal(got[0][:, 2:], clean[0][:, 2:])
    assert all(torch.equal(one[1], other[1]) for one, other in zip(got, clean, strict=True))


@every_set
@pytest.mark.parametrize("size", [16, 24, 64])
def test_a_head_that_is_not_finite_harms_no_other(instruction_set, size):
    """Heads that follow each other on a thread work in the same memory."""
    x = draw(0, 1, 5, 3, size)
    clean = found(x, instruction_set)
    x.state[0, 0, 0, 0] = torch.inf
    got = found(x, instruction_set)
    for name, one, other in zip(RESULTS, got, clean, strict=True):
        axis = {"state": 1, "gradient of state": 1, "gradient of bonus": 0}.get(name, 2)
        rest = [part.narrow(axis, 1, 2) for part in (one, other)]
        assert torch.equal(*rest), name


@every_set
@pytest.mark.parametrize("log_decay", [0.0, -1e-8, -0.6, -0.69, -0.7, -20.0, -1e4, -torch.inf])
@pytest.mark.parametrize("everywhere", [True, False])
def test_any_decay(instruction_set, log_decay, everywhere):
    """From nothing that is forgotten to everything, beyond what the model can produce."""
    x = draw(0, 1, CHUNK + 1, 1, 16, dtype=torch.float32)
    which = torch.ones(16, dtype=torch.bool) if everywhere else torch.arange(16) % 3 == 0
    x = x._replace(log_decay=x.log_decay.masked_fill(which, log_decay))
    got, want = found(x, instruction_set), wanted(x)
    if log_decay == -torch.inf:  # Autograd multiplies a gradient of zero by it.
        got[3], want[3] = got[3][..., ~which], want[3][..., ~which]
    assert all(part.isfinite().all() for part in got)
    pairs = zip(RESULTS, got, want, strict=True)
    errors = {name: relative_error(a, b) for name, a, b in pairs if b.any()}
    assert max(errors.values()) < 2e-6, errors


@every_set
def test_slow_decays_do_not_add_up_errors(instruction_set):
    """Rounding every w to float32 would add an error of up to 3e-8 of the state at every token."""
    time = 8000
    x = draw(0, 1, time, 1, 8, dtype=torch.float32, decays=(-8.5, -8.5))
    x = x._replace(value=x.value.abs(), key=x.key.abs())
    out, state, _ = wkv6_native.forward(x, instruction_set)
    exact = wkv6_reference.wkv6(Wkv6Inputs(*(part.double() for part in x[:6])))
    assert relative_error(state, exact[1]) < 3e-6  # 5e-5 with a rounded w
    assert relative_error(out, exact[0]) < 3e-6


@every_set
@pytest.mark.parametrize("cut", [1, CHUNK - 1, CHUNK, CHUNK + 7])
def test_a_cut_changes_no_bit(instruction_set, cut):
    x = draw(0, 2, CHUNK + 9, 2, 24, dtype=torch.float32)
    out, state, _ = wkv6_native.forward(x, instruction_set)
    left = Wkv6Inputs(*(part[:, :cut] for part in x[:4]), x.bonus, x.state)
    first, between, _ = wkv6_native.forward(left, instruction_set)
    right = Wkv6Inputs(*(part[:, cut:] for part in x[:4]), x.bonus, between)
    second, after, _ = wkv6_native.forward(right, instruction_set)
    assert torch.equal(torch.cat([first, second], 1), out)
    assert torch.equal(after, state)


def test_threads_and_company_change_no_bit(monkeypatch):
    monkeypatch.setattr(wkv6_native, "_SERIAL_NUMBERS", 0)
    x = draw(0, 3, CHUNK + 9, 3, 32, dtype=torch.float32, masks=True)
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(wkv6_native, "usable_threads", lambda threads=threads: threads)
        results.append(found(x))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    alone = {n: part[1:2] for n, part in x._asdict().items() if n != "bonus"}
    alone = x._replace(**alone)
    out, state, _ = wkv6_native.forward(alone)
    assert torch.equal(out[0], results[0][0][1])
    assert torch.equal(state[0], results[0][1][1])


def test_instruction_sets_that_fuse_multiply_and_add_agree():
    sets = [name for name in native.instruction_sets() if name != "portable"]
    if len(sets) < 2:
        pytest.skip(f"this processor has one of them: {sets}")
    x = draw(0, 2, CHUNK + 9, 2, 64, dtype=torch.float32)
    first, *others = [found(x, name) for name in sets]
    for other in others:
        for name, a, b in zip(RESULTS, first, other, strict=True):
            assert relative_error(a, b) < 1e-6, name


def test_the_public_operator_takes_it_first():
    x = draw(0, 2, 40, 2, 8, dtype=torch.float32, masks=True)
    leaves = [part.clone().requires_grad_() for part in x[:6]]
    masks = {"resets": x.resets, "lengths": x.lengths}
    out, state = wkv6(*leaves, **masks)
    grads = torch.autograd.grad((out, state), leaves, weights(x))
    for a, b in zip((out, state, *grads), found(x), strict=True):
        assert torch.equal(a, b)


def test_no_tokens():
    x = draw(0, 2, 0, 2, 8)
    got = found(x)
    assert got[0].shape == (2, 0, 2, 8)
    assert torch.equal(got[1], x.state)
    assert torch.equal(got[-1], weights(x)[1])


@pytest.mark.parametrize(("name", "wanted"), [("wkv6_forward", 11), ("wkv6_backward", 16)])
def test_the_kernels_refuse_another_number_of_addresses(name, wanted):
    for count in (0, wanted - 1, wanted + 1):
        with pytest.raises(ValueError, match=f"takes {wanted} addresses and was given {count}"):
            getattr(native.library(), name)(1, 1, 1, 1, 0, 1, "", [0] * count)


def test_the_chunk_is_that_of_the_kernels():
    assert native.library().WKV6_CHUNK == CHUNK
