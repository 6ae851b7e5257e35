"""Appendix L: whether data after the question is answered better than data before it."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from receptance.engine.base import Engine
from receptance.engine.load import load_engine
from receptance.evaluation.benchmarks.prefix_tree import Request
from receptance.evaluation.benchmarks.prefixes import encode_pair
from receptance.evaluation.benchmarks.requests import score_requests
from receptance.evaluation.intervals import mean
from receptance.evaluation.results import Figure, Source, Subject
from receptance.reproduce.experiment import Check, Experiment, Found, Piece, Work
from receptance.storage.pairing import no_tokenizer
from receptance.tokenizer import Tokenizer

BEFORE, AFTER = "data first", "question first"
TEMPLATES = {
    BEFORE: "Having premise {premise} judge if the following hypothesis {hypothesis} is "
    'logically connected with the premise. Answer "entailment" if yes, or "not_entailment" if no.',
    AFTER: "Can you tell me if the hypothesis is entailment or is not entailment to the "
    "premise?\n\npremise: {premise}\nhypothesis: {hypothesis}",
}
"""The orders of the two prompts for RTE in appendix L: that of the study of ChatGPT, and RWKV's."""
_ANSWERS = (" entailment", " not_entailment")
_AT_ONCE = 32  # examples of a piece
_FIELDS = (("premise", "hypothesis"), ("sentence1", "sentence2"))


@dataclass(frozen=True, kw_only=True)
class PromptOrder(Experiment):
    """Score both answers to every example of RTE or WNLI, behind each of two prompts."""

    NAME: ClassVar[str] = "prompts"
    SHOWS: ClassVar[str] = "Appendix L, Tables 6 and 7"
    CLAIM: ClassVar[str] = (
        "An RNN cannot look back, so a prompt that asks first and gives the data afterwards is "
        "answered far better: RTE 74.8 instead of 44.2 F1. Its other tasks gain little or nothing: "
        "WNLI 49.3 instead of 47.9 % correct, GoEmotions 7.9 in both, PolEmo2 40.9 instead of 38.2."
    )
    DOES: ClassVar[str] = (
        "scores both labels of every example of a .jsonl file behind each of the two prompts, in "
        "batches"
    )
    NEEDS: ClassVar[str] = (
        "a .jsonl file of RTE or WNLI, and weights that were tuned on instructions, such as "
        "RWKV-4-Raven: others answer by chance, whatever the order"
    )
    TAKES: ClassVar[tuple[str, str]] = ("a minute", "hours for 14B on a CPU")
    READY: ClassVar[bool] = False

    model: str = ""
    """The model, as for `receptance generate`."""
    data: str = ""
    """A .jsonl file with premise, hypothesis and label, or sentence1, sentence2 and label."""
    entails: str = "entailment"
    """The label that means entailment; GLUE has 0 for RTE and 1 for WNLI."""
    limit: int | None = None
    """Take this number of examples from the beginning; all by default."""
    around: str = "Bob: {}\n\nAlice:"
    """What stands around a prompt; this is Raven's form of a chat, and {} is the prompt."""
    tokenizer: str | None = None
    """A tokenizer file, or "bytes", instead of the one beside the weights."""
    device: str = "auto"
    """Run here: cpu, cuda; auto takes a GPU where there is one."""

    def __post_init__(self) -> None:
        if "{}" not in self.around:
            raise ValueError(f"around is {self.around!r}; it needs {{}} where the prompt stands")
        if self.limit is not None and self.limit < 2:
            raise ValueError(f"limit is {self.limit}; give 2 or more")

    @classmethod
    def quick(cls) -> PromptOrder:
        """Few examples."""
        return cls(limit=64)

    def identity(self) -> dict[str, Any]:
        """The weights and the data."""
        engine, _ = _loaded(self, self.device)
        return {"weights": engine.fingerprint(), "digest": _digest(Path(self.data))}

    def pieces(self) -> list[Piece]:
        """Some examples behind one of the prompts, at a time."""
        if not self.model:
            raise ValueError("model is missing; name weights that were tuned on instructions")
        count = len(read_examples(Path(self.data), self.entails, self.limit))
        return [
            {"order": order, "from": at, "to": min(at + _AT_ONCE, count)}
            for order in TEMPLATES
            for at in range(0, count, _AT_ONCE)
        ]

    def measure(self, piece: Piece, work: Work) -> dict[str, Any]:
        """By how much each example says entailment rather than not, in nats."""
        engine, tokenizer = _loaded(self, work.device)
        examples = read_examples(Path(self.data), self.entails, self.limit)[
            piece["from"] : piece["to"]
        ]
        texts = [TEMPLATES[piece["order"]].format(**example.about) for example in examples]
        prompts = [self.around.replace("{}", text) for text in texts]
        pairs = [encode_pair(tokenizer, prompt, x) for prompt in prompts for x in _ANSWERS]
        scores = [0.0] * len(pairs)

        def keep(place: int, score: Any) -> None:
            scores[place] = score.log_probability

        score_requests(engine, [Request(*pair) for pair in pairs], keep)
        return {
            "margins": [yes - no for yes, no in zip(scores[::2], scores[1::2], strict=True)],
            "labels": [example.entailed for example in examples],
            "parameters": engine.config.num_parameters,
        }

    def conclude(self, found: Sequence[tuple[Piece, Mapping[str, Any]]]) -> Found:
        """Compare both orders on the same examples."""
        right: dict[str, list[float]] = {order: [] for order in TEMPLATES}
        said: dict[str, list[tuple[bool, bool]]] = {order: [] for order in TEMPLATES}
        for piece, it in found:
            pairs = [(m > 0, y) for m, y in zip(it["margins"], it["labels"], strict=True)]
            said[piece["order"]] += pairs
            right[piece["order"]] += [100.0 * (guess == label) for guess, label in pairs]
        name = Path(self.model).name
        figures = [f for order in TEMPLATES for f in _figures(name, order, right, said)]
        count = len(right[BEFORE])
        about = {"parameters": found[0][1]["parameters"]}
        return Found(
            checks=[_check(right)],
            models=[Subject(name=name, about=about)],
            data=[
                Source(
                    name=Path(self.data).name,
                    digest=_digest(Path(self.data)),
                    about={"examples": count},
                )
            ],
            figures=figures,
            caption=f"{count} examples of {Path(self.data).name}",
            notes=[
                "This means something for weights that were tuned on instructions alone; a base "
                "model may answer alike, or by chance, in both orders.",
                "The label with the higher probability is the answer, so that every answer is one; "
                "the paper reads what the model writes.",
            ],
        )


@dataclass(frozen=True)
class Example:
    """A pair of sentences, and whether the first entails the second."""

    about: Mapping[str, str]
    entailed: bool


def read_examples(path: Path, entails: str, limit: int | None = None) -> list[Example]:
    """The examples of a .jsonl file; ValueError names the line that is none."""
    if not path.is_file():
        raise ValueError(f"data is {path}, which is no file; name a .jsonl file of RTE or WNLI")
    lines = path.read_text(encoding="utf-8").splitlines()
    records = [(n, line) for n, line in enumerate(lines, start=1) if line.strip()][:limit]
    found = [_example(line, f"{path}, line {n}", entails) for n, line in records]
    if len({example.entailed for example in found}) < 2:
        raise ValueError(
            f"all {len(found)} examples of {path} have the same answer with entails={entails!r}; "
            "its labels must hold that value, and another"
        )
    return found


def _example(line: str, where: str, entails: str) -> Example:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    record = record if isinstance(record, dict) else {}
    for first, second in _FIELDS:
        texts = record.get(first), record.get(second)
        if all(isinstance(text, str) for text in texts) and "label" in record:
            about = {"premise": str(texts[0]), "hypothesis": str(texts[1])}
            return Example(about, str(record["label"]) == entails)
    raise ValueError(f"{where}: no premise, hypothesis and label, or sentence1, sentence2, label")


@functools.lru_cache(maxsize=1)
def _loaded(options: PromptOrder, device: str) -> tuple[Engine, Tokenizer]:
    if not options.model:
        raise ValueError("model is missing; name weights that were tuned on instructions")
    engine, tokenizer = load_engine(options.model, tokenizer=options.tokenizer, device=device)
    if tokenizer is None:
        raise no_tokenizer(engine.config, options.model)
    return engine, tokenizer


def _digest(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"data is {path}, which is no file; name a .jsonl file of RTE or WNLI")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def macro_f1(said: Sequence[tuple[bool, bool]]) -> float:
    """The mean over both answers of F1, in percent, of (answer, label)."""
    scores = []
    for answer in (True, False):
        hits = sum(guess == label == answer for guess, label in said)
        total = sum((guess == answer) + (label == answer) for guess, label in said)
        scores.append(2 * hits / total if total else 0.0)
    return 100 * sum(scores) / 2


def _figures(
    name: str,
    order: str,
    right: Mapping[str, Sequence[float]],
    said: Mapping[str, Sequence[tuple[bool, bool]]],
) -> Iterator[Figure]:
    accuracy, about = mean(right[order], "examples"), {"order": order}
    yield Figure(
        name="accuracy",
        value=accuracy.value,
        low=accuracy.low,
        high=accuracy.high,
        interval=accuracy.interval,
        unit="%",
        model=name,
        about=about,
    )
    yield Figure(name="macro F1", value=macro_f1(said[order]), unit="%", model=name, about=about)


def _check(right: Mapping[str, Sequence[float]]) -> Check:
    gain = mean(np.subtract(right[AFTER], right[BEFORE]), "examples, in pairs")
    assert gain.low is not None and gain.high is not None
    return Check(
        claim="The question first is answered better.",
        rule="the interval of the gain in accuracy, over pairs of answers to the same example, is "
        "above 0; below 0 it is refuted.",
        found=f"The gain is {gain.value:+.1f} points, {gain.low:+.1f} to {gain.high:+.1f}.",
        agrees=True if gain.low > 0 else False if gain.high < 0 else None,
    )
