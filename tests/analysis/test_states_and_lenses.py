"""Surgery on states, lenses, attribution and statistics, each against what defines it."""

import pytest
import torch
from tiny import make_model

from receptance.analysis import (
    ablate,
    activations,
    attribution,
    interpolate,
    logit_lens,
    parts,
    patch,
    record,
    state_lens,
    transplant,
)

TOKENS = torch.randint(256, (2, 14), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=[4, 6, 7])
def model(request):
    extras = {} if request.param == 4 else {"head_size": 8}
    return make_model(layers=3, version=request.param, **extras).requires_grad_(False)


@pytest.fixture(scope="module")
def states(model):
    return model(TOKENS)[1], model(TOKENS.flip(1))[1]


def same(one, other) -> bool:
    return all(torch.equal(one.tensors[n], other.tensors[n]) for n in one.tensors)


# ---- surgery -------------------------------------------------------------------------------------


def test_everything_transplanted_is_the_donor(model, states):
    one, other = states
    kept = {n: x.clone() for n, x in one.tensors.items()}
    assert same(transplant(model, one, other), other)
    assert same(transplant(model, one, other, layers=[], parts=None), one)
    assert same(transplant(model, one, other, parts=[]), one)
    assert all(torch.equal(one.tensors[n], x) for n, x in kept.items())


def test_layers_and_parts_add_up(model, states):
    one, other = states
    swapped = one
    for layer in (0, -2, 2):
        for part in parts(model):
            assert not same(swapped, other)
            swapped = transplant(model, swapped, other, layers=[layer], parts=[part])
    assert same(swapped, other)
    only = transplant(model, one, other, layers=[1])
    for name, tensor in only.tensors.items():
        assert torch.equal(tensor[1], other.tensors[name][1])
        assert torch.equal(tensor[[0, 2]], one.tensors[name][[0, 2]])


def test_what_is_ablated_was_never_read(model, states):
    empty = model.empty_state(2)
    assert same(ablate(model, states[0]), empty)
    wanted, _ = model(TOKENS[:, :1])
    torch.testing.assert_close(model(TOKENS[:, :1], ablate(model, states[0]))[0], wanted)


def test_interpolation_is_linear_in_what_was_summed(model, states):
    one, other = states
    ends = [interpolate(model, one, other, share) for share in (0.0, 1.0)]
    for end, state in zip(ends, states, strict=True):
        torch.testing.assert_close(model(TOKENS, end)[0], model(TOKENS, state)[0])

    def sums(state):
        if "exponent" not in state.tensors:
            names = {"value_by_key", "key_by_value"} & state.tensors.keys()
            return [state.tensors[name].double() for name in names]
        scale = (state.tensors["exponent"].double()).exp()
        return [state.tensors[n].double() * scale for n in ("numerator", "denominator")]

    for found, a, b in zip(
        sums(interpolate(model, one, other, 0.3)), sums(one), sums(other), strict=True
    ):
        torch.testing.assert_close(found, 0.7 * a + 0.3 * b, atol=1e-6, rtol=1e-5)
    half = interpolate(model, one, model.empty_state(2), 0.5)
    assert all(bool(x.isfinite().all()) for x in half.tensors.values())


def test_mistakes_in_surgery(model, states):
    one, other = states
    with pytest.raises(ValueError, match="no layer 3 in a model of 3 layers"):
        transplant(model, one, other, layers=[3])
    with pytest.raises(ValueError, match="no part 'heart'; it has time_shift, channel_shift, "):
        ablate(model, one, parts=["heart"])
    with pytest.raises(ValueError, match="a state is"):
        transplant(model, one, other.rows(0))
    field = next(reversed(one.tensors))  # a field that is only a part of a part in version 4
    assert same(ablate(model, one, parts=[field]), ablate(model, one, parts=field))


# ---- lenses --------------------------------------------------------------------------------------


def test_the_last_depth_of_the_lens_is_the_model(model, monkeypatch):
    logits = model(TOKENS)[0].log_softmax(-1)
    lens = logit_lens(model, TOKENS, top=3)
    assert lens.ids.shape == lens.log_probabilities.shape == (4, 2, 14, 3)
    torch.testing.assert_close(lens.log_probabilities[-1], logits.topk(3).values)
    assert torch.equal(lens.ids[-1], logits.topk(3).indices)
    wanted = logits[:, :-1].gather(2, TOKENS[:, 1:, None])[..., 0]
    torch.testing.assert_close(lens.next_log_probabilities[-1], wanted)
    first = model.head(model.ln_out(model.blocks[0].ln0(model.emb(TOKENS)))).log_softmax(-1)
    torch.testing.assert_close(lens.log_probabilities[0], first.topk(3).values)
    monkeypatch.setattr("receptance.analysis.lens._AT_ONCE", 2 * 256 * 5)
    again = logit_lens(model, TOKENS, top=3)
    torch.testing.assert_close(again.next_log_probabilities, lens.next_log_probabilities)
    assert lens._repr_html_().count("<tr>") == 5
    with pytest.raises(ValueError, match="top is 0; wanted 1 to 256"):
        logit_lens(model, TOKENS, top=0)
    assert logit_lens(model, TOKENS[:, :1]).next_log_probabilities.shape == (4, 2, 0)


def test_the_state_lens_is_what_is_lost_without_a_layer(model, states):
    found = state_lens(model, states[0], TOKENS[:, 0])
    assert found.shape == (3, 2, 256)
    whole = model(TOKENS[:, :1], states[0])[0][:, 0]
    for layer in range(3):
        without = model(TOKENS[:, :1], ablate(model, states[0], layers=[layer]))[0][:, 0]
        torch.testing.assert_close(found[layer], whole - without)
    assert not bool(state_lens(model, model.empty_state(2), TOKENS[:, 0]).any())


# ---- attribution and statistics ------------------------------------------------------------------


def test_attribution_is_what_is_lost_without_a_token(model, monkeypatch):
    tokens = TOKENS[0]
    found = attribution(model, tokens)
    assert found.shape == (14, 14) and not bool(found.tril(-1).any())
    whole = model(tokens[None])[0].log_softmax(-1)[0]
    targets = torch.cat([tokens[1:], whole[-1].argmax()[None]])
    with patch(model, "emb", model.emb.weight.mean(0), where=[5]):
        hidden = model(tokens[None])[0].log_softmax(-1)[0]
    wanted = (whole - hidden).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found[5], wanted, atol=1e-5, rtol=1e-4)
    monkeypatch.setattr("receptance.analysis.occlusion._POSITIONS", 40)
    monkeypatch.setattr("receptance.analysis.occlusion._LOGITS", 256 * 3)
    done = []
    torch.testing.assert_close(attribution(model, tokens, note=done.append), found)
    assert sum(done) == 14 and len(done) == 7
    with pytest.raises(ValueError, match=r"tokens are \[2, 14\]; wanted the ids of one text"):
        attribution(model, TOKENS)


def test_activations_are_counted_over_pieces(model, monkeypatch):
    with record(model, "blocks.*.ffn.hidden") as cache:
        model(TOKENS)
    wanted = (cache.stack("ffn.hidden") > 0).float().mean((1, 2))
    monkeypatch.setattr("receptance.analysis.units._CHUNK", 5)
    found = activations(model, TOKENS)
    torch.testing.assert_close(found.rates, wanted)
    torch.testing.assert_close(found.sparsity, 1 - wanted.mean(1))
    assert found.tokens == 28 and "28 tokens" in found._repr_html_()


def test_a_unit_that_is_cut_off_is_dead(model):
    with patch(model, "blocks.1.ffn.key", lambda x: x - 1e4 * (torch.arange(x.shape[-1]) < 10)):
        found = activations(model, TOKENS)
    assert bool((found.rates[1, :10] == 0).all())
    assert int(found.dead[1]) >= 10 > int(found.dead[2])
