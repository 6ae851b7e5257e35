"""Losses of passages: those of the model itself, in any company, from any point on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import make_model

from receptance.engine import native_engine
from receptance.evaluation.texts.passages import Passage, Reader, carried, read_all, windows

VOCABULARY = 61
# Sums of many float32 losses.
CLOSE = {"rtol": 1e-5, "atol": 1e-4}


@pytest.fixture(scope="module")
def model():
    return make_model(VOCABULARY)


def tokens(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(VOCABULARY, size=length + 1).astype(np.int32)


def losses(model, ids: np.ndarray) -> np.ndarray:
    """The loss of each token after the first, by one call."""
    read = torch.from_numpy(ids.astype(np.int64))
    with torch.no_grad():
        logits = model(read[None, :-1])[0][0]
    return -logits.log_softmax(-1)[torch.arange(len(read) - 1), read[1:]].double().numpy()


def sums(model, passages: list[Passage]) -> dict:
    found = {}
    read_all(model, passages, found.__setitem__)
    return found


def test_sums_are_those_of_the_model(model):
    passages = [carried((n, 0), tokens(length, n)) for n, length in enumerate([700, 1, 3, 90, 41])]
    passages += [carried((n, 0), tokens(5 + n, n)) for n in range(5, 50)]
    found = sums(model, passages)
    assert found.keys() == {each.key for each in passages}
    for each in passages:
        np.testing.assert_allclose(found[each.key], [losses(model, each.tokens).sum()], **CLOSE)


def test_buckets_add_up_what_lies_between_their_edges(model):
    each = Passage((0, 0), tokens(800), [3, 4, 10, 600, 640])
    own = losses(model, each.tokens)
    wanted = [own[a:b].sum() for a, b in ((3, 4), (4, 10), (10, 600), (600, 640))]
    np.testing.assert_allclose(sums(model, [each])[0, 0], wanted, **CLOSE)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_reading_goes_on_where_another_reader_stopped(model, stop):
    def passages():
        return (Passage((n, 0), tokens(300 + 97 * n, n), [5, 120, 299]) for n in range(18))

    wanted, found, first = sums(model, list(passages())), {}, Reader(model, passages())
    for _ in range(stop):
        found |= dict(first.step())
    done = set(found)
    second = Reader(model, (p for p in passages() if p.key not in done), first.unfinished)
    while (ended := second.step()) is not None:
        found |= dict(ended)
    assert found.keys() == wanted.keys()
    for key, values in wanted.items():
        np.testing.assert_allclose(found[key], values, **CLOSE)


def test_other_engines_give_the_same(model):
    native = native_engine(model.config, {n: x.detach() for n, x in model.state_dict().items()})
    passages = [carried((n, 0), tokens(40 * n + 1, n)) for n in range(6)]
    ours, theirs = sums(model, passages), sums(native, passages)
    for key, values in ours.items():
        np.testing.assert_allclose(theirs[key], values, rtol=1e-4, atol=1e-3)


def test_progress_counts_every_prediction_once(model):
    told = []
    passages = [carried((n, 0), tokens(30 * n + 1, n)) for n in range(20)]
    read_all(model, passages, lambda key, found: None, lambda *at: told.append(at))
    total = sum(30 * n + 1 for n in range(20))
    assert told == sorted(told) and told[-1] == (total, total)


def test_an_unknown_token_is_refused(model):
    with pytest.raises(ValueError, match=str(VOCABULARY)):
        sums(model, [carried((0, 0), [0, VOCABULARY])])


@pytest.mark.parametrize("length", [1, 2, 7, 40, 41, 80, 1000])
def test_windows_are_those_of_the_harness(length):
    utils = pytest.importorskip("lm_eval.utils")
    ids = tokens(80)
    theirs = utils.get_rolling_token_windows(ids[1:].tolist(), int(ids[0]), length, 1)
    ours = list(windows(3, ids, length))
    assert [each.key for each in ours] == [(3, n) for n in range(len(ours))]
    for mine, (inputs, predicted) in zip(ours, theirs, strict=True):
        assert mine.tokens[:-1].tolist() == inputs
        assert mine.tokens[1:][mine.edges[0] : mine.edges[1]].tolist() == predicted
