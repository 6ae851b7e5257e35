"""Biases, constraints and the likeliest tokens of rows that generate together."""

import pytest
import torch
from tiny import make_model

from receptance.inference.batching import Slots
from receptance.inference.rows import Request, Token
from receptance.inference.sampling import Sampling
from receptance.inference.steering import steer
from receptance.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()


class Spell:
    """A constraint that allows one text, and then the end."""

    def __init__(self, text: str) -> None:
        self.left = [*BYTES.encode(text), BYTES.end_of_text]

    def allowed(self) -> torch.Tensor:
        allowed = torch.zeros(200, dtype=torch.bool)
        allowed[self.left[0]] = True
        return allowed

    def take(self, token: int) -> None:
        assert token == self.left.pop(0)


def written(*requests: Request) -> list[list[Token]]:
    slots = Slots(make_model(), BYTES, deterministic=True)
    rows = [slots.admit("some text", request) for request in requests]
    tokens: dict[int, list[Token]] = {row: [] for row in rows}
    while slots.active or slots.waiting:
        for token in slots.step():
            tokens[token.row].append(token)
    return list(tokens.values())


def test_a_constraint_holds_for_its_row_alone():
    plain = Request(max_tokens=8, seed=3)
    spelled = Request(constraint=Spell("a fox"), seed=3)
    one, other = written(spelled, plain)
    assert "".join(token.text for token in one) == "a fox"
    assert one[-1].finish_reason == "end_of_text"
    [alone] = written(plain)
    assert [t.id for t in other] == [t.id for t in alone]


def test_a_bias_forces_and_bans():
    greedy = Sampling(temperature=0)
    [[first]] = written(Request(max_tokens=1, sampling=greedy))
    [[forced]] = written(Request(max_tokens=1, sampling=greedy, bias={65: 1000}))
    [[banned]] = written(Request(max_tokens=1, sampling=greedy, bias={first.id: -1000}))
    assert forced.id == 65 and banned.id != first.id
    # What is told of probabilities is the model's own opinion.
    assert forced.log_probability < first.log_probability


def test_the_likeliest_are_told_with_their_probabilities():
    greedy = Request(max_tokens=4, sampling=Sampling(temperature=0), likeliest=5)
    for token in written(greedy)[0]:
        assert token.likeliest[0] == (token.id, token.log_probability)
        values = [value for _, value in token.likeliest]
        assert len(values) == 5 and values == sorted(values, reverse=True)
    assert written(Request(max_tokens=1))[0][0].likeliest == ()


def test_a_row_that_may_say_nothing_ends_with_an_error():
    class Nothing:
        def allowed(self) -> torch.Tensor:
            return torch.zeros(0, dtype=torch.bool)

        def take(self, token: int) -> None:
            raise AssertionError

    [[token]] = written(Request(constraint=Nothing()))
    assert (token.id, token.finish_reason) == (-1, "error")


def test_ids_that_the_model_does_not_have_are_left_alone():
    logits = torch.zeros(1, 4)
    steer(logits, [{9: 1.0, 2: 5.0}], [None])
    assert logits.tolist() == [[0, 0, 5, 0]]


@pytest.mark.parametrize(
    "bias", [{-1: 0.0}, {1: float("nan")}, {1: float("inf")}, {1: "x"}, {1.5: 1.0}, [1]]
)
def test_wrong_biases_are_refused(bias):
    with pytest.raises(ValueError):
        Request(bias=bias)


def test_likeliest_without_log_probabilities_is_refused():
    with pytest.raises(ValueError, match="log_probabilities"):
        Request(likeliest=2, log_probabilities=False)
    with pytest.raises(ValueError, match="at least 0"):
        Request(likeliest=-1)
