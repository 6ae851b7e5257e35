"""Micro-batches, chunks and recomputation against one pass over everything, in float64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_model, same_bits
from torch import Tensor
from training_cases import random_batch

from receptance.adapters import (
    Adapter,
    LoRAOptions,
    StateTuning,
    StateTuningOptions,
    make_adapter,
)
from receptance.data.batches import Batch
from receptance.model import Model
from receptance.state import State
from receptance.training import TrainOptions
from receptance.training.objective import Objective
from receptance.training.passes import Passes
from receptance.training.ranks import Ranks

PENALTIES = {"max_logit_penalty": 1e-2, "z_loss": 1e-2}


def exact_model(**options) -> Model:
    return make_model(**options).double().train()


def first_state(model: Model, adapter: Adapter | None, rows: int) -> State:
    dtype = model.emb.weight.dtype
    learned = None if adapter is None else adapter.initial_state(rows, dtype)
    return learned or model.empty_state(rows, dtype=dtype)


def trained(model: Model, adapter: Adapter | None) -> dict[str, Tensor]:
    return dict(model.named_parameters()) if adapter is None else dict(adapter.tensors())


def passes(model: Model, batch: Batch, adapter: Adapter | None = None, **options) -> Passes:
    options = TrainOptions(
        batch=len(batch.inputs), context=batch.inputs.shape[1], **PENALTIES | options
    )
    model.dropout, model.recompute = options.dropout, options.recompute
    objective = Objective(model, options)
    objective.dtype = model.emb.weight.dtype
    return Passes(
        objective,
        lambda rows: first_state(model, adapter, rows).tensors,
        options,
        Ranks(),
        random=options.dropout > 0,
    )


def found(
    model: Model, batch: Batch, adapter: Adapter | None = None, step: int = 0, **options
) -> tuple[float, dict[str, Tensor]]:
    """Cross entropy and gradients as training has them."""
    parameters = trained(model, adapter)
    for parameter in parameters.values():
        parameter.grad = None
    total = float(max(1, batch.learned))
    entropy = passes(model, batch, adapter, **options).run(batch, total, step)
    return entropy, {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}


def plain(
    model: Model, batch: Batch, adapter: Adapter | None = None, cut: int = 0
) -> tuple[float, dict[str, Tensor]]:
    """The same by one call and all logits; with a cut, the state is detached every so often."""
    parameters = trained(model, adapter)
    size = cut or batch.inputs.shape[1]
    state = first_state(model, adapter, len(batch.inputs))
    value = entropies = torch.zeros((), dtype=torch.float64)
    for at in range(0, batch.inputs.shape[1], size):
        piece = batch.part(time=slice(at, at + size))
        logits, state = model(piece.inputs, state, resets=piece.resets)
        entropy = F.cross_entropy(logits.flatten(0, 1), piece.targets.flatten(), reduction="none")
        penalty = PENALTIES["max_logit_penalty"] / 2 * logits.max(-1).values.square()
        penalty = penalty + PENALTIES["z_loss"] * logits.logsumexp(-1).square()
        counts = torch.ones_like(entropy) if piece.mask is None else piece.mask.flatten()
        value = value + ((entropy + penalty.flatten()) * counts).sum()
        entropies = entropies + (entropy * counts).sum()
        state = State({name: x.detach() for name, x in state.tensors.items()}, state.tokens)
    total = max(1, batch.learned)
    gradients = torch.autograd.grad(value / total, list(parameters.values()))
    return float(entropies.detach()) / total, dict(zip(parameters, gradients, strict=True))


def close(one: tuple[float, dict], other: tuple[float, dict]) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-12)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(
            gradient, other[1][name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


class TestTheGradient:
    """What crosses the chunks' borders is all there is: cut as you like, nothing changes."""

    @settings(max_examples=25)
    @given(
        chunk=st.integers(0, 15),
        micro_batch=st.integers(0, 4),
        masked=st.booleans(),
        reset=st.booleans(),
        recompute=st.booleans(),
    )
    def test_it_is_that_of_one_long_sequence(self, masked, reset, **options):
        model, batch = exact_model(), random_batch(masked=masked, reset=reset)
        close(found(model, batch, **options), plain(model, batch))

    @pytest.mark.parametrize("chunk", [1, 5, 13])
    @pytest.mark.parametrize("kind", [LoRAOptions(rank=3), StateTuningOptions(start_key=-1.0)])
    def test_of_an_adapter(self, kind, chunk):
        """A learned first state gets its gradient through all chunks; the model has none."""
        model, batch = exact_model(), random_batch(masked=True)
        adapter = make_adapter(model, kind).double()
        disturb(adapter)
        with adapter.attach(model):
            wanted = plain(model, batch, adapter)
            close(found(model, batch, adapter, chunk=chunk, micro_batch=2), wanted)
        assert all(float(x.abs().max()) > 0 for x in wanted[1].values())
        assert all(p.grad is None for p in model.parameters())

    @pytest.mark.parametrize("targets", ["blocks.1.ffn.*", "blocks.0.att.output"])
    def test_of_an_adapter_that_states_know_little_of(self, targets):
        """No gradient comes from the tensors of the state that its first matrix has no part in."""
        model, batch = exact_model(), random_batch()
        adapter = make_adapter(model, LoRAOptions(rank=2, targets=(targets,))).double()
        disturb(adapter)
        with adapter.attach(model):
            close(found(model, batch, adapter, chunk=4), plain(model, batch, adapter))

    def test_of_state_tuning_ends_at_the_first_reset(self):
        model, batch = exact_model(), random_batch(reset=True)
        batch.resets[:, 0] = True
        adapter = StateTuning(model, StateTuningOptions()).double()
        with adapter.attach(model):
            _, gradients = found(model, batch, adapter, chunk=4)
        assert all((x == 0).all() for x in gradients.values())

    def test_they_add_up_to_what_is_there(self):
        model, batch = exact_model(), random_batch()
        _, once = found(model, batch)
        passes(model, batch, chunk=5, micro_batch=2).run(batch, float(batch.learned), 0)
        close(
            (0.0, {n: p.grad for n, p in model.named_parameters()}),
            (0.0, {n: 2 * x for n, x in once.items()}),
        )


def disturb(adapter: Adapter) -> None:
    """Random everywhere: LoRA's B begins at zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator).double()


class TestTheStateAlone:
    @settings(max_examples=20)
    @given(chunk=st.integers(1, 14), micro_batch=st.integers(0, 3), reset=st.booleans())
    def test_it_is_truncated_backpropagation(self, chunk, micro_batch, reset):
        model, batch = exact_model(), random_batch(masked=True, reset=reset)
        options = {"chunk": chunk, "micro_batch": micro_batch, "carry": "state"}
        close(found(model, batch, **options), plain(model, batch, cut=chunk))

    def test_that_is_not_the_same_thing(self):
        model, batch = exact_model(), random_batch()
        whole, cut = (found(model, batch, chunk=4, carry=c) for c in ("gradient", "state"))
        assert whole[0] == pytest.approx(cut[0], rel=1e-12)
        name = "blocks.0.att.time_decay"
        assert not torch.allclose(whole[1][name], cut[1][name])

    def test_a_learned_first_state_hears_of_the_first_chunk(self):
        model, batch = exact_model(), random_batch()
        adapter = StateTuning(model, StateTuningOptions(start_key=-1.0)).double()
        with adapter.attach(model):
            wanted = plain(model, batch, adapter, cut=5)
            close(found(model, batch, adapter, chunk=5, carry="state", micro_batch=2), wanted)


class TestDropout:
    OPTIONS = (
        {},
        {"micro_batch": 2},
        {"chunk": 5},
        {"chunk": 5, "micro_batch": 2, "carry": "state"},
    )

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_recomputing_changes_no_bit(self, options, dtype):
        model, batch = exact_model().to(dtype), random_batch()
        keep, again = (
            found(model, batch, dropout=0.3, recompute=recompute, **options)
            for recompute in (False, True)
        )
        assert keep[0] == again[0]
        assert same_bits(keep[1], again[1])

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_it_is_a_function_of_seed_and_step(self, options):
        model, batch = exact_model(), random_batch()

        def drop(step: int, seed: int) -> float:
            how = {"step": step, "seed": seed, "dropout": 0.3} | options
            with torch.random.fork_rng():
                torch.manual_seed(step + seed)
                before = torch.get_rng_state()
                entropy, gradients = found(model, batch, **how)
                assert torch.equal(torch.get_rng_state(), before)
            assert all(torch.isfinite(x).all() for x in gradients.values())
            return entropy

        draws = [drop(step, seed) for step, seed in ((0, 0), (1, 0), (0, 1))]
        assert len(set(draws)) == 3
        assert [drop(step, seed) for step, seed in ((0, 0), (1, 0), (0, 1))] == draws

    def test_equal_rows_and_chunks_are_dropped_differently(self):
        row = torch.full((1, 12), 65)
        states = states_of(passes(exact_model(), Batch(row, row), dropout=0.3, chunk=3), row)
        assert len({float(x.sum()) for x in states}) == len(states) // 2 + 1

    def test_both_readings_of_a_chunk_drop_the_same(self):
        """Otherwise the gradient would be that of another function than the loss."""
        tokens = random_batch(1, 12).inputs
        made = passes(exact_model(), Batch(tokens, tokens), dropout=0.3, chunk=3)
        first, second, third, *back = states_of(made, tokens)
        assert [float(x.sum()) for x in back[1:]] == [
            float(x.sum()) for x in (third, second, first)
        ]


def states_of(made: Passes, tokens: Tensor) -> list[Tensor]:
    """The numerators behind every call of the objective: forward, then from the last one back."""
    inner: Callable = made.objective
    states = []

    def listen(*arguments):
        value, entropy, after = inner(*arguments)
        states.append(after["numerator"].detach().clone())
        return value, entropy, after

    made.objective = listen  # type: ignore[assignment]
    made.run(Batch(tokens, tokens), 1.0, 0)
    return states


def test_no_more_than_a_chunk_is_kept_for_the_gradient():
    """What autograd holds at one time, for a sequence of twice the length, is the same."""

    def held(time: int) -> int:
        most = now = 0

        def pack(x: Tensor) -> Tensor:
            nonlocal most, now
            now += x.numel()
            most = max(most, now)
            return x

        batch, model = random_batch(1, time), exact_model()
        made = passes(model, batch, chunk=8)
        inner = made.objective

        def fresh(*arguments):
            nonlocal now
            now = 0  # the graph of the chunk before is gone
            return inner(*arguments)

        made.objective = fresh  # type: ignore[assignment]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            made.run(batch, 1.0, 0)
        return most

    assert held(32) == held(64)


@pytest.mark.parametrize("carry", ["gradient", "state"])
def test_the_reading_is_bounded_by_micro_batch_and_chunk(carry):
    """Shapes of what goes into the objective."""
    batch = random_batch(5, 13)
    made = passes(exact_model(), batch, chunk=4, micro_batch=2, carry=carry)
    inner, shapes = made.objective, []

    def look(part, *rest):
        shapes.append(tuple(part.inputs.shape))
        return inner(part, *rest)

    made.objective = look  # type: ignore[assignment]
    made.run(batch, 1.0, 0)
    assert set(shapes) == {(2, 4), (2, 1), (1, 4), (1, 1)}
    assert len(shapes) == 3 * (4 + (3 if carry == "gradient" else 0))
