"""Effective attention: the recurrence is rebuilt from it, and sources are where they should be."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_model

from receptance.analysis import attention, record
from receptance.ops import (
    WKVState,
    wkv4,
    wkv4_sources,
    wkv6,
    wkv6_sources,
    wkv7,
    wkv7_sources,
)

TOKENS = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=[4, 5.2, 6, 7])
def model(request):
    extras = {} if request.param == 4 else {"head_size": 8}
    return make_model(layers=3, version=request.param, **extras).requires_grad_(False)


@given(
    time=st.integers(1, 40),
    scale=st.sampled_from([0.1, 3.0, 60.0]),
    carried=st.booleans(),
    reset=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_wkv_is_rebuilt_from_its_sources(time, scale, carried, reset, seed):
    g = torch.Generator().manual_seed(seed)
    log_decay = -torch.exp(torch.randn(8, generator=g) * 3)
    bonus = torch.randn(8, generator=g) * scale
    key, value = torch.randn(2, 3, time, 8, generator=g)
    key *= scale
    state = WKVState.empty(3, 8)
    if carried:
        before = torch.randn(2, 3, 7, 8, generator=g)
        _, state = wkv4(log_decay, bonus, before[0] * scale, before[1])
    resets = torch.rand(3, time, generator=g) < 0.2 if reset else None
    wanted, _ = wkv4(log_decay, bonus, key, value, state, resets=resets)
    found = wkv4_sources(
        log_decay, bonus, key, value, state, positions=torch.arange(time), resets=resets
    )
    torch.testing.assert_close(found.outputs(), wanted, atol=1e-5, rtol=1e-5)
    total = found.weights.sum(2) + found.carried_weight
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-5, rtol=0)
    assert not bool(found.weights.permute(0, 3, 1, 2).triu(1).any())
    assert carried or not bool(found.carried_weight.any())


@given(time=st.integers(1, 40), reset=st.booleans(), seed=st.integers(0, 1000))
def test_wkv7_is_rebuilt_from_its_sources(time, reset, seed):
    g = torch.Generator().manual_seed(seed)
    r, k, v, kappa, rate = torch.randn(5, 2, time, 3, 4, generator=g)
    log_decay = -0.6 * torch.rand(2, time, 3, 4, generator=g)
    kappa = torch.nn.functional.normalize(kappa, dim=-1)
    inputs = r, log_decay, k, v, -kappa, kappa * rate.sigmoid()
    state = torch.randn(2, 3, 4, 4, generator=g)
    resets = torch.rand(2, time, generator=g) < 0.2 if reset else None
    wanted, _ = wkv7(*inputs, state, resets=resets)
    found = wkv7_sources(inputs, state, positions=torch.arange(time), resets=resets)
    torch.testing.assert_close(found.outputs(), wanted.flatten(2), atol=2e-5, rtol=1e-5)
    assert not bool(found.weights.permute(0, 3, 1, 2).triu(1).any())


@given(time=st.integers(1, 40), reset=st.booleans(), seed=st.integers(0, 1000))
def test_wkv6_is_rebuilt_from_its_sources(time, reset, seed):
    g = torch.Generator().manual_seed(seed)
    r, k, v, decay = torch.randn(4, 2, time, 3, 4, generator=g)
    inputs, bonus = (r, -decay.exp(), k, v), torch.randn(3, 4, generator=g)
    state = torch.randn(2, 3, 4, 4, generator=g)
    resets = torch.rand(2, time, generator=g) < 0.2 if reset else None
    wanted, _ = wkv6(*inputs, bonus, state, resets=resets)
    positions = torch.arange(time)
    found = wkv6_sources(inputs, bonus, state, positions=positions, resets=resets)
    torch.testing.assert_close(found.outputs(), wanted.flatten(2), atol=2e-5, rtol=1e-5)
    assert not bool(found.weights.permute(0, 3, 1, 2).triu(1).any())


def test_a_decay_of_nothing_and_of_everything():
    key, value = torch.zeros(1, 4, 2), torch.arange(8.0).view(1, 4, 2)
    decay, bonus = torch.tensor([0.0, -torch.inf]), torch.zeros(2)
    state = WKVState.empty(1, 2)
    found = wkv4_sources(decay, bonus, key, value, state, positions=torch.arange(4))
    torch.testing.assert_close(found.weights[0, 3, :, 0], torch.full((4,), 0.25))
    torch.testing.assert_close(found.weights[0, 3, :, 1], torch.tensor([0, 0, 0.5, 0.5]))
    torch.testing.assert_close(found.outputs(), wkv4(decay, bonus, key, value, state)[0])


@pytest.mark.parametrize("cut", [0, 9])
def test_every_layer_of_a_model_is_rebuilt(model, cut):
    state = model(TOKENS[:, :cut])[1] if cut else None
    found = attention(model, TOKENS[:, cut:], state)
    with record(model, "blocks.*.att.wkv") as cache:
        model(TOKENS[:, cut:], state)
    for layer in range(3):
        assert torch.equal(found.wkv(layer), cache[f"blocks.{layer}.att.wkv"].flatten(2))
        rebuilt = found.sources(layer).outputs()
        torch.testing.assert_close(rebuilt, found.wkv(layer), atol=1e-5, rtol=1e-5)


def test_a_carried_state_stands_for_the_tokens_that_it_read(model):
    """The shares of the tokens before the cut are, together, that of the state."""
    whole = attention(model, TOKENS)
    _, state = model(TOKENS[:, :9])
    rest = attention(model, TOKENS[:, 9:], state)
    for layer in range(3):
        one, two = whole.sources(layer), rest.sources(layer)
        torch.testing.assert_close(one.weights[:, 9:, 9:], two.weights, atol=1e-5, rtol=1e-4)
        values = one.values[:, :9].unflatten(-1, (one.weights.shape[-1], -1))
        before = torch.einsum("bptg,btgn->bpgn", one.weights[:, 9:, :9], values).flatten(2)
        torch.testing.assert_close(before, two.carried, atol=1e-5, rtol=1e-4)
        if two.carried_weight is not None:
            weight = one.weights[:, 9:, :9].sum(2)
            torch.testing.assert_close(weight, two.carried_weight, atol=1e-5, rtol=1e-4)


def test_positions_are_rows_of_the_whole(model):
    found = attention(model, TOKENS)
    whole = found.sources(1)
    some = found.sources(1, torch.tensor([3, 17]))
    torch.testing.assert_close(some.weights, whole.weights[:, [3, 17]])
    torch.testing.assert_close(some.outputs(), whole.outputs()[:, [3, 17]])


def test_shares_and_distances(model, monkeypatch):
    found = attention(model, TOKENS)
    shares, distances = found.shares(1), found.distances(1)
    weights = found.sources(1).weights
    assert shares.shape == (2, 20, 21) and distances.shape == (2, 20, weights.shape[-1])
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 20))
    assert not bool(shares[:, :, 0].any())
    ago = (torch.arange(20)[:, None] - torch.arange(20)).clamp(min=0)
    wanted = (weights.abs() * ago[..., None]).sum(2) / weights.abs().sum(2)
    torch.testing.assert_close(distances, wanted)
    torch.testing.assert_close(found.memory(1), wanted.mean((0, 1)))
    monkeypatch.setattr("receptance.analysis.effective._AT_ONCE", 2000)  # 3 positions at a time
    torch.testing.assert_close(found.shares(1), shares)
    torch.testing.assert_close(found.distances(1), distances)


def test_memory_is_the_decays_where_keys_are_equal():
    """With equal keys and no bonus the weights fall geometrically from token to token."""
    model = make_model(layers=3).requires_grad_(False)
    att = model.blocks[1].att
    att.key.weight.zero_()
    decay = torch.linspace(0.1, 0.8, 16)
    att.time_decay.copy_((-decay.log()).log())
    att.time_first.copy_(-1e4)
    tokens = torch.randint(256, (1, 200), generator=torch.Generator().manual_seed(0))
    last = attention(model, tokens).distances(1)[0, -1]
    torch.testing.assert_close(last, 1 / (1 - decay), atol=1e-3, rtol=1e-3)


def test_it_can_be_taken_inside_other_contexts(model):
    with record(model, "blocks.*.att.wkv", "head") as cache:
        found = attention(model, TOKENS)
    assert torch.equal(found.wkv(2), cache["blocks.2.att.wkv"].flatten(2))
    assert "blocks" in repr(cache) and "<table>" in cache._repr_html_()
    assert repr(found) == "Attention of 3 layers over 2 x 20 tokens, width 16"
    assert found._repr_html_().count("data:image/png;base64,") == 3


def test_not_token_by_token(model):
    with record(model, "blocks.1.state.*"), pytest.raises(ValueError, match="token by token"):
        attention(model, TOKENS)


def test_no_text(model):
    with pytest.raises(ValueError, match="no token in this text"):
        attention(model, TOKENS[:, :0])
