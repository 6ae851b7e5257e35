"""Appendix E: the starting values that the paper prints, against those of the official code."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from receptance.evaluation.compare.options import parse_size
from receptance.evaluation.intervals import Estimate, mean
from receptance.evaluation.results import Curve, Figure, Source, Subject
from receptance.model import Model
from receptance.reproduce.experiment import Check, Found, Piece, Work
from receptance.reproduce.small_models import (
    OnText,
    averaged,
    check_seeds,
    losses_of,
    over_seeds,
    shape_of,
)

CODE, PRINTED = "official code", "appendix E as printed"
# The shares of the steps whose mean loss is compared.
_END = 0.1


def code(model: Model, generator: torch.Generator) -> None:
    """A new model has these values."""


def printed(model: Model, generator: torch.Generator) -> None:
    """The last matrix of both parts is normal with deviation √(d/s), where d = 4s; others are 0.

    Vectors, layer norms, embedding and head stay as they are.
    """
    config = model.config
    deviation = math.sqrt(config.ffn_width / config.width)
    for name, matrix in matrices(model).items():
        if name.endswith(config.architecture.residual_outputs):
            nn.init.normal_(matrix, 0, deviation, generator=generator)
        else:
            nn.init.zeros_(matrix)


STARTS: dict[str, Callable[[Model, torch.Generator], None]] = {CODE: code, PRINTED: printed}
"""What is done to a new model before its first step."""


def matrices(model: Model) -> dict[str, nn.Parameter]:
    """All matrices of the blocks, by the number of the block and their name in it."""
    return {
        f"{layer}.{name}": block.get_parameter(f"{name}.weight")
        for layer, block in enumerate(model.blocks)
        for name in model.config.architecture.matrices
    }


@dataclass(frozen=True, kw_only=True)
class Initialization(OnText):
    """Train the same model from both kinds of starting values, and look at every gradient."""

    NAME: ClassVar[str] = "initialization"
    SHOWS: ClassVar[str] = "Appendix E"
    CLAIM: ClassVar[str] = (
        "A model that begins near the identity, with most matrices zero, trains well (section "
        "3.4): W_o and W'_v are normal with deviation √(d/s), and all other matrices are zero."
    )
    DOES: ClassVar[str] = (
        "trains a small model from the printed values and from those of the official code, and "
        "looks at the gradient of every matrix at every step"
    )
    TAKES: ClassVar[tuple[str, str]] = ("1 minute", "10 minutes")
    PARALLEL: ClassVar[bool] = True

    size: str = "64x4"
    """The model, as WIDTHxLAYERS."""
    steps: int = 1500
    """Updates of each run."""
    seeds: int = 3
    """Runs of each kind; they differ in starting values and in the order of the text."""
    learning_rate: float = 4e-3
    """The learning rate, which is constant."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_size(self.size)
        check_seeds(self.seeds, self.steps)

    @classmethod
    def quick(cls) -> Initialization:
        """A smaller model, and fewer steps."""
        return cls(size="32x2", steps=300, held_out=1 << 10)

    def pieces(self) -> list[Piece]:
        """Both starts with every seed."""
        return [{"start": name, "seed": seed} for seed in range(self.seeds) for name in STARTS]

    def measure(self, piece: Piece, work: Work) -> dict[str, Any]:
        """Train one model, and keep the norm of the gradient of each matrix at each step."""
        corpus = self.corpus(work.folder)
        how = self.constant(self.steps, self.learning_rate, piece["seed"])
        training, model = self.training(self.job(self.size, corpus, how), corpus, work)
        with torch.no_grad():
            STARTS[piece["start"]](model, torch.Generator().manual_seed(piece["seed"]))
        watched = matrices(model)
        before = {name: x.detach().clone() for name, x in watched.items()}
        norms: dict[str, list[float]] = {name: [] for name in watched}

        def look() -> None:
            for name, x in watched.items():
                norms[name].append(0.0 if x.grad is None else float(x.grad.norm()))

        return {
            "losses": losses_of(training, piece, work, look),
            "largest": {name: max(some) for name, some in norms.items()},
            "moved": {name: not torch.equal(x, before[name]) for name, x in watched.items()},
            "parts": {part: averaged([_sums(norms, part)])[1][0] for part in ("att", "ffn")},
            "parameters": sum(x.numel() for x in model.parameters()),
            "source": asdict(self.source(corpus)),
        }

    def conclude(self, found: Sequence[tuple[Piece, Mapping[str, Any]]]) -> Found:
        """Name the matrices that never learn, and compare the losses."""
        runs = {name: [it for piece, it in found if piece["start"] == name] for name in STARTS}
        source = Source(**found[0][1]["source"])
        counted = shape_of(self.size, 1)
        gap = difference(*([it["losses"] for it in runs[name]] for name in (CODE, PRINTED)))
        lifeless = {name: dead(some) for name, some in runs.items()}
        s, d = counted.width, counted.ffn_width
        return Found(
            checks=checks(lifeless, gap, self.steps),
            headline="the recipe that the paper prints stops channel mixing from ever learning, "
            "and the official code does not have it"
            if lifeless[PRINTED] and not lifeless[CODE]
            else "",
            models=[
                Subject(
                    name=name,
                    about={"parameters": some[0]["parameters"], "size": self.size},
                )
                for name, some in runs.items()
            ],
            data=[source],
            figures=[_more(gap), *_largest(runs)],
            curves=[
                *(_losses(name, [it["losses"] for it in some]) for name, some in runs.items()),
                *(_gradients(name, some) for name, some in runs.items()),
            ],
            caption=f"{self.size}, {self.seeds} seeds; {self.steps:,} steps of "
            f"{self.batch * self.context:,} tokens of {self.tokenizer} from {source.name}, "
            f"learning rate {self.learning_rate:g}, float32; bands are 95 % over seeds",
            notes=[
                f"Here s = {s} and d = {d}, so that the deviation √(d/s) is {math.sqrt(d / s):g}.",
                "Runs of one seed read the same batches, so that their difference is surer than "
                "the bands of the curves, which contain what batches and seeds have in common.",
                "The name of a matrix is its block, counted from 0, its part (att: time mixing, "
                "ffn: channel mixing) and the matrix in it.",
                "Why: with W'_k = 0 the argument of relu² is 0, where relu² and its derivative "
                "are 0. Nothing flows through channel mixing then, forward or backward.",
                "Slip: the code does nearly the reverse of what appendix E prints. Its output "
                "matrices are zero; W_v and W'_k are orthogonal. docs/starting-values.md has all.",
                "Only the matrices differ here. Appendix E also prints ½ before the power in the "
                "mix of receptance, where the code has it in the exponent.",
            ],
        )


def _sums(norms: Mapping[str, Sequence[float]], part: str) -> list[float]:
    """The norm at each step of the gradient of all matrices of a part: "att" or "ffn"."""
    some = [values for name, values in norms.items() if name.split(".")[1] == part]
    return [math.hypot(*column) for column in zip(*some, strict=True)]


def dead(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The matrices that had no gradient at any step, and have not moved, in any of the runs."""
    names = runs[0]["largest"]
    return [n for n in names if all(it["largest"][n] == 0 and not it["moved"][n] for it in runs)]


def difference(ours: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> Estimate:
    """How much more loss others have at the end; the runs are pairs of one seed."""
    last = max(1, round(_END * len(ours[0])))
    ends = [[sum(run[-last:]) / last for run in runs] for runs in (ours, others)]
    return mean([b - a for a, b in zip(*ends, strict=True)], "pairs of runs")


def checks(dead: Mapping[str, Sequence[str]], gap: Estimate, steps: int) -> list[Check]:
    """What is printed, and what section 3.4 promises."""
    some = {name: ", ".join(names) for name, names in dead.items()}
    low = -math.inf if gap.low is None else gap.low
    found = (
        "Every matrix has a gradient."
        if not dead[PRINTED]
        else (
            f"At each of {steps:,} steps the gradient is exactly 0 for {some[PRINTED]}, which stay "
            "as they were."
        )
    )
    return [
        Check(
            claim="Appendix E prints starting values to train from.",
            rule="from these values every matrix has a gradient at some step.",
            found=found,
            agrees=not dead[PRINTED],
        ),
        Check(
            claim="A model that begins near the identity with most matrices zero trains well; "
            "taken are the values of the official code.",
            rule="every matrix has a gradient at some step, and the loss at the end is below that "
            f"of the printed values: the 95 % interval over seeds of the last {_END:.0%} of the "
            "steps lies above 0.",
            found=f"{'Without a gradient: ' + some[CODE] if dead[CODE] else 'All learn'}. The "
            f"printed values have {gap.value:.4f} nats per token more"
            + ("." if gap.low is None else f" ({gap.low:.4f} to {gap.high:.4f})."),
            agrees=False if dead[CODE] or gap.value < 0 else True if low > 0 else None,
        ),
    ]


def _more(gap: Estimate) -> Figure:
    return Figure(
        name=f"loss at the end, more than {CODE}",
        value=gap.value,
        low=gap.low,
        high=gap.high,
        interval=gap.interval,
        model=PRINTED,
        unit="nats per token",
    )


def _largest(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Figure]:
    """The largest gradient of each matrix over all steps and runs."""
    return [
        Figure(
            name="largest norm of the gradient",
            value=max(it["largest"][matrix] for it in some),
            model=name,
            about={"matrix": matrix},
        )
        for name, some in runs.items()
        for matrix in some[0]["largest"]
    ]


def _losses(name: str, losses: Sequence[Sequence[float]]) -> Curve:
    return over_seeds("training loss", averaged(losses), "nats per token", name)


def _gradients(name: str, runs: Sequence[Mapping[str, Any]]) -> Curve:
    places, _ = averaged([it["losses"] for it in runs])
    parts = [it["parts"]["ffn"] for it in runs]
    return over_seeds("gradient of channel mixing", (places, parts), "norm", name)
