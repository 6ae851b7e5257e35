"""Figure 9: the loss of models whose embedding begins small, and of models where it does not."""

from __future__ import annotations

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
from receptance.reproduce.small_models import OnText, averaged, check_seeds, losses_of, over_seeds

_BOUND, _DEVIATION = 1e-4, 0.02
SMALL = "uniform in ±1e-4, layer norm"
NORMAL = "normal 0.02, layer norm"
BARE = "normal 0.02, no layer norm"
# What is early, and what the end: this share of the steps.
_EARLY, _END = 0.25, 0.1
# The curves have met if their distance at the end is less than this share of the early one.
_MET = 0.5


def small(model: Model, generator: torch.Generator) -> None:
    """The paper's: tiny, with the layer norm that every model has behind the embedding."""
    nn.init.uniform_(model.emb.weight, -_BOUND, _BOUND, generator=generator)


def normal(model: Model, generator: torch.Generator) -> None:
    """The usual deviation, with that layer norm."""
    nn.init.normal_(model.emb.weight, 0, _DEVIATION, generator=generator)


def bare(model: Model, generator: torch.Generator) -> None:
    """The usual deviation, without that layer norm."""
    normal(model, generator)
    model.blocks[0].ln0 = nn.Identity()


STARTS: dict[str, Callable[[Model, torch.Generator], None]] = {
    SMALL: small,
    NORMAL: normal,
    BARE: bare,
}
"""What is done to a model before its first step."""


@dataclass(frozen=True, kw_only=True)
class SmallInit(OnText):
    """Train the same model with a small embedding and with usual ones, and compare the losses."""

    NAME: ClassVar[str] = "small-init"
    SHOWS: ClassVar[str] = "Figure 9"
    CLAIM: ClassVar[str] = (
        "With an embedding that begins in ±1e-4 and a layer norm behind it, the loss falls faster "
        "early than with one of deviation 0.02; both end at about the same loss."
    )
    DOES: ClassVar[str] = (
        "trains a small model with either embedding, and with neither the small embedding nor the "
        "layer norm, on the same batches, with several seeds"
    )
    TAKES: ClassVar[tuple[str, str]] = ("1 to 2 minutes", "15 minutes")
    PARALLEL: ClassVar[bool] = True

    size: str = "64x4"
    """The model, as WIDTHxLAYERS."""
    steps: int = 1500
    """Updates of each run."""
    seeds: int = 3
    """Runs of each kind; they differ in starting values and in the order of the text."""
    learning_rate: float = 6e-4
    """The learning rate, which is constant; the paper's smallest model has 6e-4."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_size(self.size)
        check_seeds(self.seeds, self.steps)

    @classmethod
    def quick(cls) -> SmallInit:
        """A smaller model, and fewer steps."""
        return cls(size="32x2", steps=240, held_out=1 << 10)

    def pieces(self) -> list[Piece]:
        """Every start with every seed."""
        return [{"start": name, "seed": seed} for seed in range(self.seeds) for name in STARTS]

    def measure(self, piece: Piece, work: Work) -> dict[str, Any]:
        """Train one model."""
        corpus = self.corpus(work.folder)
        how = self.constant(self.steps, self.learning_rate, piece["seed"])
        training, model = self.training(self.job(self.size, corpus, how), corpus, work)
        with torch.no_grad():
            STARTS[piece["start"]](model, torch.Generator().manual_seed(piece["seed"]))
        return {
            "losses": losses_of(training, piece, work),
            "parameters": sum(x.numel() for x in model.parameters()),
            "source": asdict(self.source(corpus)),
        }

    def conclude(self, found: Sequence[tuple[Piece, Mapping[str, Any]]]) -> Found:
        """Compare the runs of each seed, early and at the end."""
        losses: dict[str, list[list[float]]] = {name: [] for name in STARTS}
        for piece, it in found:
            losses[piece["start"]].append(it["losses"])
        source = Source(**found[0][1]["source"])
        parameters = {piece["start"]: it["parameters"] for piece, it in found}
        return Found(
            checks=checks(losses[SMALL], losses[NORMAL]),
            models=[
                Subject(name=name, about={"parameters": n, "size": self.size})
                for name, n in parameters.items()
            ],
            data=[source],
            figures=[
                _figure(when, other, part)
                for other in (NORMAL, BARE)
                for when, part in zip(
                    ("early", "at the end"), differences(losses[SMALL], losses[other]), strict=True
                )
            ],
            curves=[
                *(_curve(name, some) for name, some in losses.items()),
                *(_more(name, losses) for name in (NORMAL, BARE)),
            ],
            caption=f"{self.size}, {self.seeds} seeds; {self.steps:,} steps of "
            f"{self.batch * self.context:,} tokens of {self.tokenizer} from {source.name}, "
            f"learning rate {self.learning_rate:g}, float32; bands are 95 % over seeds",
            notes=[
                "The paper says neither the size nor the data of its figure; it has 50,000 steps "
                f"of batch 400, where these runs have {self.steps:,} of {self.batch} rows.",
                "The paper's baseline may lack the layer norm as well, as the third curve does.",
            ],
        )


def differences(
    ours: Sequence[Sequence[float]], others: Sequence[Sequence[float]]
) -> tuple[Estimate, Estimate]:
    """How much more loss others have than ours, early and at the end; the runs are pairs."""
    steps = len(ours[0])
    early, end = max(1, round(_EARLY * steps)), steps - max(1, round(_END * steps))
    gaps = [[b - a for a, b in zip(*pair, strict=True)] for pair in zip(ours, others, strict=True)]
    parts = [
        [sum(gap[part]) / len(gap[part]) for gap in gaps]
        for part in (slice(early), slice(end, None))
    ]
    first, last = (mean(part, "pairs of runs") for part in parts)
    return first, last


def checks(ours: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> list[Check]:
    """The paper's two sentences, of losses at each step with the small and the usual embedding."""
    early, end = differences(ours, others)
    sure = early.low is not None and early.high is not None and early.low * early.high > 0
    return [
        Check(
            claim="The loss falls faster early.",
            rule=f"over the first {_EARLY:.0%} of the steps the mean loss is lower than with "
            "deviation 0.02, and the 95 % interval of the difference over seeds lies above 0.",
            found=f"The usual embedding has {early.value:.4f} nats per token more "
            f"({_range(early)}).",
            agrees=early.value > 0 if sure else None,
        ),
        Check(
            claim="Both end at about the same loss.",
            rule=f"over the last {_END:.0%} of the steps the difference is less than {_MET:g} of "
            "the early one. If it is not, the runs are too short to tell: no number of steps "
            "refutes this.",
            found=f"It has {end.value:.4f} more at the end ({_range(end)}).",
            agrees=True if abs(end.value) < _MET * abs(early.value) else None,
        ),
    ]


def _range(found: Estimate) -> str:
    return "one seed" if found.low is None else f"{found.low:.4f} to {found.high:.4f}"


def _figure(when: str, other: str, found: Estimate) -> Figure:
    return Figure(
        name=f"loss {when}, more than {SMALL}",
        value=found.value,
        low=found.low,
        high=found.high,
        interval=found.interval,
        model=other,
        unit="nats per token",
    )


def _more(name: str, losses: Mapping[str, Sequence[Sequence[float]]]) -> Curve:
    """How much more loss a start has than the small one, in pairs of runs on the same batches."""
    pairs = zip(losses[name], losses[SMALL], strict=True)
    gaps = [[b - a for b, a in zip(*pair, strict=True)] for pair in pairs]
    return over_seeds(f"loss more than {SMALL}", averaged(gaps), "nats per token", name)


def _curve(name: str, losses: Sequence[Sequence[float]]) -> Curve:
    return over_seeds("training loss", averaged(losses), "nats per token", name)
