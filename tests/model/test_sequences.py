"""Models of sequences: padding, batching and cutting change nothing; arguments that do not fit."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from receptance.config import ModelConfig
from receptance.model.heads import SequenceConfig, pooled
from receptance.model.sequences import SequenceModel, reversed_places

LENGTHS = (5, 9, 1, 7)
FORMS = [
    {"pooling": "mean"},
    {"pooling": "last"},
    {"pooling": "mean", "bidirectional": True},
    {"pooling": "last", "bidirectional": True},
    {"channels": 3},
    {"channels": 3, "bidirectional": True},
]


def make(**form) -> SequenceModel:
    """A model that is random everywhere, so that every part matters."""
    vocabulary = 1 if form.get("channels") else 11
    stack = ModelConfig(vocab_size=vocabulary, width=16, num_layers=2)
    model = SequenceModel(SequenceConfig(stack=stack, outputs=4, **form))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def rows(model: SequenceModel) -> list[torch.Tensor]:
    generator, channels = torch.Generator().manual_seed(2), model.config.channels
    if channels:
        return [torch.randn(n, channels, generator=generator) for n in LENGTHS]
    return [torch.randint(11, (n,), generator=generator) for n in LENGTHS]


@pytest.mark.parametrize("form", FORMS, ids=str)
class TestPadding:
    def test_padding_and_batching_change_nothing(self, form):
        model = make(**form)
        alone = torch.cat([model(row[None]) for row in rows(model)])
        padded = pad_sequence(rows(model), batch_first=True, padding_value=3)
        together = model(padded, lengths=torch.tensor(LENGTHS))
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)

    def test_what_stands_behind_a_row_has_no_influence(self, form):
        model = make(**form)
        lengths = torch.tensor(LENGTHS)
        found = [
            model(pad_sequence(rows(model), batch_first=True, padding_value=value), lengths=lengths)
            for value in (1, 7)
        ]
        assert torch.equal(*found)

    def test_gradients_do_not_reach_the_padding(self, form):
        model = make(**form)
        padded = pad_sequence(rows(model), batch_first=True)
        behind = torch.arange(padded.shape[1]) >= torch.tensor(LENGTHS)[:, None]
        embedded = model._embedded(padded, None).detach().requires_grad_()
        read = model._read(embedded, torch.tensor(LENGTHS))
        pooled(read, torch.tensor(LENGTHS), model.config.pooling).square().sum().backward()
        assert not embedded.grad[behind].any()
        assert embedded.grad[~behind].any()


@pytest.mark.parametrize("cut", [1, 4, 8])
def test_a_sequence_may_be_cut_anywhere(cut):
    model = make(pooling="every")
    tokens = rows(model)[1][None]
    whole, end = model.features(tokens)
    left, state = model.features(tokens[:, :cut])
    right, last = model.features(tokens[:, cut:], state)
    torch.testing.assert_close(torch.cat([left, right], dim=1), whole, rtol=1e-5, atol=1e-5)
    assert torch.equal(last.tokens, end.tokens)


def test_places_pick_answers():
    model = make(pooling="every")
    tokens = torch.stack([rows(model)[1]] * 2)
    places = torch.zeros(tokens.shape, dtype=torch.bool)
    places[0, 3] = places[1, 8] = True
    everywhere = model(tokens)
    assert everywhere.shape == (2, 9, 4)
    torch.testing.assert_close(model(tokens, places=places), everywhere[places])


def test_a_pair_is_answered_like_the_same_pair_among_others():
    model = make(pairs=True)
    padded = pad_sequence(rows(model), batch_first=True)
    together = model(padded, lengths=torch.tensor(LENGTHS))
    assert together.shape == (2, 4)
    second = pad_sequence(rows(model)[2:], batch_first=True)
    alone = model(second, lengths=torch.tensor(LENGTHS[2:]))
    torch.testing.assert_close(together[1:], alone, rtol=1e-5, atol=1e-5)


def test_both_directions_are_read():
    model = make(pooling="last", bidirectional=True)
    tokens = torch.tensor([[1, 2, 3, 4]])
    assert not torch.equal(model(tokens), model(tokens.flip(1)))
    first = model._read(model._embedded(tokens, None), None)[0, 0]
    other = tokens.clone()
    other[0, 3] = 9
    changed = model._read(model._embedded(other, None), None)[0, 0]
    width = model.config.stack.width
    assert torch.equal(first[:width], changed[:width])  # this half has not read the end
    assert not torch.equal(first[width:], changed[width:])


def test_reversed_places_leave_padding_where_it_is():
    assert reversed_places(4, torch.tensor([2, 4]), torch.device("cpu")).tolist() == [
        [1, 0, 2, 3],
        [3, 2, 1, 0],
    ]


def test_the_names_are_those_of_the_language_model():
    names = set(make().state_dict())
    assert {"emb.weight", "ln_out.bias", "blocks.0.ln0.weight", "blocks.1.ffn.key.weight"} <= names


def test_starting_values_come_from_the_seed():
    config = SequenceConfig(stack=ModelConfig(vocab_size=5, width=16, num_layers=1), outputs=2)
    one, same, other = (SequenceModel(config, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


class TestRefusals:
    @pytest.mark.parametrize(
        ("form", "message"),
        [
            ({"outputs": 0}, "outputs is 0"),
            ({"channels": -1}, "channels is -1"),
            ({"pooling": "max"}, "pooling is 'max'"),
            ({"pairs": True, "pooling": "every"}, "one answer"),
        ],
    )
    def test_configs(self, form, message):
        stack = ModelConfig(vocab_size=5, width=16, num_layers=1)
        with pytest.raises(ValueError, match=message):
            SequenceConfig(**{"stack": stack, "outputs": 2, **form})

    def test_empty_rows(self):
        with pytest.raises(ValueError, match="a row is empty"):
            make()(torch.ones(2, 3, dtype=torch.int64), lengths=torch.tensor([3, 0]))

    def test_vectors_of_another_size(self):
        with pytest.raises(ValueError, match=r"wanted numbers \[B,T,3\]"):
            make(channels=3)(torch.zeros(2, 5, 4))

    def test_ids_beyond_the_vocabulary(self):
        with pytest.raises(ValueError, match="token id 11 is out of range"):
            make()(torch.full((1, 3), 11))

    def test_places_where_rows_have_one_answer(self):
        with pytest.raises(ValueError, match="places pick positions"):
            make()(torch.ones(1, 3, dtype=torch.int64), places=torch.ones(1, 3, dtype=torch.bool))

    def test_a_state_for_both_directions(self):
        with pytest.raises(ValueError, match="whole rows"):
            make(bidirectional=True).features(torch.ones(1, 3, dtype=torch.int64))


def test_a_config_survives_json():
    config = make(channels=2, bidirectional=True).config
    assert SequenceConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="not the sizes of a sequence model"):
        SequenceConfig.from_dict({"outputs": 2})
