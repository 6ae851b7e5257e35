"""Scores of requests: each equals its solo run, and what several share is read once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_model

from receptance.evaluation.benchmarks.prefix_tree import Request, plan
from receptance.evaluation.benchmarks.requests import score_requests, shares

VOCABULARY = 7
MODEL = make_model(VOCABULARY, width=8, layers=1)

few = st.lists(st.integers(0, 2), min_size=1, max_size=9)
requests = st.lists(st.builds(Request, few, few), min_size=1, max_size=14)


def alone(request: Request) -> tuple[float, bool]:
    tokens = torch.tensor([*request.context, *request.continuation])
    with torch.no_grad():
        logits = MODEL(tokens[None, :-1])[0][0, len(request.context) - 1 :]
    targets = tokens[len(request.context) :]
    chosen = logits.log_softmax(-1)[torch.arange(len(targets)), targets]
    return float(chosen.double().sum()), bool((logits.argmax(-1) == targets).all())


def together(asked: list[Request]):
    found = {}
    tree = score_requests(MODEL, asked, found.__setitem__)
    assert found.keys() == set(range(len(asked)))
    return tree, [(found[n].log_probability, found[n].greedy) for n in range(len(asked))]


@given(requests)
@settings(max_examples=25)
def test_each_score_is_that_of_the_request_alone(asked):
    _, found = together(asked)
    for request, (value, greedy) in zip(asked, found, strict=True):
        wanted, wanted_greedy = alone(request)
        assert value == pytest.approx(wanted, abs=1e-4)
        assert greedy == wanted_greedy


@given(requests)
@settings(max_examples=40)
def test_the_tree_has_every_beginning_once(asked):
    tree = plan(asked)
    beginnings = {tuple(each.tokens[: n + 1]) for each in asked for n in range(len(each.tokens))}
    assert tree.tokens == len(beginnings)
    assert tree.tokens + tree.spared == sum(len(each.tokens) for each in asked)


def test_long_shared_contexts():
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(VOCABULARY, (n,), generator=generator).tolist()  # noqa: E731
    shots, asked = draw(1500), []
    for _ in range(40):
        context = shots + draw(30)
        asked += [Request(context, draw(3)) for _ in range(4)]
    tree, found = together(asked)
    assert tree.tokens < 1500 + 40 * (30 + 4 * 2) + 1
    for number in (0, 57, 159):
        assert found[number][0] == pytest.approx(alone(asked[number])[0], abs=1e-3)


def test_progress_ends_with_all_tokens():
    told = []
    tree = score_requests(
        MODEL,
        [Request([1, 2, 3], [n]) for n in range(5)],
        lambda number, score: None,
        lambda *at: told.append(at),
    )
    assert told[0] == (0, 3) and told[-1] == (3, 3) and tree.spared == 12


@pytest.mark.parametrize("bad", [VOCABULARY, -1])
@pytest.mark.parametrize("place", [0, 1])
def test_an_unknown_token_is_refused(bad, place):
    parts = [[1], [2]]
    parts[place] = [bad]
    with pytest.raises(ValueError):
        score_requests(MODEL, [Request(*parts)], lambda number, score: None)


def test_an_empty_part_is_refused():
    for parts in (([], [1]), ([1], [])):
        with pytest.raises(ValueError, match="without tokens"):
            Request(*parts)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=40), st.integers(1, 600))
def test_shares_are_bounded_and_short_runs_are_read_whole(lengths, positions):
    found = shares(lengths, positions)
    assert all(1 <= share <= length for share, length in zip(found, lengths, strict=True))
    assert sum(found) <= max(positions, len(lengths))
    for share, length in zip(found, lengths, strict=True):
        assert share == length or share >= positions // len(lengths)
