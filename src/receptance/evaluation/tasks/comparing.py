"""A task learned by several architectures, each at its own best learning rate: `run_task`.

The grid is difficulty x width x architecture. At each point of it every learning rate is tried with
the first seed; the one with the best validation is taken, and the other seeds run with that. Tests
play no part in the choice.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from receptance.data.labeled import Examples
from receptance.evaluation.intervals import mean
from receptance.evaluation.results import Figure, Result, Source, Subject, versions
from receptance.evaluation.tasks.base import DrawnExamples
from receptance.evaluation.tasks.benchmarks import BENCHMARKS, benchmark, published_rows
from receptance.evaluation.tasks.findings import curves_of
from receptance.evaluation.tasks.pictures import draw_curves
from receptance.evaluation.tasks.registry import DRAWN, make_task, nearest
from receptance.evaluation.tasks.runs import Measured, Outcome, Spec, check_models, outcome_of
from receptance.model.heads import Pooling
from receptance.progress import say
from receptance.training.options import TrainOptions

RESULT = "result.json"


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Which task, which models, and how they are trained."""

    task: str
    """The name of a task, or of a benchmark that reads files."""
    settings: tuple[str, ...] = ("",)
    """Difficulties to be compared, each like pairs=8,length=64; what is left out has its
    default."""
    source: str | None = None
    """The text, file or folder that the task reads, if it reads any."""
    columns: tuple[str, ...] = ()
    """The columns of a forecast; none means all columns of numbers."""
    models: tuple[str, ...] = ("rwkv4", "transformer")
    """The architectures."""
    widths: tuple[int, ...] = (64,)
    """The widths, in channels. A Transformer of the same width gets as many parameters."""
    layers: int = 2
    """The number of blocks."""
    pooling: Pooling = "mean"
    """What the head sees of a whole sequence: mean or last."""
    bidirectional: bool = False
    """Whether a second stack reads each sequence from its end, and attention sees all of it."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    """The learning rates to choose from, each for itself."""
    seeds: int = 1
    """How many runs with the best learning rate, from seed 0 on."""
    beyond: tuple[int, ...] = (1, 2, 4)
    """The multiples of the trained length at which tasks that are drawn are tested."""
    held_out: int = 1000
    """How many examples of a drawn task are kept for validation, and how many for each test."""
    device: str = "cpu"
    train: TrainOptions = field(default_factory=lambda: TrainOptions(steps=2000, batch=64))

    def __post_init__(self) -> None:
        known = [*DRAWN, *BENCHMARKS]
        if self.task not in known:
            raise ValueError(f"no task {self.task!r}{nearest(self.task, known)}")
        check_models(self.models)
        for name in ("settings", "models", "widths", "learning_rates", "beyond"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name} is {values}; name at least one, and each once")
        for name in ("layers", "seeds", "held_out"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.columns and self.task != "forecast":
            raise ValueError(f"columns are for a forecast, and the task is {self.task}")
        if min(self.beyond) < 1:
            raise ValueError(f"beyond is {self.beyond}; multiples of a length are at least 1")
        for rate in self.learning_rates:
            replace(self.train, learning_rate=rate, final_learning_rate=None)  # checks it


@dataclass(frozen=True)
class Point:
    """A place of the grid: a difficulty, a width, an architecture."""

    setting: str
    width: int
    model: str

    @property
    def name(self) -> str:
        """The name of the model in results."""
        return f"{self.model} width {self.width}"


@dataclass
class Found:
    """What was found at one place of the grid."""

    point: Point
    examples: Examples
    rate: float
    """The learning rate with the best validation."""
    swept: dict[float, float]
    """The validation of every learning rate."""
    outcomes: list[Outcome]
    """One for each seed, at that rate."""


def run_task(options: TaskOptions, out: Path, console: Console) -> Result:
    """Run everything that has not been run yet, write result.json and pictures, and return it.

    out gets a folder for each run. A call that was stopped goes on when it is repeated; Ctrl-C
    saves the run that is under way, and then KeyboardInterrupt is raised.
    """
    began = time.monotonic()
    data = {setting: _examples(options, setting) for setting in options.settings}
    points = [
        Point(setting, width, model)
        for setting, width, model in itertools.product(
            options.settings, options.widths, options.models
        )
    ]
    progress = _Progress(len(points), options, console)
    found = [_at(point, options, data[point.setting], out, progress) for point in points]
    result = replace(_result(options, found), seconds=time.monotonic() - began)
    result.save(out / RESULT)
    if result.curves:
        for path in draw_curves(result.curves, out / options.task, chance=_chance(found)):
            say(console, f"drawn: {path}")
    say(console, f"result: {out / RESULT}")
    return result


def _examples(options: TaskOptions, setting: str) -> list[Examples]:
    """The examples to train on, and further ones to test on."""
    if options.task in BENCHMARKS:
        seed, columns = options.train.seed, options.columns
        return [benchmark(options.task, setting, options.source, seed, columns)]
    task = make_task(options.task, setting, options.source)
    length = task.difficulty["length"]
    longer = [task.at_length(length * times) for times in options.beyond if times > 1]
    return [DrawnExamples(task, held_out=options.held_out) for task in (task, *longer)]


def _at(
    point: Point, options: TaskOptions, data: list[Examples], out: Path, progress: _Progress
) -> Found:
    """Run the sweep and the seeds of one place of the grid."""

    def run(rate: float, seed: int) -> Outcome:
        train = replace(options.train, learning_rate=rate, seed=options.train.seed + seed)
        spec = Spec(
            task=dict(data[0].about),
            model=point.model,
            width=point.width,
            layers=options.layers,
            pooling=options.pooling,
            bidirectional=options.bidirectional,
            train=train.with_rates("new"),
        )
        progress(f"{options.task} {point.setting}  {point.name}  rate {rate:g}  seed {seed}")
        return outcome_of(spec, data[0], data[1:], out / "runs", options.device, progress.console)

    swept = {rate: run(rate, 0) for rate in options.learning_rates}
    choose = max if data[0].problem.kind == "classify" else min
    best = choose(swept, key=lambda rate: swept[rate].validation)
    outcomes = [swept[best], *(run(best, seed) for seed in range(1, options.seeds))]
    values = {rate: outcome.validation for rate, outcome in swept.items()}
    return Found(point, data[0], best, values, outcomes)


class _Progress:
    """Says which run begins, and about how long all of them will take."""

    def __init__(self, points: int, options: TaskOptions, console: Console) -> None:
        self.console, self.done = console, 0
        self.total = points * (len(options.learning_rates) + options.seeds - 1)
        self.began = time.monotonic()

    def __call__(self, what: str) -> None:
        left = ""
        if self.done:
            each = (time.monotonic() - self.began) / self.done
            left = f", about {each * (self.total - self.done) / 60:.0f} min left"
        self.done += 1
        say(self.console, f"run {self.done} of {self.total}{left}: {what}")


# ---- the result ---------------------------------------------------------------------------------


def _result(options: TaskOptions, found: Sequence[Found]) -> Result:
    figures = [figure for each in found for figure in _figures(each)]
    notes = [
        "Learning rates were chosen by the validation part, each model its own; the test part "
        "played no role.",
        "No question of the test part was trained on.",
    ]
    chance = _chance(found)
    if chance is not None:
        notes.append(f"Guessing gives an accuracy of {chance:.4g}.")
    figures += [figure for each in _once(found) for figure in _idle(each)]
    if options.task == "forecast":
        notes.append("Windows overlap, so intervals over them are too narrow.")
    rows = published_rows(options.task)
    if rows:
        figures += [
            Figure(name="accuracy", value=value / 100, model=f"{model} (published)")
            for model, value in rows.items()
        ]
        notes.append(
            "Published figures are those of table 4 of arXiv 2305.13048v2, of much larger models "
            "and longer training."
        )
    return Result(
        kind="task",
        what=f"{options.task}: how well each architecture learns it",
        models=_subjects(found),
        data=[_source(options.task, dict(each.examples.about)) for each in _once(found)],
        figures=figures,
        curves=curves_of(figures),
        options=dataclasses.asdict(options),
        seed=options.train.seed,
        notes=notes,
        details={"learning rates": [_sweep(each) for each in found]},
        versions=versions("numpy"),
    )


def _subjects(found: Sequence[Found]) -> list[Subject]:
    subjects: dict[str, Subject] = {}
    for each in found:
        outcome, point = each.outcomes[0], each.point
        about: dict[str, Any] = {
            "architecture": point.model,
            "width": point.width,
            "parameters": outcome.parameters,
            "state": outcome.state,
        }
        # A Transformer's state grows with the length; that of the longest training stands here.
        before = subjects.get(point.name)
        if before is None or before.about["state"] < outcome.state:
            subjects[point.name] = Subject(name=point.name, about=about)
    return list(subjects.values())


def _source(task: str, about: dict[str, Any]) -> Source:
    return Source(name=task, digest=about.get("sha256"), about=about)


def _once(found: Sequence[Found]) -> list[Found]:
    """One entry for each difficulty."""
    return list({each.point.setting: each for each in found}.values())


def _sweep(found: Found) -> dict[str, Any]:
    return {
        "model": found.point.name,
        "setting": found.point.setting,
        "validation": {f"{rate:g}": value for rate, value in found.swept.items()},
        "chosen": found.rate,
    }


def _figures(found: Found) -> list[Figure]:
    """A figure for each set of test examples."""
    figures = []
    name = "accuracy" if found.examples.problem.kind == "classify" else "mean squared error"
    for number, first in enumerate(found.outcomes[0].tested):
        tested = [outcome.tested[number] for outcome in found.outcomes]
        value, low, high, interval = over_seeds(tested)
        about = {
            **first.about,
            "trained length": found.examples.about.get("length"),
            "learning rate": found.rate,
            "parameters": found.outcomes[0].parameters,
            "state": found.outcomes[0].state,
            "seconds": [round(outcome.seconds, 1) for outcome in found.outcomes],
        }
        if first.absolute is not None:
            about["mean absolute error"] = first.absolute
        figures.append(
            Figure(
                name=name,
                value=value,
                model=found.point.name,
                low=low,
                high=high,
                interval=interval,
                about=about,
            )
        )
    return figures


def _idle(found: Found) -> list[Figure]:
    """The error of answering zeros: the mean of what was trained on, or no change in a forecast."""
    if found.examples.problem.kind == "classify":
        return []
    errors = [batch.answers.square().mean(dim=-1) for batch in found.examples.held_out("test", 64)]
    error = float(torch.cat(errors).mean())
    return [Figure(name="mean squared error", value=error, model="zeros", about={"idle": True})]


def over_seeds(tested: Sequence[Measured]) -> tuple[float, float, float, str]:
    """Mean and interval: over seeds if there are several, else over examples."""
    if len(tested) == 1:
        return tested[0].value, tested[0].low, tested[0].high, tested[0].interval
    found = mean([each.value for each in tested])
    assert found.low is not None and found.high is not None
    return found.value, found.low, found.high, f"95 % over {len(tested)} seeds"


def _chance(found: Sequence[Found]) -> float | None:
    """The accuracy of guessing, if it is the same at all difficulties."""
    chances = {each.examples.chance for each in found}
    return chances.pop() if len(chances) == 1 else None
