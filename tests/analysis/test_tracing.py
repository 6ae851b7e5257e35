"""Causal tracing finds the place of planted facts, and does not find it where there is none."""

import json
import math

import pytest
import torch
from planted import CARRIER, LAYERS, LENGTH, planted, prompts

from receptance.analysis import EVERYTHING, OUTPUT, Tracer, causal_trace, parts
from receptance.evaluation.results import Result

VERSIONED = [4, pytest.param(7, marks=pytest.mark.slow)]


def trace(model, fact=3, **options):
    tokens, answers = prompts()
    # Most embeddings stay as tiny as they were, and so does their deviation.
    options = {"generator": torch.Generator().manual_seed(0), "noise": 10.0} | options
    return causal_trace(model, tokens[fact], [0], int(answers[fact]), **options)


def check(found):
    """Whether the fact goes from the subject through the carrier's state to the question."""
    lost = found.corrupted
    assert found.clean > math.log(0.9) and lost < found.clean - 1.5
    back = {name: (x > found.clean - 0.3).nonzero().tolist() for name, x in found.restored.items()}
    same = {name: (x - lost).abs() < 0.02 for name, x in found.restored.items()}
    memory = [name for name in back if name not in (OUTPUT, EVERYTHING) and back[name]]
    assert len(memory) == 1 and "shift" not in memory[0]
    before = range(LENGTH - 1)
    # In the state it lies from the subject on, until the question reads it.
    assert back[memory[0]] == [[CARRIER, t] for t in before]
    # In the stream it lies at the subject before the carrier, and at the question after it.
    at_subject = [[layer, 0] for layer in range(CARRIER)]
    at_question = [[layer, LENGTH - 1] for layer in range(CARRIER, LAYERS)]
    assert back[OUTPUT] == [*at_subject, *at_question]
    assert sorted(back[EVERYTHING]) == sorted([*back[memory[0]], *back[OUTPUT]])
    for name, unchanged in same.items():
        elsewhere = torch.ones_like(unchanged)
        elsewhere[tuple(zip(*back[name], strict=True)) if back[name] else ([], [])] = False
        assert bool(unchanged[elsewhere].all()), name


@pytest.mark.parametrize("version", VERSIONED)
def test_the_planted_place_is_found(version):
    check(trace(planted(version)))


@pytest.mark.parametrize("version", VERSIONED)
def test_without_the_place_it_is_not_found(version):
    with pytest.raises(AssertionError):
        check(trace(planted(version, carrier=False)))


def test_restoring_everything_that_was_corrupted_is_the_clean_run():
    """The output of the last layer at the last token is all that the answer is read from."""
    found = trace(planted(), fact=5)
    torch.testing.assert_close(found.restored[OUTPUT][-1, -1].item(), found.clean)
    assert found.strongest(OUTPUT)[1] in (0, LENGTH - 1)


def test_a_layer_at_a_time_is_the_same(monkeypatch):
    tokens, answers = prompts()
    whole = trace(planted(), samples=4, noise=2.0)
    monkeypatch.setattr("receptance.analysis.tracing._POSITIONS", 45)  # two tokens at a time
    tracer = Tracer(
        planted(),
        tokens[3],
        [0],
        int(answers[3]),
        generator=torch.Generator().manual_seed(0),
        samples=4,
        noise=2.0,
    )
    for place, rows in whole.restored.items():
        for layer, row in enumerate(rows):
            torch.testing.assert_close(tracer.restored(place, layer), row, atol=1e-5, rtol=1e-5)


def test_what_it_leaves(tmp_path):
    done = []
    model = planted()
    found = trace(model, samples=2, texts=["a", "$b", "c", "狐", "?"], note=done.append)
    assert sum(done) == LAYERS * len(found.restored)
    assert [*found.restored] == [OUTPUT, *parts(model), EVERYTHING]
    found.draw(OUTPUT, tmp_path / "trace.png")
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")
    found.result(model, "planted", seed=0).save(tmp_path / "trace.json")
    again = Result.load(tmp_path / "trace.json")
    assert again.kind == "causal trace" and len(again.curves) == LENGTH * len(found.restored)
    assert again.curves[0].y == found.restored[OUTPUT][:, 0].tolist()
    json.dumps(again.details, allow_nan=False)
    assert found._repr_html_().count("<img") == len(found.restored)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subject": [5]}, r"subject is \[5\]; wanted positions of the prompt, 0 to 4"),
        ({"subject": []}, r"subject is \[\]"),
        ({"answer": 64}, "answer is 64; wanted an id below 64"),
        ({"noise": 0.0}, "noise is 0.0; it must be above 0"),
        ({"samples": 0}, "samples is 0; it must be at least 1"),
        ({"tokens": torch.zeros(1, 5).long()}, r"tokens are \[1, 5\]; wanted the ids of a prompt"),
        ({"only": ["heart"]}, "there is no place 'heart'; there are output, "),
    ],
)
def test_mistakes(change, message):
    arguments = {"tokens": prompts()[0][0], "subject": [0], "answer": 33} | change
    with pytest.raises(ValueError, match=message):
        causal_trace(planted(), **arguments, generator=torch.Generator().manual_seed(0))
