"""receptance evaluate: say how good a model is, on texts, by position, and on benchmarks."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from receptance.apps.console import Console, say_device
from receptance.apps.evaluate_options import KINDS, ONLY, Options, check, names_of
from receptance.apps.found import show_result
from receptance.apps.options import parse
from receptance.evaluation import measuring
from receptance.evaluation.benchmarks import lambada, paper
from receptance.evaluation.benchmarks.prefixes import PREFIXES, Prefix
from receptance.evaluation.benchmarks.tasks import TaskOptions
from receptance.evaluation.journal import journal_path
from receptance.evaluation.results import Figure, Result, Source, Subject, versions
from receptance.evaluation.tasks.registry import make_task
from receptance.evaluation.texts import documents, enwik8
from receptance.evaluation.texts.enwik8 import Split
from receptance.evaluation.texts.positions import Positions
from receptance.evaluation.texts.text import TextOptions, digest, subject
from receptance.plots.panels import Line, draw_lines
from receptance.progress import progress_bar, say
from receptance.storage.directories import expanded

# Sequences that are drawn unless --limit says otherwise.
_SEQUENCES = 100

Measure = Callable[[measuring.Model, measuring.Progress], measuring.Found]


@dataclass(frozen=True)
class _Plan:
    """What is measured of each model, and of which data."""

    what: str
    measure: Measure
    data: list[Source]
    packages: tuple[str, ...] = ()


def main(argv: list[str]) -> None:
    """Parse, measure model by model, save, report."""
    options = parse(Options, argv, "receptance evaluate")
    check(options)
    out = None if options.out is None else expanded(options.out)
    began = time.monotonic()
    try:
        with _progress() as progress:
            plan = _plan(options, progress)
            found, subjects = _measured(options, plan, out, progress)
    except KeyboardInterrupt:
        kept = "is kept, and the same command goes on" if out else "was not kept without --out"
        print(f"\nreceptance: note: what was computed {kept}", file=sys.stderr)
        raise
    result = _result(options, plan, found, subjects, time.monotonic() - began)
    if out is not None:
        result.save(out)
        if options.kind in ("text", "enwik8"):  # Their records are in the result.
            for number in range(len(options.models)):
                _journal(out, number).unlink(missing_ok=True)
    if options.plot is not None:
        _draw(result, options.plot)
    console = Console()
    show_result(console, result)
    if out is not None:
        say(console, f"written to {out}")


# ---- what is measured, and how -----------------------------------------------------------------


def _plan(options: Options, progress: measuring.Progress) -> _Plan:
    makers: dict[str, Callable[[Options, measuring.Progress], _Plan]] = {
        "text": _text,
        "enwik8": _enwik8,
        "lambada": _lambada,
        "recall": _recall,
        "tasks": _tasks,
        "preset": _tasks,
    }
    return makers[options.kind](options, progress)


def _text(options: Options, progress: measuring.Progress) -> _Plan:
    how = TextOptions(whole=options.whole, max_length=options.max_length)
    places = None if options.positions is None else Positions(options.positions)
    files = documents.find_files(options.text)
    data = _described(files, progress)
    reading = measuring.Reading(
        files=files,
        digest=digest(each.digest or each.name for each in data),
        text_field=options.text_field or "text",
        limit=options.limit,
    )
    if places is not None:
        what = f"loss at positions 1 to {places.length:,} of long documents"
        return _Plan(what, lambda m, p: measuring.measure_positions(m, reading, places, p), data)
    what = f"bits per byte and perplexity, {how.protocol}"
    return _Plan(what, lambda m, p: measuring.measure_text(m, reading, how, p), data)


def _enwik8(options: Options, progress: measuring.Progress) -> _Plan:
    assert options.enwik8 is not None
    split: Split = options.split or "test"
    file = expanded(options.enwik8)
    enwik8.check(file)
    data = _described(documents.find_files([str(file)]), progress)
    how = TextOptions(whole=True, max_length=options.max_length)
    what = f"bits per character of enwik8, split {split}, {how.protocol}"
    mark, length = str(data[0].digest), options.max_length

    def measure(model: measuring.Model, progress: measuring.Progress) -> measuring.Found:
        return measuring.measure_enwik8(model, file, mark, split, length, progress)

    return _Plan(what, measure, data)


def _lambada(options: Options, progress: measuring.Progress) -> _Plan:
    assert options.lambada is not None
    file = expanded(options.lambada)
    examples = lambada.read_lambada(file, options.limit)
    data = _described(documents.find_files([str(file)]), progress)
    prefixes: Sequence[Prefix] = tuple(dict.fromkeys(options.prefix)) or tuple(PREFIXES)
    mark = str(data[0].digest)
    what = f"last words of {len(examples):,} passages of LAMBADA"

    def measure(model: measuring.Model, progress: measuring.Progress) -> measuring.Found:
        return measuring.measure_lambada(model, examples, mark, prefixes, progress)

    return _Plan(what, measure, data)


def _recall(options: Options, progress: measuring.Progress) -> _Plan:
    assert options.recall is not None
    source = None if options.source is None else expanded(options.source)
    named = None if source is None else str(source)
    drawn = [make_task(options.recall, each, named) for each in options.settings or ("",)]
    data = [] if source is None else _described(documents.find_files([str(source)]), progress)
    count = options.limit or _SEQUENCES
    prefix: Prefix = options.prefix[0] if options.prefix else "none"
    what = f"{count:,} sequences of {options.recall}, drawn with seed {options.seed or 0}"

    def measure(model: measuring.Model, progress: measuring.Progress) -> measuring.Found:
        return measuring.measure_recall(model, drawn, count, options.seed or 0, prefix, progress)

    return _Plan(what, measure, data)


def _tasks(options: Options, progress: measuring.Progress) -> _Plan:
    usual: Prefix = "newline" if options.preset else "none"
    tasks = TaskOptions(
        tasks=(*options.tasks, *(paper.TASKS if options.preset else ())),
        include_path=tuple(map(expanded, options.include_path)),
        lambada=None if options.lambada is None else expanded(options.lambada),
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        prefix=options.prefix[0] if options.prefix else usual,
        max_length=options.max_length,
        apply_chat_template=options.apply_chat_template,
        seed=options.seed,
        skip_missing=options.preset is not None,
    )
    beside = options.preset is not None

    def measure(model: measuring.Model, progress: measuring.Progress) -> measuring.Found:
        return measuring.measure_tasks(model, tasks, options.samples, beside, progress)

    return _Plan(f"benchmarks; {tasks.protocol}", measure, [], ("lm_eval",))


def _described(files: Sequence[Any], progress: measuring.Progress) -> list[Source]:
    total, done = sum(file.size for file in files), 0

    def more(count: int) -> None:
        nonlocal done
        done += count
        progress("checking files", done, total)

    return documents.describe(files, more)


# ---- measuring ------------------------------------------------------------------------------


def _measured(
    options: Options, plan: _Plan, out: Path | None, progress: measuring.Progress
) -> tuple[list[measuring.Found], list[Subject]]:
    found, subjects = [], []
    for number, (source, name) in enumerate(
        zip(options.models, names_of(options.models), strict=True)
    ):
        progress(f"loading {name}", 0, 0)
        engine, tokenizer = options.engine.load(source)
        say_device(engine.device)
        journal = None if out is None else _journal(out, number)
        model = measuring.Model(name, engine, tokenizer, journal)
        label = f"{name}: " if len(options.models) > 1 else ""
        found.append(plan.measure(model, _labeled(progress, label)))
        subjects.append(subject(name, engine, tokenizer))
    return found, subjects


def _labeled(progress: measuring.Progress, label: str) -> measuring.Progress:
    return lambda what, done, total: progress(label + what, done, total)


def _journal(out: Path, number: int) -> Path:
    """Where what is computed for a model is kept: a second one has a file of its own."""
    path = journal_path(out)
    return path.with_name(f"{path.name}-{number + 1}") if number else path


@contextmanager
def _progress() -> Iterator[measuring.Progress]:
    # The console holds the stream itself, because other libraries are silenced meanwhile.
    console = Console(file=sys.stderr)
    console.quiet = not console.is_terminal
    with progress_bar(console) as bar:
        task = bar.add_task("starting", total=None, note="")
        shown = ["starting"]

        def progress(what: str, done: float, total: float) -> None:
            if shown[0] != what:
                # Another kind of work begins, so the remaining time is estimated anew.
                shown[0] = what
                bar.reset(task, total=total or None, description=what, note="")
            bar.update(task, completed=done, total=total or None)

        yield progress


# ---- the result -----------------------------------------------------------------------------


def _result(
    options: Options,
    plan: _Plan,
    found: Sequence[measuring.Found],
    subjects: list[Subject],
    seconds: float,
) -> Result:
    notes = [note for each in found for note in each.notes]
    tokenizers = {each.about["tokenizer fingerprint"] for each in subjects}
    if len(tokenizers) > 1:
        notes.append(
            "the models have different tokenizers: bits per byte can be compared, and figures per "
            "token cannot"
        )
    return Result(
        kind=options.kind if options.positions is None else "positions",
        what=plan.what,
        models=subjects,
        data=plan.data,
        figures=_once(figure for each in found for figure in each.figures),
        curves=[curve for each in found for curve in each.curves],
        options=_asked(options),
        seed=options.seed,
        seconds=seconds,
        notes=list(dict.fromkeys(notes)),
        details={each.name: one.details for each, one in zip(subjects, found, strict=True)},
        versions=versions(*plan.packages),
    )


def _once(figures: Iterator[Figure]) -> list[Figure]:
    """The figures without repetitions, as of the paper's for several models."""
    found: list[Figure] = []
    for figure in figures:
        if figure not in found:
            found.append(figure)
    return found


def _asked(options: Options) -> dict[str, Any]:
    """The options that were given, in types of JSON."""
    given = {name: getattr(options, name) for name in (*KINDS, *ONLY)}
    kept = {name: value for name, value in given.items() if value not in (None, (), False, 0)}
    plain: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return plain


def _draw(result: Result, picture: Path) -> None:
    lines = [
        Line(str(curve.model), curve.x, curve.y, curve.low, curve.high) for curve in result.curves
    ]
    first = result.curves[0]
    draw_lines(lines, expanded(picture), x=first.x_name, y=first.y_name, title=first.interval)
