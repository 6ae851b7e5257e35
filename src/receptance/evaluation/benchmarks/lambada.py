"""LAMBADA: the last word of a passage, by three protocols that give three numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from receptance.engine.base import Engine
from receptance.evaluation.benchmarks.prefix_tree import Request
from receptance.evaluation.benchmarks.prefixes import Prefix, encode_pair, prefix_ids
from receptance.evaluation.benchmarks.requests import Progress, Scored, score_requests
from receptance.evaluation.intervals import Estimate, exponential, mean, share
from receptance.evaluation.journal import Journal
from receptance.evaluation.results import Figure
from receptance.tokenizer import Tokenizer

_WHAT = "examples"
# The task lambada_openai of lm-evaluation-harness 0.4.13 without its data set.
_TASK: dict[str, Any] = {
    "task": "lambada_openai",
    "output_type": "loglikelihood",
    "test_split": "test",
    "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
    "doc_to_target": "{{' '+text.split(' ')[-1]}}",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ],
    "metadata": {"version": 1.0},
}


def read_lambada(path: Path, limit: int | None = None) -> list[tuple[str, str]]:
    """The examples of a .jsonl file with a field `text`: what comes before the last word, and it.

    They are cut at the last space, which belongs to the word, as in the task `lambada_openai` of
    lm-evaluation-harness. ValueError names the line that has no such text.
    """
    if not path.is_file():
        raise ValueError(f"no file {path}; LAMBADA is read from a .jsonl file with a field text")
    found: list[tuple[str, str]] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if len(found) == limit:
                break
            if line.strip():
                found.append(_example(line, f"{path}, line {number}"))
    if not found:
        raise ValueError(f"{path} has no examples; give a .jsonl file with a field text")
    return found


def _example(line: bytes, where: str) -> tuple[str, str]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"{where}: no text in a field text; LAMBADA has one in every line")
    before, space, word = text.rpartition(" ")
    if not before.strip() or not word:
        raise ValueError(f"{where}: {text[:40]!r} has no last word behind a space")
    return before, space + word


def local_task(file: Path) -> dict[str, Any]:
    """The harness's task lambada_openai on a local file. ValueError if there is no such file."""
    if not file.is_file():
        raise ValueError(f"no file {file}; lambada is a .jsonl file with a field text")
    data = {"test": str(file.resolve())}
    return _TASK | {"dataset_path": "json", "dataset_kwargs": {"data_files": data}}


def score_lambada(
    engine: Engine,
    tokenizer: Tokenizer,
    examples: Sequence[tuple[str, str]],
    prefix: Prefix,
    *,
    journal: Journal | None = None,
    progress: Progress = lambda done, total: None,
) -> list[Scored]:
    """The score of every example's last word, by one protocol.

    What the journal has is not computed again. ValueError for a word without a token of its own.
    """
    scores: dict[int, Scored] = {}
    for record in [] if journal is None else journal.records:
        if record.get("prefix") == prefix:
            scores[record["example"]] = Scored(record["log_probability"], record["greedy"])
    missing = [number for number in range(len(examples)) if number not in scores]
    before = prefix_ids(prefix, tokenizer)
    requests = [_request(tokenizer, before, *examples[number], number) for number in missing]

    def keep(place: int, score: Scored) -> None:
        scores[missing[place]] = score
        if journal is not None:
            journal.add({"prefix": prefix, "example": missing[place], **vars(score)})

    score_requests(engine, requests, keep, progress)
    return [scores[number] for number in range(len(examples))]


def _request(
    tokenizer: Tokenizer, prefix: list[int], context: str, word: str, number: int
) -> Request:
    before, after = encode_pair(tokenizer, context, word)
    if not after or not before:
        raise ValueError(
            f"example {number + 1}: this tokenizer joins {word!r} with what precedes it"
        )
    return Request([*prefix, *before], after)


def figures(scores: Sequence[Scored], prefix: Prefix, model: str) -> list[Figure]:
    """Perplexity per example, exp(-mean log-probability of the word), and accuracy in percent."""
    losses = mean([-score.log_probability for score in scores], _WHAT)
    greedy = sum(score.greedy for score in scores) / len(scores)
    right = share(greedy, len(scores), _WHAT).map(lambda x: 100 * x)
    about: dict[str, Any] = {"task": "lambada", "prefix": prefix}
    named: list[tuple[str, str, Estimate]] = [
        ("perplexity", "", losses.map(exponential)),
        ("accuracy", "%", right),
    ]
    return [
        Figure(
            name=name,
            value=each.value,
            model=model,
            unit=unit,
            low=each.low,
            high=each.high,
            interval=each.interval,
            about=about,
        )
        for name, unit, each in named
    ]


def details(scores: Sequence[Scored]) -> dict[str, Any]:
    """The score of every example."""
    return {
        "log-probability": np.round([score.log_probability for score in scores], 6).tolist(),
        "greedy": [score.greedy for score in scores],
    }
