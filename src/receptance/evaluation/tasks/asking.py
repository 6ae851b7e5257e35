"""Drawn tasks put to a language model as text, which was trained for none of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from receptance.engine.base import Engine
from receptance.evaluation.benchmarks.prefix_tree import Request
from receptance.evaluation.benchmarks.prefixes import Prefix, encode_pair, prefix_ids
from receptance.evaluation.benchmarks.requests import Progress, Scored, score_requests
from receptance.evaluation.intervals import share
from receptance.evaluation.journal import Journal
from receptance.evaluation.results import Curve, Figure
from receptance.evaluation.tasks.base import Task, draw
from receptance.tokenizer import Tokenizer

Asked = list[list[Scored]]
"""For each sequence, the scores of its answers."""
_NAME = "accuracy"


def ask(
    engine: Engine,
    tokenizer: Tokenizer,
    task: Task,
    count: int,
    *,
    prefix: Prefix = "none",
    seed: int = 0,
    journal: Journal | None = None,
    progress: Progress = lambda done, total: None,
) -> Asked:
    """Score the answers of so many sequences of the test split.

    Each answer is judged with all before it given, right ones included. What the journal has is not
    computed again. ValueError for an answer that the tokenizer joins with what precedes it.
    """
    spoken = task.spoken(draw(task, "test", count, (seed, 0)))
    places = [(row, k) for row, answers in enumerate(spoken) for k in range(len(answers))]
    named = {"task": task.name, **task.difficulty}
    scores: dict[tuple[int, int], Scored] = {}
    for record in [] if journal is None else journal.records:
        if record.get("of") == named:
            place = record["sequence"], record["answer"]
            scores[place] = Scored(record["log_probability"], record["greedy"])
    missing = [place for place in places if place not in scores]
    before = prefix_ids(prefix, tokenizer)
    requests = [_request(tokenizer, before, spoken[row], k) for row, k in missing]

    def keep(number: int, score: Scored) -> None:
        row, k = missing[number]
        scores[row, k] = score
        if journal is not None:
            journal.add({"of": named, "sequence": row, "answer": k, **vars(score)})

    score_requests(engine, requests, keep, progress)
    return [[scores[row, k] for k in range(len(spoken[row]))] for row in range(count)]


def _request(
    tokenizer: Tokenizer, prefix: list[int], pieces: Sequence[tuple[str, str]], number: int
) -> Request:
    read = "".join(itertools.chain.from_iterable(pieces[:number])) + pieces[number][0]
    context, answer = encode_pair(tokenizer, read, pieces[number][1])
    if not context or not answer:
        raise ValueError(
            f"this tokenizer joins the answer {pieces[number][1]!r} with what precedes it"
        )
    return Request([*prefix, *context], answer)


def figure(task: Task, asked: Asked, model: str) -> Figure:
    """The share of answers that are the likeliest in each of their tokens, over sequences."""
    each = [sum(score.greedy for score in row) / len(row) for row in asked]
    # Answers of one sequence depend on each other, so sequences are counted and not answers.
    found = share(sum(each) / len(each), len(each), "sequences").map(lambda x: 100 * x)
    return Figure(
        name=_NAME,
        value=found.value,
        model=model,
        unit="%",
        low=found.low,
        high=found.high,
        interval=found.interval,
        about={
            "task": task.name,
            **task.difficulty,
            "chance, %": 100 * task.chance,
            "sequences": len(asked),
            "answers in each": len(asked[0]),
        },
    )


def curves(tasks: Sequence[Task], figures: Sequence[Figure]) -> list[Curve]:
    """The accuracy against the one number in which several settings of a task differ."""
    numbers = [task.difficulty for task in tasks]
    varied = [name for name in numbers[0] if len({each[name] for each in numbers}) == len(numbers)]
    if len(tasks) < 2 or not varied:
        return []
    name = varied[0]
    points: list[tuple[Any, Figure]] = sorted(
        ((each[name], found) for each, found in zip(numbers, figures, strict=True)),
        key=lambda point: float(point[0]),
    )
    known = all(found.low is not None and found.high is not None for _, found in points)
    return [
        Curve(
            name=f"{tasks[0].name}: {_NAME} against {name}",
            x_name=name,
            x=[float(x) for x, _ in points],
            y_name="%",
            y=[found.value for _, found in points],
            model=figures[0].model,
            low=[float(found.low or 0) for _, found in points] if known else None,
            high=[float(found.high or 0) for _, found in points] if known else None,
            interval=points[0][1].interval if known else "",
        )
    ]
