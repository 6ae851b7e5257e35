"""The law: cutting a sequence anywhere, batching it, padding it, packing it changes nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import (
    assert_same_state,
    deep_model,
    meaning,
    randomize,
    relative_error,
    token_ids,
)
from torch import Tensor

from receptance.config import ModelConfig
from receptance.model import Model
from receptance.model.versions import architecture
from receptance.ops import available_backends
from receptance.state import State

BOUNDS = {torch.float32: 1e-4, torch.float64: 1e-9}
VERSIONS = (4, 5.2, 6, 7)
exact_dtypes = pytest.mark.parametrize("dtype", BOUNDS)
every_version = pytest.mark.parametrize("version", VERSIONS)


def backends(*without: str) -> pytest.MarkDecorator:
    """Every version with each backend of its recurrence."""
    found = [
        (version, name)
        for version in VERSIONS
        for name in available_backends("cpu", architecture(version).operator)
        if name not in without
    ]
    return pytest.mark.parametrize(("version", "backend"), found)


lengths_of_rows = st.lists(st.integers(0, 40), min_size=1, max_size=5)
fractions = st.lists(st.floats(0, 1), max_size=4)


def run_in_pieces(
    model: Model, tokens: Tensor, cuts: list[int], state: State | None = None, **masks
) -> tuple[Tensor, State]:
    """The model called on one piece after another, with the masks cut as well."""
    resets, lengths = masks.get("resets"), masks.get("lengths")
    outputs = []
    for start, stop in zip([0, *cuts], [*cuts, tokens.shape[1]], strict=True):
        logits, state = model(
            tokens[:, start:stop],
            state,
            resets=None if resets is None else resets[:, start:stop],
            lengths=None if lengths is None else (lengths - start).clamp(0, stop - start),
        )
        outputs.append(logits)
    return torch.cat(outputs, dim=1), state


def cuts_of(parts: list[float], time: int) -> list[int]:
    return sorted(round(part * time) for part in parts)


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(got, want, rtol=BOUNDS[dtype], atol=BOUNDS[dtype])


def assert_same_parts(got: State, want: State, dtype: torch.dtype) -> None:
    """As assert_same_state, but the rows may have read different numbers of tokens."""
    assert_same_state(State(got.tensors, want.tokens), want, BOUNDS[dtype])


def pad(rows: list[Tensor], time: int) -> Tensor:
    """Rows side by side, with garbage behind each: [B,T]."""
    batch = token_ids(99, len(rows), time)
    for row, filled in zip(rows, batch, strict=True):
        filled[: len(row)] = row
    return batch


# ---- cutting ------------------------------------------------------------------------------------


@every_version
@exact_dtypes
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32), time=st.integers(0, 70), parts=fractions)
def test_cut_anywhere(dtype, version, seed, time, parts):
    model, tokens = deep_model(dtype, version), token_ids(seed, 2, time)
    whole, state = model(tokens)
    pieces, state_of_pieces = run_in_pieces(model, tokens, cuts_of(parts, time))
    assert_close(pieces, whole, dtype)
    assert_same_state(state_of_pieces, state, BOUNDS[dtype])


@exact_dtypes
@backends()
def test_one_token_at_a_time(dtype, version, backend):
    model, tokens = deep_model(dtype, version), token_ids(1, 2, 70)
    whole, state = model(tokens)
    try:
        model.backend = backend
        steps, state_of_steps = run_in_pieces(model, tokens, list(range(1, 70)))
    finally:
        model.backend = None
    assert_close(steps, whole, dtype)
    assert_same_state(state_of_steps, state, BOUNDS[dtype])


# ---- batching and padding -----------------------------------------------------------------------


@every_version
@exact_dtypes
@settings(max_examples=10)
@given(lengths=lengths_of_rows, extra=st.integers(0, 5))
def test_any_batch_equals_its_rows_alone(dtype, version, lengths, extra):
    model = deep_model(dtype, version)
    rows = [token_ids(i, length) for i, length in enumerate(lengths)]
    logits, state = model(pad(rows, max(lengths) + extra), lengths=torch.tensor(lengths))
    assert state.tokens.tolist() == lengths
    for b, row in enumerate(rows):
        alone, alone_state = model(row[None])
        assert_close(logits[b, : len(row)], alone[0], dtype)
        assert_same_state(state.rows(b), alone_state, BOUNDS[dtype])


@every_version
def test_what_stands_in_the_padding_has_no_effect(version):
    model, lengths = deep_model(version=version), torch.tensor([0, 7, 20])
    tokens = token_ids(0, 3, 20)
    beyond = torch.arange(20) >= lengths[:, None]
    logits, state = model(tokens, lengths=lengths)
    other, other_state = model(torch.where(beyond, 5, tokens), lengths=lengths)
    assert torch.equal(other[~beyond], logits[~beyond])
    for name, tensor in state.tensors.items():
        assert torch.equal(other_state.tensors[name], tensor), name


@every_version
@exact_dtypes
def test_a_batch_of_states_continues_as_its_rows_do(dtype, version):
    model = deep_model(dtype, version)
    states = [model(token_ids(i, 1, 5 + 7 * i))[1] for i in range(3)]
    following = token_ids(9, 3, 6)
    logits, state = model(following, State.cat(states))
    for b in range(3):
        alone, alone_state = model(following[b : b + 1], states[b])
        assert_close(logits[b], alone[0], dtype)
        assert_same_state(state.rows(b), alone_state, BOUNDS[dtype])
    swapped, _ = model(following[[2, 0]], State.cat(states).rows([2, 0]))
    assert_close(swapped, logits[[2, 0]], dtype)


# ---- packing ------------------------------------------------------------------------------------


@every_version
@exact_dtypes
@settings(max_examples=10)
@given(lengths=st.lists(st.integers(1, 25), min_size=1, max_size=5), dirty=st.booleans())
def test_packed_documents_equal_each_alone(dtype, version, lengths, dirty):
    model = deep_model(dtype, version)
    documents = [token_ids(i, length) for i, length in enumerate(lengths)]
    before = model(token_ids(50, 1, 9))[1] if dirty else None
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    resets = torch.zeros(1, sum(lengths), dtype=torch.bool)
    resets[0, starts] = True
    logits, state = model(torch.cat(documents)[None], before, resets=resets)
    for start, document in zip(starts, documents, strict=True):
        alone, alone_state = model(document[None])
        assert_close(logits[0, start : start + len(document)], alone[0], dtype)
    assert int(state.tokens) == sum(lengths) + 9 * dirty
    assert_same_parts(state, alone_state, dtype)


# ---- everything together ------------------------------------------------------------------------


@exact_dtypes
@backends("reference")
@settings(max_examples=8)
@given(
    packs=st.lists(st.lists(st.integers(1, 20), max_size=3), min_size=1, max_size=4),
    parts=fractions,
    extra=st.integers(0, 3),
)
def test_documents_packed_batched_padded_and_cut(dtype, version, backend, packs, parts, extra):
    model = deep_model(dtype, version)
    documents = [[token_ids(7 * b + i, n) for i, n in enumerate(p)] for b, p in enumerate(packs)]
    lengths = torch.tensor([sum(pack) for pack in packs])
    time = int(lengths.max()) + extra
    tokens = pad([torch.cat([torch.empty(0).long(), *row]) for row in documents], time)
    resets = torch.zeros(len(packs), time, dtype=torch.bool)
    for row, pack in zip(resets, packs, strict=True):
        row[[sum(pack[:i]) for i in range(len(pack))]] = True
    try:
        model.backend = backend
        logits, state = run_in_pieces(
            model, tokens, cuts_of(parts, time), resets=resets, lengths=lengths
        )
    finally:
        model.backend = None
    assert torch.equal(state.tokens, lengths)
    for b, row in enumerate(documents):
        start = 0
        for document in row:
            alone, last = model(document[None])
            assert_close(logits[b, start : start + len(document)], alone[0], dtype)
            start += len(document)
        assert_same_parts(state.rows(b), last if row else model.empty_state(), dtype)


@every_version
def test_in_bfloat16_the_law_holds_as_far_as_bfloat16_does(version):
    """Matrix products of few and of many rows sum in another order, and where a sum lies near the
    middle between two bfloat16 numbers, it rounds to the other. Over 12 layers this adds up, but
    to less than what the type itself costs.
    """
    model, tokens = deep_model(torch.bfloat16, version), token_ids(0, 3, 50)
    exact, exact_state = deep_model(torch.float64, version)(tokens)
    whole, state = model(tokens)
    cost = relative_error(whole, exact)
    assert cost < 0.05
    frame = exact_state.tensors.get("exponent")
    state_cost = {
        name: relative_error(part, meaning(exact_state)[name])
        for name, part in meaning(state, frame).items()
    }
    for cuts in ([25], [3, 9, 49], list(range(1, 50))):
        pieces, state_of_pieces = run_in_pieces(model, tokens, cuts)
        assert relative_error(pieces, whole) <= cost
        for name, part in meaning(state_of_pieces, frame).items():
            assert relative_error(part, meaning(state, frame)[name]) <= state_cost[name], name
    rows, _ = zip(*(model(tokens[b : b + 1]) for b in range(3)), strict=True)
    assert relative_error(torch.cat(rows), whole) <= cost


# ---- a state is a value -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("time", [1, 9])
@every_version
def test_a_state_can_be_continued_twice_and_forked(dtype, version, time):
    model = deep_model(dtype, version)
    _, state = model(token_ids(0, 2, 11))
    before = {name: tensor.clone() for name, tensor in state.tensors.items()}
    first, after_first = model(token_ids(1, 2, time), state)
    model(token_ids(2, 2, time), state)
    again, after_again = model(token_ids(1, 2, time), state)
    assert torch.equal(first, again)
    for name in before:
        assert torch.equal(state.tensors[name], before[name]), name
        assert torch.equal(after_first.tensors[name], after_again.tensors[name]), name
    assert state.tokens.tolist() == [11, 11]


@every_version
def test_no_weight_is_changed_by_use(version):
    model = deep_model(version=version)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(token_ids(0, 2, 9))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# ---- gradients obey the law as well -------------------------------------------------------------


def training_model(version: int) -> Model:
    config = ModelConfig(version=version, vocab_size=23, width=12, num_layers=3)
    return randomize(Model(config).double())


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), reduction="sum"
    )


def gradients(model: Model, loss: Tensor) -> list[Tensor]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(loss, trained))


@every_version
def test_gradients_flow_through_a_cut(version):
    model, tokens = training_model(version), token_ids(0, 2, 45, vocab_size=23)
    targets = token_ids(1, 2, 45, vocab_size=23)
    whole = gradients(model, summed_loss(model(tokens)[0], targets))
    pieces = run_in_pieces(model, tokens, [1, 20, 33])[0]
    torch.testing.assert_close(gradients(model, summed_loss(pieces, targets)), whole)
    _, state = model(tokens[:, :20])
    cut_off, _ = model(tokens[:, 20:], state.detach())
    detached = gradients(model, summed_loss(cut_off, targets[:, 20:]))
    assert not torch.allclose(detached[0], whole[0])


@every_version
def test_gradients_of_packed_and_padded_documents_are_those_of_each_alone(version):
    model, lengths = training_model(version), [1, 9, 30, 4]
    documents = [token_ids(i, n, vocab_size=23) for i, n in enumerate(lengths)]
    targets = [token_ids(10 + i, n, vocab_size=23) for i, n in enumerate(lengths)]
    alone = [
        gradients(model, summed_loss(model(x[None])[0], y))
        for x, y in zip(documents, targets, strict=True)
    ]
    wanted = [sum(parts) for parts in zip(*alone, strict=True)]

    resets = torch.zeros(1, sum(lengths), dtype=torch.bool)
    resets[0, [sum(lengths[:i]) for i in range(len(lengths))]] = True
    packed, _ = model(torch.cat(documents)[None], resets=resets)
    torch.testing.assert_close(gradients(model, summed_loss(packed, torch.cat(targets))), wanted)

    padded = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True, padding_value=3)
    logits, _ = model(padded, lengths=torch.tensor(lengths))
    real = torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None]
    torch.testing.assert_close(
        gradients(model, summed_loss(logits[real], torch.cat(targets))), wanted
    )
