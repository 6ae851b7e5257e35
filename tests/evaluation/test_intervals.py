"""Intervals against scipy, against formulas, and against how often they hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from receptance.evaluation.intervals import (
    fitted_line,
    mean,
    ratio,
    resampled_error,
    share,
    student_quantile,
)


@pytest.mark.parametrize("degrees", [*range(1, 12), 30, 119, 5000])
def test_quantiles_are_those_of_students_distribution(degrees):
    stats = pytest.importorskip("scipy.stats")
    assert student_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=2e-3)


def test_the_interval_of_a_mean_is_the_usual_one():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(0).normal(3.0, 2.0, size=40)
    found = mean(values)
    low, high = stats.t.interval(0.95, 39, loc=values.mean(), scale=stats.sem(values))
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-4)
    assert found.interval == "95 % over 40 documents, Student's t"


def test_a_long_document_counts_for_more_in_a_ratio():
    assert ratio([1.0, 30.0], [1.0, 10.0]).value == pytest.approx(31 / 11)


def test_the_interval_of_a_ratio_holds_the_truth_as_often_as_it_says():
    generator, held = np.random.default_rng(1), 0
    for _ in range(400):
        sizes = generator.integers(10, 1000, size=30)
        sums = sizes * generator.normal(2.0, 0.5, size=30)
        found = ratio(sums, sizes)
        held += found.low < 2.0 < found.high
    assert 360 <= held <= 396  # 380 are expected, with a standard deviation of 4.4.


@pytest.mark.parametrize("right", [0, 1, 17, 39, 40])
def test_the_interval_of_a_share_is_wilsons(right):
    stats = pytest.importorskip("scipy.stats")
    wanted = stats.binomtest(right, 40).proportion_ci(method="wilson")
    found = share(right / 40, 40)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))
    assert found.low < found.high


def test_what_is_no_share_is_refused():
    for value, count in ((0.5, 0), (-0.1, 3), (1.1, 3)):
        with pytest.raises(ValueError, match="is no share"):
            share(value, count)


def test_one_document_has_no_interval():
    found = ratio([2.0], [4.0])
    assert (found.value, found.low, found.high, found.interval) == (0.5, None, None, "")
    assert found.map(lambda x: x + 1).value == 1.5


def test_a_falling_function_turns_an_interval_round():
    found = mean([1.0, 2.0, 3.0]).map(lambda x: -x)
    assert found.low < found.value < found.high


@pytest.mark.parametrize(("sums", "sizes"), [([], []), ([1.0], [0.0]), ([1.0], [1.0, 2.0])])
def test_what_cannot_be_averaged_is_refused(sums, sizes):
    with pytest.raises(ValueError):
        ratio(sums, sizes)


def test_resampling_agrees_with_the_formula_of_a_mean():
    values = np.random.default_rng(2).normal(size=200).tolist()
    exact = np.std(values, ddof=1) / np.sqrt(200)
    assert resampled_error(lambda x: sum(x) / len(x), values, 500) == pytest.approx(exact, rel=0.15)


def test_a_fitted_line_is_numpys():
    rng = np.random.default_rng(0)
    x = rng.uniform(1, 5, 12)
    y = 3 - 2 * x + rng.normal(0, 0.3, 12)
    found = fitted_line(x, y)
    (slope, intercept), covariance = np.polyfit(x, y, 1, cov=True)
    assert (found.slope.value, found.intercept) == pytest.approx((slope, intercept))
    assert found.at(2.0) == pytest.approx(2 * slope + intercept)
    reach = student_quantile(10) * math.sqrt(covariance[0, 0])
    assert found.slope.high == pytest.approx(slope + reach)
    assert found.r2 == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)
    assert fitted_line([1, 2], [5, 7]).slope.low is None
    assert fitted_line([1, 2, 3], [5, 5, 5]).r2 == 1
    with pytest.raises(ValueError, match="two places or more, and got 2 x"):
        fitted_line([1, 1], [5, 7])
