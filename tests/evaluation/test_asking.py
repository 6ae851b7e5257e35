"""Drawn tasks as text: the right answers are wanted, and scores are those of the model."""

from __future__ import annotations

import pytest
import torch
from tiny import make_model, small_bpe

from receptance.evaluation.benchmarks.prefixes import encode_pair
from receptance.evaluation.benchmarks.requests import Scored
from receptance.evaluation.journal import Journal
from receptance.evaluation.tasks import asking
from receptance.evaluation.tasks.asking import ask, curves, figure
from receptance.evaluation.tasks.base import draw
from receptance.evaluation.tasks.passkey import Passkey
from receptance.evaluation.tasks.recall import MQAR, Induction, SelectiveCopying

TOKENIZER = small_bpe(300)
MODEL = make_model(300)
HAYSTACK = b"".join(b"line %d of a text that hides pass keys.\n" % n for n in range(200))
TASK = MQAR(pairs=3, length=20, vocabulary=32)


def whole(pieces: list[tuple[str, str]]) -> str:
    return "".join(read + answer for read, answer in pieces)


def test_a_query_of_mqar_is_answered_by_what_stood_behind_its_key():
    drawn = draw(TASK, "test", 5, (0,))
    for tokens, pieces in zip(drawn.tokens, TASK.spoken(drawn), strict=True):
        pairs = dict(zip(tokens[:6:2], tokens[1:6:2], strict=True))
        assert len(pieces) == 3
        for read, answer in pieces:
            assert int(answer) == pairs[int(read.split()[-1])]
        said = [int(word) for word in whole(pieces).split()]
        assert said[:6] == tokens[:6].tolist()


def test_the_answer_of_induction_followed_the_marker():
    task = Induction(length=12)
    for ((read, answer),) in task.spoken(draw(task, "test", 5, (0,))):
        words = read.split()
        assert words[-1] == "0" and words[words.index("0") + 1] == answer.strip()


def test_selective_copying_repeats_what_is_no_noise():
    task = SelectiveCopying(length=12, memorize=4)
    for pieces in task.spoken(draw(task, "test", 5, (0,))):
        data = [word for word in pieces[0][0].split()[:-1] if word != "0"]
        assert [answer.strip() for _, answer in pieces] == data


def test_the_key_of_passkey_stands_in_its_text():
    task = Passkey(text=HAYSTACK, length=160)
    for ((read, answer),) in task.spoken(draw(task, "test", 5, (0,))):
        assert f"The pass key is {answer}. Remember it." in read
        assert read.endswith("What is the pass key? The pass key is ") and answer.isdigit()


def test_scores_are_those_of_the_model():
    found = ask(MODEL, TOKENIZER, TASK, 4)
    for pieces, scores in zip(TASK.spoken(draw(TASK, "test", 4, (0, 0))), found, strict=True):
        for number, score in enumerate(scores):
            read = whole(pieces[:number]) + pieces[number][0]
            before, after = encode_pair(TOKENIZER, read, pieces[number][1])
            with torch.no_grad():
                logits = MODEL(torch.tensor([*before, *after])[None, :-1])[0][0, -len(after) :]
            wanted = logits.log_softmax(-1)[torch.arange(len(after)), torch.tensor(after)].sum()
            assert score.log_probability == pytest.approx(float(wanted), abs=1e-4)


def test_what_the_journal_has_is_not_asked_again(tmp_path, monkeypatch):
    with Journal(tmp_path / "journal", {}) as journal:
        first = ask(MODEL, TOKENIZER, TASK, 3, journal=journal)
    asked = []
    monkeypatch.setattr(
        asking, "score_requests", lambda engine, requests, *_: asked.extend(requests)
    )
    with Journal(tmp_path / "journal", {}) as journal:
        assert ask(MODEL, TOKENIZER, TASK, 3, journal=journal) == first
    assert asked == []


def test_figures_and_their_curve():
    right, wrong = ([[Scored(-1.0, greedy)] * 3] * 9 for greedy in (True, False))
    tasks = [TASK.at_length(length) for length in (40, 20)]
    figures = [figure(task, asked, "m") for task, asked in zip(tasks, (wrong, right), strict=True)]
    assert [each.value for each in figures] == [0, 100]
    assert figures[0].high > 10 and figures[0].about["length"] == 40
    (curve,) = curves(tasks, figures)
    assert (curve.x_name, curve.x, curve.y) == ("length", [20.0, 40.0], [100, 0])
    assert curves(tasks[:1], figures[:1]) == []
