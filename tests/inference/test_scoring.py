"""Log-likelihoods against the plain computation, and what is known about entropies."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_model

from receptance.adapters.lora import LoRA, LoRAOptions
from receptance.engine.adapted import AdaptedModel
from receptance.inference.scoring import (
    bits_per_byte,
    negative_log_likelihood,
    text_rows,
    unigram_entropy,
)
from receptance.model import Model


def text(length: int) -> torch.Tensor:
    return torch.randint(256, (length,), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def plain(model: Model, tokens: torch.Tensor, start: int) -> float:
    """One row, read in one piece."""
    inputs = torch.cat([torch.tensor([start]), tokens[:-1]])
    logits, _ = model(inputs[None])
    return float(F.cross_entropy(logits[0].double(), tokens, reduction="sum"))


@pytest.mark.parametrize("length", [1, 2, 255, 256, 257, 2047])
@pytest.mark.parametrize("start", [0, 65])
def test_a_short_text_is_one_row(length, start):
    model, tokens = make_model(), text(length)
    found = negative_log_likelihood(model, tokens, start=start)
    assert found == pytest.approx(plain(model, tokens, start), rel=1e-5)


@pytest.mark.parametrize(("length", "rows"), [(2048, 2), (2501, 2), (5000, 4)])
def test_a_long_text_is_the_sum_of_its_pieces(length, rows):
    model, tokens = make_model(), text(length)
    pieces = tokens.split(-(-length // rows))
    assert len(pieces) == rows
    wanted = sum(plain(model, piece, 7) for piece in pieces)
    assert negative_log_likelihood(model, tokens, start=7) == pytest.approx(wanted, rel=1e-5)


@given(st.integers(0, 5000))
def test_rows_hold_every_token_once(length):
    """As targets, each predicted from the one before it or from the start of its row."""
    tokens = text(length)
    rows = text_rows(tokens, start=300)
    assert rows.mask is not None and rows.inputs.shape == rows.targets.shape == rows.mask.shape
    assert torch.equal(rows.targets[rows.mask], tokens)
    assert (rows.inputs[:, :1] == 300).all()
    assert torch.equal(rows.inputs[:, 1:], rows.targets[:, :-1])


def test_numpy_tokens_of_any_width_will_do():
    model, tokens = make_model(), text(100)
    wanted = negative_log_likelihood(model, tokens)
    assert negative_log_likelihood(model, tokens.numpy().astype(np.uint16)) == wanted


@pytest.mark.parametrize("wrong", [256, -1, -100])
@pytest.mark.parametrize("place", [0, -1])
def test_tokens_that_the_model_does_not_know(wrong, place):
    """The last one is never fed, and -100 is a number that torch passes over."""
    tokens = text(9)
    tokens[place] = wrong
    with pytest.raises(ValueError, match=f"token id {wrong} is out of range"):
        negative_log_likelihood(make_model(), tokens)


def test_no_text_costs_nothing():
    assert negative_log_likelihood(make_model(), np.zeros(0, np.uint16)) == 0


@pytest.mark.parametrize("vocab_size", [256, 300])
def test_a_uniform_model_needs_all_bits(vocab_size):
    model = make_model(vocab_size)
    torch.nn.init.zeros_(model.head.weight)
    nats = negative_log_likelihood(model, text(1000))
    assert bits_per_byte(nats, 1000) == pytest.approx(math.log2(vocab_size))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_comes_back_and_dropout_is_off(training):
    model = make_model().train(training)
    model.dropout = 0.5
    assert negative_log_likelihood(model, text(50)) == negative_log_likelihood(model, text(50))
    assert model.training == training
    with pytest.raises(ValueError):
        negative_log_likelihood(model, np.array([300, 300]))
    assert model.training == training


def test_bfloat16_activations_are_close():
    model, tokens = make_model(), text(200)
    exact = negative_log_likelihood(model, tokens)
    rounded = negative_log_likelihood(model.bfloat16(), tokens)
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("wrong", ["123", b"123", [0.5], [True], [[1], [2]], 7, None])
def test_only_token_ids_are_scored(wrong):
    """The text "123" is not the number 123."""
    with pytest.raises(ValueError, match="a text is scored by its token ids") as caught:
        negative_log_likelihood(make_model(), wrong)
    assert "\n" not in str(caught.value)


def test_any_engine_is_scored_and_put_back():
    """One that is no `Model`: an adapter in training mode drops nothing out, and trains on."""
    model = make_model()
    lora = LoRA(model, LoRAOptions(dropout=0.5)).train()
    torch.nn.init.ones_(lora.pairs[0].up.weight)
    engine = AdaptedModel(model, lora)
    first = negative_log_likelihood(engine, text(50))
    assert negative_log_likelihood(engine, text(50)) == first
    assert lora.training and not model.training


def test_no_bytes_have_no_bits_per_byte():
    with pytest.raises(ValueError, match="empty text"):
        bits_per_byte(1.0, 0)


@pytest.mark.parametrize(
    ("content", "bits"),
    [(b"aaaa", 0), (b"abab", 1), (bytes(range(256)), 8), (b"aaab", 2 - 0.75 * math.log2(3))],
)
def test_unigram_entropy(content, bits):
    assert unigram_entropy(content) == pytest.approx(bits, abs=1e-12)
