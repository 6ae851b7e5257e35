"""One training run of a comparison: what decides it, and the file with what it found."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from receptance.atomic import written
from receptance.errors import one_line
from receptance.evaluation.compare.families import Shape
from receptance.evaluation.compare.options import CompareOptions
from receptance.inference.measure import machine
from receptance.inference.scoring import bits_per_byte
from receptance.training.options import TrainOptions

FORMAT = "receptance-compare-run"
RUNS = "runs"


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that decides a run."""

    family: str
    shape: Shape
    train: TrainOptions
    corpus: str
    """The fingerprint of the tokens."""
    held_out: int
    """The most tokens on which the finished run is judged."""
    points: int
    """How often it is judged on an eighth of these tokens."""
    search: bool = False
    """Whether it belongs to the search for the learning rate."""

    @property
    def size(self) -> str:
        """Width and layers, as in the options."""
        return f"{self.shape.width}x{self.shape.layers}"

    @property
    def name(self) -> str:
        """The name of its folder and its file."""
        train = self.train
        purpose = "search" if self.search else f"seed{train.seed}"
        return f"{self.family}-{self.size}-{purpose}-lr{train.rates[0]:g}"

    @property
    def tokens(self) -> int:
        """The tokens that it reads."""
        return self.train.total_steps * self.train.batch * self.train.context

    def to_json(self) -> dict[str, Any]:
        """All fields as values of JSON."""
        found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return found


def make_job(
    options: CompareOptions,
    family: str,
    shape: Shape,
    corpus: str,
    rate: float,
    *,
    seed: int,
    search: bool,
) -> Job:
    """The run of one model at one learning rate; that of a search reads fewer tokens."""
    size = f"{shape.width}x{shape.layers}"
    tokens = options.tokens_of(size) * (options.sweep_share if search else 1)
    steps = max(1, round(tokens / (options.batch * options.context)))
    train = TrainOptions(
        steps=steps,
        batch=options.batch,
        context=options.context,
        packing="stream",
        learning_rate=rate,
        final_learning_rate=rate * options.final_share,
        warmup_steps=round(steps * options.warmup_share),
        weight_decay=options.weight_decay,
        clip=options.clip,
        max_logit_penalty=options.max_logit_penalty,
        dtype=options.dtype,
        seed=seed,
    )
    return Job(
        family=family,
        shape=shape,
        train=train,
        corpus=corpus,
        held_out=options.held_out,
        points=min(options.points, steps),
        search=search,
    )


@dataclass(frozen=True, kw_only=True)
class Point:
    """Where a run stood at one of its points."""

    tokens: int
    """The tokens that were read so far."""
    seconds: float
    """The seconds of training so far, without those of judging."""
    training: float
    """The mean loss of the steps since the last point, in nats per token."""
    bits_per_byte: float
    """The loss on an eighth of the text that is held out."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a run found."""

    name: str
    """The name of the job."""
    job: dict[str, Any]
    """The fields of the job."""
    points: list[Point] = field(default_factory=list)
    digest: str = ""
    """The chained sha256 of all batches in the order in which they were read."""
    nats: list[float] = field(default_factory=list)
    """The loss of each piece of the text that is held out, at the end."""
    byte_counts: list[int] = field(default_factory=list)
    """The bytes of each of these pieces."""
    carried: float | None = None
    """Bits per byte of the same text with a state that is carried from its beginning to its end;
    None for models without one."""
    seconds: float = 0.0
    """The seconds of training."""
    diverged: int | None = None
    """The step whose loss or gradient was not finite; the run ended there."""
    machine: dict[str, Any] = field(default_factory=machine)

    @property
    def bits_per_byte(self) -> float:
        """The loss on the text that is held out; infinite for a run that diverged."""
        if self.diverged is not None:
            return float("inf")
        return bits_per_byte(sum(self.nats), sum(self.byte_counts))

    def save(self, path: Path) -> None:
        """Write the record as a whole; ValueError if that is not possible."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        with one_line(path, "the run "), written(path) as file:
            file.write(json.dumps(content, indent=1, allow_nan=False).encode() + b"\n")

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read a record; ValueError if the file is none."""
        try:
            content = json.loads(path.read_bytes())
            if content.pop("format") != FORMAT:
                raise ValueError("it is of another kind")
            content["points"] = [Point(**point) for point in content["points"]]
            return cls(**content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is not a run of a comparison: {error}") from None


def finished(out: Path, job: Job) -> Record | None:
    """The record of a job that was done already.

    ValueError names what differs if a run of that name was another one.
    """
    path = out / RUNS / f"{job.name}.json"
    if not path.exists():
        return None
    record, wanted = Record.load(path), job.to_json()
    if record.job != wanted:
        before, now = _flat(record.job), _flat(wanted)
        name = next(n for n in {**before, **now} if before.get(n) != now.get(n))
        raise ValueError(
            f"{path} was made with {name} {before.get(name)}, not {now.get(name)}; give the "
            "options of that comparison, or another folder with out="
        )
    return record


def _flat(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields by name, those of inner tables among them."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        found |= value if isinstance(value, dict) else {name: value}
    return found
