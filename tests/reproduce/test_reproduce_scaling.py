"""The scaling law: fronts and fits are right, and a loss that compute does not lower is no law."""

import math

import pytest
from tiny import TEXT

from receptance.evaluation.intervals import fitted_line
from receptance.evaluation.results import Result
from receptance.reproduce.experiment import AGREES, DIFFERS, NOT_SHOWN, Work, verdict
from receptance.reproduce.power_law import SLOPE, PowerLaw, edge, front
from receptance.reproduce.scaling import Scaling

COMPUTES = [10 ** (10 + n / 3) for n in range(10)]
TINY = {"tokenizer": "bytes", "context": 16, "batch": 2, "held_out": 64, "validation": 0.2}


def law(loss, **noise):
    """A front of one point for each compute, and beside it what a model of the wrong size has."""
    optimal = [(compute, loss(compute)) for compute in COMPUTES]
    return PowerLaw([*optimal, *((c, 1.2 * y) for c, y in optimal)], 10)


def power(compute):
    return 30 * compute**-0.1


def test_a_front_has_what_nothing_cheaper_beats():
    points = [(1, 5.0), (1, 4.0), (2, 4.5), (3, 3.0), (4, 3.0), (5, 2.0)]
    assert front(points) == [(1, 4.0), (3, 3.0), (5, 2.0)]


def test_a_power_law_is_found_and_foretells_what_was_held_out():
    found = law(power)
    assert found.fit.slope.value == pytest.approx(-0.1) and found.fit.r2 == pytest.approx(1)
    assert len(found.fitted) == 7 and len(found.beyond) == 3
    assert found.errors() == pytest.approx([0, 0, 0], abs=1e-9)
    assert verdict(found.checks()) == AGREES


def test_models_that_stop_to_gain_do_not_show_it():
    """A loss with a floor follows the line and then leaves it, as Kaplan says of LSTMs."""
    limit = COMPUTES[5]
    found = law(lambda compute: power(min(compute, limit)) - 1e-9 * compute / limit)
    assert verdict(found.checks()) == DIFFERS
    assert not found.checks()[1].agrees


def test_what_smaller_sizes_had_no_tokens_for_decides_nothing():
    """A small model with a power law of its own, and larger ones that are worse at each compute."""
    sizes = {
        name: [(times * c, waste * power(times * c)) for c in COMPUTES[:7]]
        for name, times, waste in (("8x1", 1, 1.0), ("16x1", 4, 1.02), ("32x1", 400, 1.4))
    }
    outer = edge(sizes)
    assert [x for x in sizes["32x1"] if x not in outer] == [sizes["32x1"][0]]
    points = [point for some in sizes.values() for point in some]
    found = PowerLaw(points, 10, outer)
    assert found.edge and not set(found.edge) & {*found.fitted, *found.beyond}
    assert found.checks()[1].agrees is None
    assert "decide nothing (+" in found.checks()[1].found
    assert PowerLaw(points, 10).checks()[1].agrees is False, "as it was without this rule"
    assert "optimal, at the edge of the grid" in [curve.name for curve in found.curves()]


def test_predictions_that_miss_the_form_decide_nothing():
    """Each within five percent, but no better than the mean of what was held out."""
    tilted = [
        (c, power(c) * (0.97 if n == 7 else 1.03 if n == 8 else 1)) for n, c in enumerate(COMPUTES)
    ]
    found = PowerLaw(tilted, 10)
    found.beyond = tilted[7:9]
    assert max(map(abs, found.errors())) < 0.05 and found.predicted_r2() < 0.75
    assert found._holds().agrees is None


@pytest.mark.parametrize(("wobble", "wanted"), [(0.0, True), (0.06, None), (0.2, False)])
def test_a_line_that_is_nearly_one_decides_nothing(wobble, wanted):
    """As a coarse grid makes steps in the front."""
    optimal = [(c, power(c) * (1 + wobble * (-1) ** n)) for n, c in enumerate(COMPUTES)]
    found = PowerLaw(optimal, 1.5)
    found.fitted = optimal
    x, y = zip(*optimal, strict=True)
    found.fit = fitted_line([math.log10(c) for c in x], [math.log10(v) for v in y])
    assert found._straight().agrees is wanted


def test_without_a_line_there_is_no_law():
    steps = [9.0, 8.9, 8.8, 8.7, 4.0, 3.9, 3.8, 3.0, 2.9, 2.8]
    found = PowerLaw(list(zip(COMPUTES, steps, strict=True)), 10)
    assert found.checks()[0].agrees is False
    flat = law(lambda compute: 3.0)
    assert verdict(flat.checks()) == NOT_SHOWN and len(flat.fitted) == 1


def test_few_runs_show_nothing():
    assert verdict(PowerLaw([(1, 3.0), (2, 2.0)], 10).checks()) == NOT_SHOWN
    assert verdict(PowerLaw([], 10).checks()) == NOT_SHOWN


def test_runs_are_kept_and_taken_again(tmp_path):
    (tmp_path / "text").write_text(TEXT)
    experiment = Scaling(
        data=(str(tmp_path / "text"),), sizes=("8x1", "16x1"), tokens=(64, 128), **TINY
    )
    work = Work(tmp_path / "work")
    experiment.prepare(work)
    pieces = experiment.pieces()
    assert pieces[0] == {"size": "16x1", "tokens": 128} and len(pieces) == 4
    found = [(piece, experiment.measure(piece, work)) for piece in pieces]
    kept = sorted(work.folder.glob("*-tokens/runs/*.json"))
    assert len(kept) == 4
    before = [path.read_bytes() for path in kept]
    assert [(piece, experiment.measure(piece, work)) for piece in pieces] == found
    assert [path.read_bytes() for path in kept] == before
    result = experiment.result(found, 0.0)
    assert result.data[0].name == "text" and len(result.details["runs"]) == 4
    # By hand: 2 (V C + 13 C² L) for the matrices, times 3 for both passes; the state on top.
    flops, matrices = found[-1][1]["flops"] / 64, 6 * (257 * 8 + 13 * 64)
    assert matrices < flops < 1.1 * matrices
    result.save(tmp_path / "scaling.json")
    (panel,) = experiment.panels(Result.load(tmp_path / "scaling.json"))
    assert {line.label for line in panel.lines} >= {"8x1", "16x1"}
    assert panel.log_x and panel.log_y


@pytest.mark.slow  # Sixteen models are trained.
def test_models_that_cannot_learn_do_not_show_it(tmp_path, monkeypatch):
    (tmp_path / "text").write_text(TEXT)
    experiment = Scaling(
        data=(str(tmp_path / "text"),),
        sizes=("8x1", "16x1", "24x1", "32x2"),
        tokens=(128, 512, 2048, 8192),
        rate=1e-9,
        **TINY,
    )
    work = Work(tmp_path / "work")
    experiment.prepare(work)
    found = [(piece, experiment.measure(piece, work)) for piece in experiment.pieces()]
    result = experiment.result(found, 0.0)
    assert result.details["verdict"] != AGREES
    assert all(figure.name != SLOPE or figure.value > -0.01 for figure in result.figures)


def test_mistakes():
    with pytest.raises(ValueError, match="tokens has 10; a step alone reads 1024"):
        Scaling(tokens=(10,))
    with pytest.raises(ValueError, match=r"sizes is \('16x2', '16x2'\); name each once"):
        Scaling(sizes=("16x2", "16x2"))
    with pytest.raises(ValueError, match="no run costs at most most_flops, 10"):
        Scaling(most_flops=10).pieces()
    with pytest.raises(ValueError, match="held_out is 0; it must be at least 1"):
        Scaling(held_out=0)
    assert 0 < len(Scaling(most_flops=1e12).pieces()) < len(Scaling().pieces())
