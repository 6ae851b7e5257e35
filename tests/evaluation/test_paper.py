"""The paper's rows beside ours: the right column, the right size, the right units."""

from __future__ import annotations

import pytest

from receptance.config import PUBLISHED_SIZES
from receptance.evaluation.benchmarks.paper import METRICS, TASKS, compare, printed_row, size_note
from receptance.evaluation.results import Figure


def test_there_are_twelve_tasks():
    assert len(TASKS) == 12 and len(METRICS) == 13


@pytest.mark.parametrize(
    ("name", "size", "piqa", "lambada"),
    [("169m", 0.17, 65.07, 29.33), ("1.5b", 1.5, 72.36, 7.04), ("14b", 14.2, 77.48, 3.86)],
)
def test_a_published_model_has_its_own_row(name, size, piqa, lambada):
    parameters = PUBLISHED_SIZES[name].num_parameters
    found, row = printed_row(parameters)
    assert (found, row["PIQA"], row["LAMBADA, perplexity"]) == (size, piqa, lambada)
    assert "no row has its size" not in size_note(parameters)


def test_another_size_is_told():
    assert "this model has 0.001 B, and no row has its size" in size_note(1_000_000)


def test_rows_are_the_printed_ones():
    """The averages are those of the authors' sheet, with StoryCloze and TriviaQA, which the twelve
    tasks leave out."""
    left_out = {0.17: (58.79, 1.26, 44.13), 7.4: (73.44, 18.30, 61.20), 14.2: (76.06, 24.58, 63.71)}
    for size, (story, trivia, average) in left_out.items():
        _, row = printed_row(int(size * 1e9))
        accuracies = [value for column, value in row.items() if column != "LAMBADA, perplexity"]
        assert (sum(accuracies) + story + trivia) / 13 == pytest.approx(average, abs=0.011)


def test_our_figures_stand_beside_it_in_percent():
    figures = [
        Figure(name="acc", value=0.66, about={"task": "piqa"}),
        Figure(name="acc_norm", value=0.5, about={"task": "piqa"}),
        Figure(name="perplexity", value=30.0, about={"task": "lambada_openai"}),
        Figure(name="acc", value=0.5, about={"task": "boolq"}),
    ]
    found = {each.column: each for each in compare(figures, 169_342_464)}
    assert found.keys() == {"PIQA", "LAMBADA, perplexity", "BoolQ"}
    assert found["PIQA"].difference == pytest.approx(66 - 65.07)
    assert found["LAMBADA, perplexity"].difference == pytest.approx(30 - 29.33)
    assert found["BoolQ"].printed is None and found["BoolQ"].difference is None
