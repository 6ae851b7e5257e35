"""A whole comparison: its search, its seeds, its intervals, and what happens if it is repeated."""

from __future__ import annotations

import dataclasses
import math
import statistics

import numpy as np
import pytest
from compare_cases import TOKENIZER, corpus, plan, small
from rich.console import Console

from receptance.evaluation.compare import comparing
from receptance.evaluation.compare.comparing import best, compare, extended
from receptance.evaluation.compare.costs import Cost, Costs
from receptance.evaluation.compare.findings import LOSS, make_result
from receptance.evaluation.compare.options import CompareOptions, parse_size
from receptance.evaluation.compare.runs import Job, Record
from receptance.evaluation.results import Result

QUIET = Console(quiet=True)


def losses(job: Job) -> float:
    """A made-up loss: best at 1e-2 for RWKV and at 8e-2 for others, a little by the seed."""
    good = 1e-2 if job.family == "rwkv4" else 8e-2
    return 2 + abs(math.log(job.train.rates[0] / good)) + 0.1 * job.train.seed


def record(job: Job, digest: str = "") -> Record:
    nats = [losses(job) * math.log(2) * size for size in (10, 30)]
    points = [comparing_point(job.tokens * n // 2, 1.0 * n, losses(job) + 1 / n) for n in (1, 2)]
    return Record(
        name=job.name,
        job=job.to_json(),
        points=points,
        digest=digest or f"order {job.train.seed}",
        nats=nats,
        byte_counts=[10, 30],
        seconds=2.0,
        carried=1.5 if job.family == "rwkv4" else None,
    )


def comparing_point(tokens: int, seconds: float, loss: float):
    from receptance.evaluation.compare.runs import Point

    return Point(tokens=tokens, seconds=seconds, training=loss, bits_per_byte=loss)


class Runner:
    """Makes up the records of jobs, and remembers which were asked for."""

    def __init__(self, make=record) -> None:
        self.jobs: list[Job] = []
        self.make = make

    def __call__(self, jobs):
        self.jobs += jobs
        return [self.make(job) for job in reversed(jobs)]


def measured(work):
    contexts = work.options.contexts
    each = [Cost(context=n, seconds=n / 1e3, remembered=n, resident=None) for n in contexts]
    return Costs(step=0.5, generation=each)


def found(tmp_path, runner=None, **changes):
    planned = plan(small(**changes))
    runner = runner or Runner()
    findings = compare(planned, corpus(), tmp_path, runner, measured, QUIET)
    return planned, findings, runner


def result(tmp_path, **changes) -> Result:
    planned, findings, _ = found(tmp_path, **changes)
    return make_result(planned, corpus(), ["text.txt"], findings, 1)


class TestSearch:
    def test_goes_on_until_the_best_rate_has_worse_ones_on_both_sides(self, tmp_path):
        _, findings, runner = found(tmp_path, learning_rates=(1e-2, 2e-2))
        assert sorted(findings.searches["rwkv4 16x2"]) == [5e-3, 1e-2, 2e-2]
        assert sorted(findings.searches["neox 16x2"]) == [1e-2, 2e-2, 4e-2, 8e-2, 0.16]
        assert findings.rates == {"rwkv4 16x2": 1e-2, "neox 16x2": 8e-2, "llama 16x2": 8e-2}
        searches = [job for job in runner.jobs if job.search]
        assert {job.train.steps for job in searches} == {2}
        assert {job.train.rates[0] for job in runner.jobs if not job.search} == {1e-2, 8e-2}

    def test_with_one_rate_there_is_none(self, tmp_path):
        _, findings, runner = found(tmp_path, learning_rates=(3e-3,))
        assert findings.searches == {} and set(findings.rates.values()) == {3e-3}
        assert not any(job.search for job in runner.jobs)

    def test_is_at_the_smallest_size_or_at_all(self, tmp_path):
        sizes = {"sizes": ("32x2", "16x2"), "learning_rates": (1e-2, 2e-2)}
        _, findings, _ = found(tmp_path / "one", **sizes)
        assert {name.split()[1] for name in findings.searches} == {"16x2"}
        assert findings.rates["neox 32x2"] == 8e-2
        _, findings, _ = found(tmp_path / "all", **sizes, sweep_sizes="all")
        assert {name.split()[1] for name in findings.searches} == {"16x2", "32x2"}

    def test_a_rate_that_diverges_is_the_worst(self):
        good, bad = (Record(name="a", job={}, nats=[1.0], byte_counts=[1]) for _ in range(2))
        bad = dataclasses.replace(bad, diverged=3)
        assert best("a", {1e-3: good, 1e-2: bad}) == 1e-3
        assert extended({1e-3: good, 1e-2: bad}) == [1e-4, 1e-3, 1e-2]
        with pytest.raises(ValueError, match="a diverged at all learning_rates"):
            best("a", {1e-2: bad})


class TestRuns:
    def test_every_size_has_its_seeds(self, tmp_path):
        _, findings, _ = found(tmp_path, sizes=("16x2", "32x2"), seeds=(3, 1))
        counts = {name: len(records) for name, records in findings.records.items()}
        assert counts == {
            f"{model} {size}": n
            for size, n in (("16x2", 3), ("32x2", 1))
            for model in ("rwkv4", "neox", "llama")
        }

    def test_runs_that_are_finished_are_not_asked_for_again(self, tmp_path):
        def keeping(job: Job) -> Record:
            made = record(job)
            made.save(tmp_path / "runs" / f"{job.name}.json")
            return made

        (tmp_path / "runs").mkdir()
        _, first, runner = found(tmp_path, Runner(keeping), learning_rates=(1e-2, 2e-2))
        assert runner.jobs
        _, again, runner = found(tmp_path, learning_rates=(1e-2, 2e-2))
        assert runner.jobs == [] and again == first
        _, _, runner = found(tmp_path, learning_rates=(1e-2, 2e-2), seeds=(2,))
        assert [job.train.seed for job in runner.jobs] == [1, 1, 1]

    def test_examples_are_refused(self, tmp_path):
        masked = dataclasses.replace(corpus(), train_mask=np.ones(3, np.uint8))
        with pytest.raises(ValueError, match="compare models on plain text"):
            compare(plan(), masked, tmp_path, Runner(), measured, QUIET)


class TestResult:
    def test_figures_have_intervals_over_seeds(self, tmp_path):
        made = result(tmp_path, seeds=(3,))
        loss = figure(made, LOSS, "neox 16x2")
        values = [2 + math.log(8) + 0.1 * n for n in range(3)]
        half = 4.302653 * statistics.stdev(values) / math.sqrt(3)
        assert loss.value == pytest.approx(statistics.fmean(values))
        assert (loss.low, loss.high) == pytest.approx((loss.value - half, loss.value + half))
        assert loss.interval == "95 % over 3 seeds"

    def test_differences_are_between_runs_of_the_same_seed(self, tmp_path):
        made = result(tmp_path, seeds=(3,))
        more = figure(made, f"{LOSS}, more than rwkv4", "llama 16x2")
        # The seed moves all models alike, so the difference has no spread.
        assert (more.value, more.low, more.high) == pytest.approx((math.log(8),) * 3)
        assert more.interval == "95 % over 3 pairs of runs with the same seed"
        names = {x.model for x in made.figures if x.name == more.name}
        assert names == {"neox 16x2", "llama 16x2"}

    def test_one_seed_has_an_interval_over_the_text(self, tmp_path):
        loss = figure(result(tmp_path, seeds=(1,)), LOSS, "neox 16x2")
        assert loss.interval == "95 % over 2 pieces of the held-out text, one seed"
        assert loss.low == pytest.approx(loss.value)

    def test_curves_are_of_the_models_and_of_one_size(self, tmp_path):
        made = result(tmp_path, seeds=(2,), sizes=("16x2", "32x2"), learning_rates=(1e-2, 2e-2))
        names = {model.name for model in made.models}
        assert {curve.model for curve in made.curves} <= names
        tokens = [x for x in made.curves if x.name == "loss against tokens"]
        assert {(x.model, x.about["size"]) for x in tokens} == {
            (f"{model} {size}", size)
            for model in ("rwkv4", "neox", "llama")
            for size in ("16x2", "32x2")
        }
        assert tokens[0].x == [320.0, 640.0] and tokens[0].low is not None
        by_name = {curve.name for curve in made.curves}
        assert {"loss against parameters", "search for the learning rate"} <= by_name
        assert {"loss against seconds of training", "loss against training FLOPs"} <= by_name
        assert "seconds per generated token" in by_name

    def test_models_that_read_other_tokens_are_refused(self, tmp_path):
        def strange(job: Job) -> Record:
            return record(job, "another order" if job.family == "llama" else "")

        planned, findings, _ = found(tmp_path, Runner(strange))
        with pytest.raises(ValueError, match="llama 16x2 and rwkv4 16x2 did not read the same"):
            make_result(planned, corpus(), ["text.txt"], findings, 1)

    def test_a_run_that_diverged_is_told_and_has_no_figure(self, tmp_path):
        def wild(job: Job) -> Record:
            made = record(job)
            bad = job.family == "llama"
            return dataclasses.replace(made, diverged=7, nats=[], points=[]) if bad else made

        planned, findings, _ = found(tmp_path, Runner(wild))
        made = make_result(planned, corpus(), ["text.txt"], findings, 1)
        assert not [x for x in made.figures if x.name == LOSS and x.model == "llama 16x2"]
        assert any("diverged at step 7" in note for note in made.notes)
        made.save(tmp_path / "result.json")
        assert Result.load(tmp_path / "result.json").notes == made.notes

    def test_a_best_rate_at_the_end_is_told(self, tmp_path, monkeypatch):
        monkeypatch.setattr(comparing, "_EXTENSIONS", 0)
        made = result(tmp_path, learning_rates=(1e-3, 1e-2))
        assert any("of neox 16x2 is at the end of those" in note for note in made.notes)


def figure(made: Result, name: str, model: str):
    return next(x for x in made.figures if (x.name, x.model) == (name, model))


class TestOptions:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"sizes": ("128",)}, "wanted WIDTHxLAYERS"),
            ({"sizes": ("0x2",)}, "wanted WIDTHxLAYERS"),
            ({"models": ("neox", "neox")}, "each must be named once"),
            ({"models": ()}, "models is empty"),
            ({"learning_rates": (0.0,)}, "learning_rates is 0.0; it must be above 0"),
            ({"tokens": (4096, 10)}, "tokens is 10; a step alone reads 2048"),
            ({"validation": 1.0}, "validation is 1.0; it must be above 0 and below 1"),
            ({"sweep_share": 0.0}, "sweep_share is 0.0"),
            ({"seeds": (0,)}, "seeds is 0; it must be at least 1"),
            ({"contexts": (256, 270)}, "contexts is 256, 270; it must be at least 32 apart"),
            ({"match": "width"}, "match is width; it must be parameters or flops"),
        ],
    )
    def test_mistakes_are_named(self, changes, message):
        with pytest.raises(ValueError, match=message):
            CompareOptions(**changes)

    def test_seeds_are_for_all_sizes_or_for_each(self):
        with pytest.raises(ValueError, match="seeds= has 2 numbers; give one, or one for each of"):
            plan(small(sizes=("16x2", "24x2", "32x2"), seeds=(1, 2)))

    def test_tokens_are_for_all_sizes_or_for_each(self, tmp_path):
        with pytest.raises(ValueError, match="tokens= has 2 numbers"):
            plan(small(tokens=(640, 1280)))
        _, findings, _ = found(tmp_path, sizes=("16x2", "32x2"), tokens=(640, 1280))
        read = {name: records[0].points[-1].tokens for name, records in findings.records.items()}
        assert read["rwkv4 16x2"] == read["neox 16x2"] == 640
        assert read["rwkv4 32x2"] == read["neox 32x2"] == 1280

    def test_a_size_is_width_and_layers(self):
        assert parse_size("128x4") == (128, 4)

    def test_a_width_that_an_architecture_cannot_have_is_refused(self):
        with pytest.raises(ValueError, match="width of 20 cannot be divided into heads"):
            plan(small(sizes=("20x2",)))


def test_the_tokenizer_of_the_cases_is_that_of_bytes():
    assert corpus().tokenizer is TOKENIZER
