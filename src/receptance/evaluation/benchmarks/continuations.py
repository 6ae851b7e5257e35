"""Texts that are continued as a benchmark asks, with a common beginning read once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from receptance.engine.base import Engine
from receptance.inference.batching import Slots
from receptance.inference.generation import prefill
from receptance.inference.rows import Request, Token
from receptance.inference.sampling import Sampling
from receptance.state import State
from receptance.tokenizer import Tokenizer

# So many texts are continued at a time.
_ROWS, _ROWS_ELSEWHERE = 16, 128
# A common beginning of fewer tokens is not worth a call of its own.
_LEAST_SHARED = 8
# Names that transformers, OpenAI and others have for the same argument, the preferred one first.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_USUAL_LENGTH = 256
# Arguments that name what is done here anyway.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {"num_beams": (1,), "num_return_sequences": (1,)}
_SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty")


@dataclass(frozen=True)
class Continuation:
    """A text to continue, as tokens, and how."""

    prompt: Sequence[int]
    """At least one token."""
    request: Request
    group: str
    """The task: texts of one group may have a common beginning."""


def generation_options(arguments: Mapping[str, Any], seed: int) -> Request:
    """How to continue a text, from the generation arguments of lm-evaluation-harness.

    The text is drawn only if do_sample is true, or a temperature above 0 is given without it, as in
    `normalize_gen_kwargs` of the harness. ValueError for an argument that has no effect here.
    """
    left = dict(arguments)
    until = left.pop("until", None) or ()
    stop = [until] if isinstance(until, str) else list(until)
    lengths = [left.pop(name, None) for name in _LENGTHS]
    longest = next((int(length) for length in lengths if length is not None), _USUAL_LENGTH)
    drawn = left.pop("do_sample", None)
    sampling = {name: left.pop(name) for name in _SAMPLING if left.get(name) is not None}
    temperature = float(sampling.pop("temperature", 1.0 if drawn else 0.0))
    if drawn is False:
        temperature = 0.0
    unknown = [name for name, value in left.items() if value not in _NEUTRAL.get(name, (None,))]
    if unknown:
        raise ValueError(
            f"the task sets {unknown[0]} to {left[unknown[0]]!r} for generation, which has no "
            f"effect here; known are until, do_sample, {', '.join((*_SAMPLING, *_LENGTHS))}"
        )
    return Request(
        sampling=Sampling(temperature=temperature, **sampling),
        max_tokens=longest,
        stop=[text for text in stop if text],
        seed=seed,
        log_probabilities=False,
    )


def continue_texts(
    engine: Engine,
    tokenizer: Tokenizer,
    wanted: Sequence[Continuation],
    found: Callable[[int, str], object],
) -> tuple[int, int]:
    """Continue all texts; found is told the number and the continuation of each as it ends.

    Each equals the continuation of the text alone. The result is how many tokens of prompts were
    read, and how many were spared because a group has a common beginning.
    """
    order = sorted(range(len(wanted)), key=lambda number: wanted[number].group)
    read = spared = 0
    for _, numbers in groupby(order, key=lambda number: wanted[number].group):
        group = list(numbers)
        prompts = [wanted[number].prompt for number in group]
        shared = common_length(prompts)
        state: State | None = None
        if len(group) > 1 and shared >= _LEAST_SHARED:
            _, state = prefill(engine, [prompts[0][:shared]])
        else:
            shared = 0
        read += sum(map(len, prompts)) - shared * (len(group) - 1)
        spared += shared * (len(group) - 1)
        waiting = ((n, wanted[n].prompt[shared:], wanted[n].request) for n in group)
        _run(engine, tokenizer, waiting, state, found)
    return read, spared


def _run(
    engine: Engine,
    tokenizer: Tokenizer,
    waiting: Iterator[tuple[int, Sequence[int], Request]],
    state: State | None,
    found: Callable[[int, str], object],
) -> None:
    rows = _ROWS if engine.device.type == "cpu" else _ROWS_ELSEWHERE
    slots = Slots(engine, tokenizer, rows)
    numbers: dict[int, int] = {}
    texts: dict[int, str] = {}
    while True:
        while slots.free > len(slots.waiting) and (next_one := next(waiting, None)):
            number, prompt, request = next_one
            row = slots.admit(prompt, request, state=state)
            numbers[row], texts[row] = number, ""
        if not (slots.active or slots.waiting):
            return
        for token in slots.step():
            texts[token.row] += _text(token)
        for row in slots.left:
            found(numbers.pop(row), texts.pop(row))


def _text(token: Token) -> str:
    if token.finish_reason == "error":
        raise ValueError("the model's logits are not numbers; its weights are damaged")
    return token.text


def common_length(prompts: Sequence[Sequence[int]]) -> int:
    """The length of the common beginning of all prompts, which leaves each a token at least."""
    first, last = min(prompts, key=list), max(prompts, key=list)
    most = min(map(len, prompts)) - 1
    pairs = zip(first[:most], last[:most], strict=True)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), max(0, most))
