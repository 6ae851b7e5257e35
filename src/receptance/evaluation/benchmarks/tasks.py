"""Options of benchmarks, and what lm-evaluation-harness says of them as a result's figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from receptance.data.templates import find_template
from receptance.evaluation.benchmarks.prefixes import PREFIXES, Prefix, prefix_ids
from receptance.evaluation.intervals import Estimate, exponential, share
from receptance.evaluation.results import Figure
from receptance.tokenizer import ByteTokenizer

# An interval of 95 % reaches so many standard errors.
_REACH = 1.96
# Metrics that are the share of documents with a right answer.
_SHARES = ("acc", "acc_norm", "acc_bytes", "exact_match")


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Which benchmarks are run, and how."""

    tasks: tuple[str, ...]
    """Names of tasks, groups or tags, patterns of these such as mmlu_*, or YAML files of tasks."""
    include_path: tuple[Path, ...] = ()
    """Folders with YAML files of one's own tasks, which come before those of the harness."""
    lambada: Path | None = None
    """A .jsonl file that the task lambada_openai reads instead of the data set of the hub."""
    num_fewshot: int | None = None
    """Examples in front of each question; None leaves it to the task."""
    limit: int | None = None
    """Take so many documents of each task."""
    prefix: Prefix = "none"
    """What stands before every context."""
    max_length: int | None = None
    """Read at most so many tokens of a context and its continuation, the last ones, as models with
    a limited context do; None reads all of them."""
    apply_chat_template: str | None = None
    """Lay contexts out as a chat by this template, such as world."""
    seed: int | None = None
    """The seed of examples and of drawn texts; None takes the harness's own, which are fixed."""
    skip_missing: bool = False
    """Leave out tasks that cannot be loaded, with a note, instead of stopping."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("tasks is empty; name a task, or a YAML file of one")
        for name in ("num_fewshot", "limit", "max_length"):
            value, least = getattr(self, name), int(name != "num_fewshot")
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if self.seed is not None and not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed is {self.seed}; it must be at least 0 and less than 2**32")
        if self.apply_chat_template is not None:
            find_template(self.apply_chat_template)
        prefix_ids(self.prefix, ByteTokenizer())
        for path in self.include_path:
            if not path.is_dir():
                raise ValueError(f"no folder {path}; set include_path to one with tasks in YAML")

    @property
    def protocol(self) -> str:
        """How contexts are read, in words for people who compare figures."""
        length = (
            "contexts of any length, with carried state"
            if self.max_length is None
            else f"windows of {self.max_length:,} tokens"
        )
        chat = self.apply_chat_template
        return f"{PREFIXES[self.prefix]}; {length}" + (f"; as a chat ({chat})" if chat else "")


@dataclass(frozen=True)
class TaskRun:
    """What the benchmarks found."""

    results: dict[str, Any]
    """The results as lm-evaluation-harness writes them."""
    tokens_read: int
    tokens_spared: int
    """The tokens of contexts that were not read again, because requests share them."""
    kept: int
    """The requests that an earlier run had answered."""
    missing: dict[str, str]
    """The tasks that could not be loaded, with the reason."""


def figures(results: Mapping[str, Any], model: str) -> list[Figure]:
    """Every metric of every task and group, with its interval."""
    found = []
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            name, _, kind = key.partition(",")
            if not kind or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{name}_stderr,{kind}")
            found.append(_figure(results, task, model, name, kind, float(value), error))
    return found


def _figure(
    results: Mapping[str, Any],
    task: str,
    model: str,
    name: str,
    kind: str,
    value: float,
    error: Any,
) -> Figure:
    count = results.get("n-samples", {}).get(task, {}).get("effective")
    found = Estimate(value, None, None, "")
    if name in _SHARES and count and 0 <= value <= 1:
        found = share(value, count)
    elif isinstance(error, int | float):
        found = _by_error(name, value, error)
    about = {
        "task": task,
        "filter": kind,
        "shots": results.get("n-shot", {}).get(task),
        "documents": count,
        "task version": results.get("versions", {}).get(task),
        "higher is better": results.get("higher_is_better", {}).get(task, {}).get(name),
    }
    return Figure(
        name=name,
        value=value,
        model=model,
        low=found.low,
        high=found.high,
        interval=found.interval,
        about=about,
    )


def _by_error(name: str, value: float, error: float) -> Estimate:
    """By a standard error; the interval of a perplexity is one of its logarithm, so positive."""
    interval = f"95 %, {_REACH} standard errors over documents"
    if name.endswith("perplexity") and value > 0:
        factor = exponential(_REACH * error / value)
        return Estimate(value, value / factor, value * factor, interval)
    return Estimate(value, value - _REACH * error, value + _REACH * error, interval)


def some_samples(results: Mapping[str, Any], count: int) -> dict[str, list[dict[str, Any]]]:
    """The first documents of each task: what was asked, what the model said, what was wanted."""
    samples: Mapping[str, Sequence[dict[str, Any]]] = results.get("samples") or {}
    names = ("doc_id", "arguments", "filtered_resps", "target")
    return {
        task: [
            {name: sample.get(name) for name in (*names, *sample.get("metrics", ()))}
            for sample in found[:count]
        ]
        for task, found in samples.items()
    }
