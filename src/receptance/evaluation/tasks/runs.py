"""One training run of a comparison on a task, in a folder of its own, and what it found.

A run that was stopped goes on from its newest checkpoint, and one that has ended is not repeated:
the folder's name says everything that decides the result.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from receptance.atomic import written
from receptance.config import ModelConfig
from receptance.data.labeled import Examples
from receptance.errors import one_line
from receptance.evaluation.tasks.transformer import Transformer
from receptance.model.devices import resolve_device
from receptance.model.heads import Answering, Pooling, SequenceConfig
from receptance.model.sequences import SequenceModel
from receptance.model.versions import VERSIONS
from receptance.storage.sequences import write_sequence_description
from receptance.training.labeled import LabeledTrainer, Score
from receptance.training.labeled_run import LabeledRun, LabeledStart
from receptance.training.options import StartOptions, TrainOptions
from receptance.training.run import RunOptions

OUTCOME = "outcome.json"
TRANSFORMER = "transformer"
_RWKV = re.compile(r"rwkv(\d+(?:\.\d+)?)")
# The normal distribution's quantile of a 95 % interval.
_NORMAL = 1.959964


@dataclass(frozen=True, kw_only=True)
class Spec:
    """All that decides a run: its data, its model, its training."""

    task: dict[str, Any]
    """What tells the examples from others, as `Examples.about` does."""
    model: str
    """rwkv4 or another version, or transformer."""
    width: int
    layers: int
    pooling: Pooling = "mean"
    """What the head sees of a whole sequence; questions about positions have one each."""
    bidirectional: bool = False
    train: TrainOptions

    @property
    def folder(self) -> str:
        """The name of the run's folder."""
        rate, seed = self.train.rates[0], self.train.seed
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"{self.model}-{self.width}-lr{rate:g}-seed{seed}-{digest[:10]}"

    def sizes(self, examples: Examples) -> SequenceConfig:
        """The sizes and form of the run's model."""
        problem, found = examples.problem, _RWKV.fullmatch(self.model)
        return SequenceConfig(
            stack=ModelConfig(
                version=float(found[1]) if found else 4,
                vocab_size=problem.vocab_size,
                width=self.width,
                num_layers=self.layers,
            ),
            outputs=problem.outputs,
            channels=problem.channels,
            pooling="every" if problem.every else self.pooling,
            bidirectional=self.bidirectional,
            pairs=problem.pairs,
        )

    def build(self, examples: Examples) -> Answering:
        """A new model, its starting values drawn from the seed."""
        sizes, seed = self.sizes(examples), self.train.seed
        if self.model == TRANSFORMER:
            return Transformer(sizes, seed=seed)
        return SequenceModel(sizes, seed=seed, embedding_bound=self.train.rates[0])


def check_models(names: Sequence[str]) -> None:
    """ValueError names a model that does not exist, and those that do."""
    known = [*(f"rwkv{number}" for number in sorted(VERSIONS)), TRANSFORMER]
    for name in names:
        if name not in known:
            raise ValueError(f"no model {name!r}; there are {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a trained model made of one set of held-out examples."""

    about: dict[str, Any]
    """What tells these examples from others, such as their length."""
    value: float
    """Accuracy, or mean squared error."""
    low: float
    high: float
    examples: int
    interval: str
    absolute: float | None = None
    """The mean absolute error of numbers."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run found."""

    validation: float
    """The mean over the validation part, by which learning rates are chosen."""
    tested: list[Measured]
    parameters: int
    state: int
    """The numbers that are kept of the longest test sequence of the trained difficulty."""
    steps: int
    seconds: float
    seconds_per_step: float

    def save(self, path: Path) -> None:
        """Write the outcome as JSON."""
        with one_line(path), written(path) as file:
            file.write(json.dumps(asdict(self), indent=1).encode())

    @classmethod
    def load(cls, path: Path) -> Outcome:
        """Read an outcome; ValueError if the file is none."""
        try:
            fields = json.loads(path.read_bytes())
            tested = [Measured(**entry) for entry in fields.pop("tested")]
            return cls(tested=tested, **fields)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} is not the outcome of a run: {error}; remove it to run again"
            ) from None


def outcome_of(
    spec: Spec,
    examples: Examples,
    further: Sequence[Examples],
    out: Path,
    device: str,
    console: Console,
) -> Outcome:
    """Train, or read what an earlier call found, and test on the examples and on further ones.

    KeyboardInterrupt after Ctrl-C, when the run is saved; the same call then goes on.
    """
    folder = out / spec.folder
    if (folder / OUTCOME).exists():
        return Outcome.load(folder / OUTCOME)
    with one_line(folder):
        folder.mkdir(parents=True, exist_ok=True)
    model = spec.build(examples).to(resolve_device(device))
    trainer = LabeledTrainer(model, examples, spec.train)

    def describe(place: Path) -> None:
        write_sequence_description(model.config, place, {"task": spec.task, "model": spec.model})

    options = StartOptions(train=spec.train, device=device)
    start = LabeledStart(trainer, options, describe, {"spec": asdict(spec)})
    run = LabeledRun(folder, RunOptions(reports=1), start, console).restored()
    if not run.go():
        raise KeyboardInterrupt
    tested = [_tested(trainer, part) for part in (examples, *further)]
    length = max(batch.inputs.shape[1] for batch in examples.held_out("test", 64))
    found = Outcome(
        validation=trainer.score("validation").mean,
        tested=tested,
        parameters=model.num_parameters,
        state=model.state_size(length),
        steps=trainer.step,
        seconds=trainer.seconds,
        seconds_per_step=trainer.seconds / max(1, trainer.step),
    )
    found.save(folder / OUTCOME)
    return found


def _tested(trainer: LabeledTrainer, examples: Examples) -> Measured:
    own, trainer.examples = trainer.examples, examples
    try:
        found = trainer.score("test")
    finally:
        trainer.examples = own
    low, high, interval = interval_of(found, examples.problem.kind)
    return Measured(
        about=dict(examples.about),
        value=found.mean,
        low=low,
        high=high,
        examples=len(found.examples),
        interval=interval,
        absolute=found.absolute,
    )


def interval_of(found: Score, kind: str) -> tuple[float, float, str]:
    """The 95 % interval over examples, and its name.

    That of an accuracy is Wilson's. Examples with several answers have a smaller variance than it
    assumes, so there it is too wide rather than too narrow.
    """
    count = len(found.examples)
    what = f"95 % over {count:,} examples"
    if kind == "classify":
        return *wilson(found.mean, count), what
    error = float(found.examples.std(ddof=1)) / math.sqrt(count) if count > 1 else math.inf
    return found.mean - _NORMAL * error, found.mean + _NORMAL * error, what


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of so many examples."""
    z = _NORMAL**2 / count
    center = (share + z / 2) / (1 + z)
    reach = math.sqrt(z * share * (1 - share) + z * z / 4) / (1 + z)
    return max(0.0, center - reach), min(1.0, center + reach)
