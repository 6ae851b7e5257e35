"""Appendix L: a model that hears the question in time is told from one that does not."""

import json
from pathlib import Path

import pytest
import torch
from tiny import make_model, small_bpe

import receptance
from receptance.evaluation.benchmarks.requests import Scored
from receptance.reproduce import prompts
from receptance.reproduce.experiment import AGREES, DIFFERS, NOT_SHOWN, Work
from receptance.reproduce.prompts import AFTER, BEFORE, PromptOrder, macro_f1, read_examples


def write(path, count=40):
    rows = [
        {"sentence1": f"fox {n}", "sentence2": "a fox" if n % 2 else "a dog", "label": n % 2}
        for n in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


@pytest.fixture
def asked(tmp_path):
    receptance.save(make_model(300), tmp_path / "m", small_bpe())
    return PromptOrder(
        model=str(tmp_path / "m"),
        data=str(write(tmp_path / "rte.jsonl")),
        entails="1",
        device="cpu",
    )


def run(experiment, folder):
    found = [(x, experiment.measure(x, Work(folder))) for x in experiment.pieces()]
    return experiment.result(found, 0.0)


@pytest.mark.parametrize(
    ("attentive", "wanted"),
    [({AFTER}, AGREES), ({BEFORE}, DIFFERS), (set(), NOT_SHOWN), ({BEFORE, AFTER}, NOT_SHOWN)],
)
def test_the_verdict_follows_the_answers(asked, tmp_path, monkeypatch, attentive, wanted):
    """Instead of a model: right answers behind the orders that it understands, else always yes."""
    tokenizer = small_bpe()

    def scored(engine, requests, found):
        for n, request in enumerate(requests):
            text = tokenizer.decode(list(request.context))
            order = BEFORE if "Having premise" in text else AFTER
            yes = "a fox" in text if order in attentive else True
            answer = tokenizer.decode(list(request.continuation))
            found(n, Scored(-1.0 if yes != ("not" in answer) else -2.0, True))

    monkeypatch.setattr(prompts, "score_requests", scored)
    result = run(asked, tmp_path)
    assert result.details["verdict"] == wanted
    accuracy = {x.about["order"]: x.value for x in result.figures if x.name == "accuracy"}
    assert accuracy == {order: 100 if order in attentive else 50 for order in (BEFORE, AFTER)}


def test_scores_are_those_of_the_model(asked, tmp_path):
    piece = asked.pieces()[0]
    found = asked.measure(piece, Work(tmp_path))
    model, tokenizer = receptance.load(asked.model)
    example = read_examples(Path(asked.data), "1")[3]
    text = "Bob: " + prompts.TEMPLATES[BEFORE].format(**example.about) + "\n\nAlice:"
    logs = []
    for answer in (" entailment", " not_entailment"):
        ids, before = tokenizer.encode(text + answer), len(tokenizer.encode(text))
        log_p = model(torch.tensor([ids]))[0][0].detach().log_softmax(-1)
        logs.append(sum(float(log_p[t - 1, ids[t]]) for t in range(before, len(ids))))
    assert found["margins"][3] == pytest.approx(logs[0] - logs[1], abs=1e-3)
    assert found["labels"][:4] == [False, True, False, True] and example.entailed


def test_f1():
    said = [(True, True), (True, False), (False, False), (False, False)]
    assert macro_f1(said) == pytest.approx(100 * (2 / 3 + 4 / 5) / 2)
    assert macro_f1([(True, True), (True, False)]) == pytest.approx(100 * (2 / 3) / 2)


@pytest.mark.parametrize(
    ("line", "entails", "message"),
    [
        ("{}", "1", "line 1: no premise, hypothesis and label"),
        ("[", "1", "line 1: not JSON"),
        ('{"premise": "a", "hypothesis": "b", "label": 0}', "0", "all 1 examples of"),
    ],
)
def test_mistakes(tmp_path, line, entails, message):
    (tmp_path / "x.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message):
        read_examples(tmp_path / "x.jsonl", entails)
    with pytest.raises(ValueError, match="model is missing"):
        PromptOrder().pieces()
    with pytest.raises(ValueError, match=r"it needs \{\} where the prompt stands"):
        PromptOrder(around="Q:")
