"""What a model costs: seconds of a training step, seconds and memory per generated token."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from receptance.atomic import written
from receptance.data import TokenFiles
from receptance.errors import one_line
from receptance.evaluation.compare.families import Decoder, Shape
from receptance.evaluation.compare.options import FIRST_SEED, CompareOptions
from receptance.evaluation.compare.runs import make_job
from receptance.evaluation.compare.table import family
from receptance.evaluation.compare.training import Training
from receptance.inference.measure import NumberedTokens, machine, resident_bytes, seconds

COSTS = "costs"
# A context is read in pieces of this many tokens, so that no scores of all pairs exist.
_PIECE = 512
# The median of so many steps is taken, after some to warm up.
_STEPS, _WARM_UP = 24, 4
# So many steps of training are measured, after one to warm up.
_TRAINING_STEPS = 5


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a generated token costs after one context."""

    context: int
    seconds: float
    """The median over some tokens."""
    remembered: int
    """The bytes of the state, or of the cache of keys and values."""
    resident: int | None
    """The bytes of the whole process in RAM; None where the system is not Linux."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a model costs, measured with nothing else of the comparison running."""

    step: float
    """The seconds of a step of training: the fastest of some."""
    generation: list[Cost]
    """The costs of a generated token at all contexts."""
    machine: dict[str, Any] = field(default_factory=machine)


@dataclass(frozen=True)
class Measurement:
    """The model that is to be measured, in a process of its own."""

    model: Path
    """Its folder, which training alone does not need."""
    family: str
    shape: Shape
    options: CompareOptions
    device: str = "cpu"
    """Where it was trained. Tokens are generated on the CPU."""


def measure(work: Measurement) -> Costs:
    """All costs of a model. Training comes last: the memory of a process rarely shrinks."""
    generation = _generation(work)
    return Costs(step=step_seconds(work), generation=generation)


def step_seconds(work: Measurement) -> float:
    """The seconds of the fastest of some steps of training, on tokens drawn at random."""
    options, vocab_size = work.options, work.shape.vocab_size
    count = (_TRAINING_STEPS + 2) * options.batch * options.context + 1
    tokens = np.random.default_rng(FIRST_SEED).integers(vocab_size, size=count, dtype=np.uint32)
    tokenizer = NumberedTokens(vocab_size)
    corpus = TokenFiles(
        train=tokens,
        validation=tokens[: options.context + 1],
        train_mask=None,
        validation_mask=None,
        end_of_text=0,
        fingerprint="",
        tokenizer=tokenizer,
        path=Path(),
    )
    rate = options.learning_rates[0]
    job = make_job(options, work.family, work.shape, "", rate, seed=FIRST_SEED, search=False)
    training = Training(job, corpus, tokenizer, torch.device(work.device))
    training.run_step()
    return min(seconds(training.run_step) for _ in range(_TRAINING_STEPS))


def _generation(work: Measurement) -> list[Cost]:
    """The costs at all contexts, in ascending order."""
    decoder = family(work.family).decoder(work.model)
    found, read = [], 0
    for context in sorted(work.options.contexts):
        _read(decoder, read, context, work.shape.vocab_size)
        remembered = sum(x.nbytes for x in decoder.remembered)
        for _ in range(_WARM_UP):
            decoder.step()
        middle = statistics.median(seconds(decoder.step) for _ in range(_STEPS))
        read = context + _WARM_UP + _STEPS
        found.append(
            Cost(
                context=context,
                seconds=middle,
                remembered=remembered,
                resident=resident_bytes(),
            )
        )
    return found


def _read(decoder: Decoder, start: int, stop: int, vocab_size: int) -> None:
    """Read tokens up to a context; they are far apart in the embedding, as those of a text are."""
    for at in range(start, stop, _PIECE):
        places = torch.arange(at, min(at + _PIECE, stop))
        decoder.read((places + 1) * 7919 % vocab_size)


def stored(out: Path, name: str, contexts: Sequence[int]) -> Costs | None:
    """The costs that an earlier call measured at all of these contexts."""
    path = out / COSTS / f"{name}.json"
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
        content["generation"] = [Cost(**cost) for cost in content["generation"]]
        found = Costs(**content)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to measure again") from None
    wanted = [cost for cost in found.generation if cost.context in contexts]
    return replace(found, generation=wanted) if len(wanted) == len(contexts) else None


def store(out: Path, name: str, costs: Costs) -> None:
    """Keep the costs for later calls."""
    path = out / COSTS / f"{name}.json"
    with one_line(path, "the costs "):
        path.parent.mkdir(parents=True, exist_ok=True)
        with written(path) as file:
            file.write(json.dumps(asdict(costs), indent=1).encode() + b"\n")
