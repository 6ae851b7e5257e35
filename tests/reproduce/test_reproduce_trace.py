"""Figure 11: the way of a planted fact is found, and none in a model that cannot carry it."""

import pytest
from tiny import TEXT, make_model, small_bpe

import receptance
from receptance.analysis import EVERYTHING
from receptance.reproduce import facts, trace
from receptance.reproduce.experiment import NOT_SHOWN, Work
from receptance.reproduce.trace import CausalTrace


@pytest.fixture(autouse=True)
def fresh():
    trace._question.cache_clear()
    yield
    trace._question.cache_clear()


def run(experiment, folder):
    pieces = experiment.pieces()
    return experiment.result([(x, experiment.measure(x, Work(folder))) for x in pieces], 0.0)


@pytest.mark.slow  # A model is trained.
def test_the_planted_way_is_found(tmp_path):
    found = run(CausalTrace(samples=4), tmp_path)
    *tool, paper = [check["agrees"] for check in found.details["checks"]]
    assert tool == [True] * 5 and paper is None
    assert found.details["verdict"] == NOT_SHOWN, "the figure is that of another model"
    assert "planted" in found.what and "were not used here" in found.notes[-1]
    panels = CausalTrace().panels(found)
    assert EVERYTHING in panels[0].title and panels[0].rows == list(facts.TEXTS)
    assert len(panels[0].matrix) == len(facts.TEXTS)
    assert len(panels[0].matrix[0]) == facts.LAYERS


@pytest.mark.slow  # A model is trained.
@pytest.mark.parametrize("wrong", ["no carrier", "another layer"])
def test_without_the_carrier_it_is_not(tmp_path, monkeypatch, wrong):
    if wrong == "no carrier":
        dumb = facts.trained(carrier=False)
        monkeypatch.setattr(facts, "trained", lambda: dumb)
    else:
        with monkeypatch.context() as patched:
            patched.setattr(facts, "CARRIER", 0)
            other = facts.trained()
        monkeypatch.setattr(facts, "trained", lambda: other)
    found = run(CausalTrace(samples=2), tmp_path)
    answers = [check["agrees"] for check in found.details["checks"]]
    assert not all(answers[:-1])
    if wrong == "no carrier":
        assert set(answers) == {None}


def test_any_model_and_prompt(tmp_path):
    receptance.save(make_model(300), tmp_path / "m", small_bpe())
    asked = CausalTrace(
        model=str(tmp_path / "m"), prompt=TEXT[:20], subject="foxes", answer=" lazy", samples=2
    )
    found = run(asked, tmp_path)
    assert found.details["verdict"] == NOT_SHOWN, "random weights know nothing"
    assert asked.identity() == {"weights": found.models[0].fingerprint}
    with pytest.raises(ValueError, match="does not hold the subject 'cats'"):
        CausalTrace(model=str(tmp_path / "m"), prompt=TEXT[:20], subject="cats").pieces()
