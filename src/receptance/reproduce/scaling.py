"""Figure 4: loss against training compute, over a grid of models and numbers of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from receptance.evaluation.compare.options import parse_size
from receptance.evaluation.compare.training import HeldOut, Stopped, run_job, steps_done
from receptance.evaluation.results import Curve, Result, Source, Subject
from receptance.plots.panels import Line, Panel
from receptance.reproduce.experiment import Found, Piece, Work
from receptance.reproduce.power_law import (
    BEYOND,
    COMPUTE,
    EDGE,
    FITTED,
    LINE,
    LOSS,
    SLOPE,
    PowerLaw,
    curve,
    edge,
)
from receptance.reproduce.small_models import OnText, counts_of, tokenizer_of
from receptance.training.options import TrainOptions
from receptance.training.stopping import stop_requested

_FINAL_SHARE, _WARMUP_SHARE = 0.1, 0.02


@dataclass(frozen=True, kw_only=True)
class Scaling(OnText):
    """Train models of several sizes on several numbers of tokens, and fit a power law to the best.

    The runs are kept in the folder scaling: those of an earlier call, or of another machine, are
    taken as they are if model, options and text are the same.
    """

    NAME: ClassVar[str] = "scaling"
    SHOWS: ClassVar[str] = "Figure 4"
    CLAIM: ClassVar[str] = (
        "The loss of the best models is a straight line against training compute on logarithmic "
        "axes (r² = 0.994), which also holds for one more order of magnitude (r² = 0.875)."
    )
    DOES: ClassVar[str] = (
        "trains RWKV-4 of several sizes on several numbers of tokens, fits a line to the Pareto "
        "front without its last order of magnitude, and compares what the line says of that"
    )
    NEEDS: ClassVar[str] = "nothing; better with a text of a few million tokens"
    TAKES: ClassVar[tuple[str, str]] = ("1 to 2 minutes", "1 hour in two processes")
    PARALLEL: ClassVar[bool] = True

    sizes: tuple[str, ...] = ("32x2", "48x3", "64x3", "96x4", "128x5", "160x6")
    """Sizes, as WIDTHxLAYERS."""
    tokens: tuple[int, ...] = (1 << 18, 1 << 19, 1 << 20, 1 << 21, 1 << 22)
    """Tokens that runs read, repetitions included. Every size is trained on each number of them,
    from the beginning, with a schedule of that length."""
    most_flops: float = 0.0
    """Leave out runs that cost more than this; 0 means none."""
    rate: float = 0.8
    """The learning rate times the width. The paper's six recipes have 0.38 to 0.61; short runs want
    more."""
    highest_rate: float = 0.01
    """The highest learning rate, for narrow models."""
    factor: float = 10.0
    """Runs with more than 1/factor of the largest run's compute are held out of the fit."""
    seed: int = 0
    """Decides the starting values and the order of the text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for size in self.sizes:
            parse_size(size)
        for name in ("sizes", "tokens"):
            if not getattr(self, name) or len({*getattr(self, name)}) < len(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; name each once, at least one")
        step = self.batch * self.context
        if min(self.tokens) < step:
            raise ValueError(f"tokens has {min(self.tokens)}; a step alone reads {step}")
        if not (self.rate > 0 and self.highest_rate > 0 and self.factor > 1):
            raise ValueError("rate and highest_rate must be above 0, and factor above 1")

    @classmethod
    def quick(cls) -> Scaling:
        """Very small models, on less text; the smallest are trained for longest."""
        return cls(
            sizes=("16x2", "24x2", "32x3", "48x3"),
            tokens=(1 << 15, 1 << 16, 1 << 17, 1 << 18, 1 << 19),
            most_flops=2.25e11,
            held_out=1 << 14,
        )

    def pieces(self) -> list[Piece]:
        """Every size with every number of tokens, costly runs first: no process waits at the end.

        ValueError if most_flops leaves nothing.
        """
        found = [{"size": size, "tokens": n} for size in self.sizes for n in self.tokens]
        if self.most_flops:
            found = [piece for piece in found if self.cost(piece) <= self.most_flops]
        if not found:
            raise ValueError(f"no run costs at most most_flops, {self.most_flops:g}")
        return sorted(found, key=self.cost, reverse=True)

    def cost(self, piece: Piece) -> float:
        """The FLOPs of a run."""
        counted = counts_of(piece["size"], self.vocabulary(), self.context)
        return float(counted.training_flops * piece["tokens"])

    def measure(self, piece: Piece, work: Work) -> dict[str, Any]:
        """Train one model, or take what an earlier call found."""
        corpus = self.corpus(work.folder)
        job = self.job(piece["size"], corpus, self._how(piece))
        # The name of a run does not say how many tokens it reads.
        folder = work.folder / f"{piece['tokens']}-tokens"
        with stop_requested() as stop:

            def asked() -> bool:
                share = steps_done(folder, job) / job.train.total_steps
                work.note(f"{piece['size']}, {piece['tokens']:,} tokens", share)
                return stop.is_set()

            try:
                record = run_job(
                    job, corpus, tokenizer_of(corpus), folder, device=work.device, stop=asked
                )
            except Stopped:
                raise KeyboardInterrupt from None
        held = HeldOut(corpus, tokenizer_of(corpus), self.context, self.held_out)
        counted = counts_of(piece["size"], job.shape.vocab_size, self.context)
        lost = record.diverged is not None
        return {
            "loss": None if lost else sum(record.nats) / (len(held.text) - 1),
            "bits per byte": None if lost else record.bits_per_byte,
            "tokens": job.tokens,
            "parameters": counted.parameters,
            "flops": counted.training_flops * job.tokens,
            "learning rate": job.train.rates[0],
            "seconds": record.seconds,
            "machine": record.machine,
            "judged on": len(held.text) - 1,
            "source": asdict(self.source(corpus)),
        }

    def _how(self, piece: Piece) -> TrainOptions:
        steps = round(piece["tokens"] / (self.batch * self.context))
        rate = min(self.highest_rate, self.rate / parse_size(piece["size"])[0])
        return TrainOptions(
            steps=steps,
            batch=self.batch,
            context=self.context,
            packing="stream",
            learning_rate=rate,
            final_learning_rate=rate * _FINAL_SHARE,
            warmup_steps=round(steps * _WARMUP_SHARE),
            seed=self.seed,
        )

    def conclude(self, found: Sequence[tuple[Piece, Mapping[str, Any]]]) -> Found:
        """Find the front, fit the line to its lower part, and judge it by the rest."""
        runs = [(piece, it) for piece, it in found if it["loss"] is not None]
        by_size = _by_size(sorted(self.sizes, key=lambda x: _parameters(found, x)), runs)
        points = {str(x.model): list(zip(x.x, x.y, strict=True)) for x in by_size}
        law = PowerLaw([x for some in points.values() for x in some], self.factor, edge(points))
        source = Source(**found[0][1]["source"])
        sizes = {piece["size"]: it["parameters"] for piece, it in found}
        tokens = sorted({it["tokens"] for _, it in found})
        read = {
            size: [n for n in tokens if (size, n) in {(p["size"], it["tokens"]) for p, it in found}]
            for size in sizes
        }
        text = source.about["training tokens"]
        notes = [
            f"The learning rate is not searched for: it is {self.rate:g} over the width, and at "
            f"most {self.highest_rate:g}; here it is "
            f"{', '.join(f'{rate:g}' for rate in sorted({it['learning rate'] for _, it in found}))}"
            " at the start of the runs.",
            "Compute is counted, not timed: three times the forward FLOPs of a token, times the "
            "tokens. The paper has no table of its points, so that only the form is compared.",
        ]
        if tokens[-1] > text:
            notes.append(f"The text has {text:,} tokens; longer runs read it again.")
        notes += [
            f"{piece['size']} on {piece['tokens']:,} tokens diverged and has no point."
            for piece, it in found
            if it["loss"] is None
        ]
        return Found(
            checks=law.checks(),
            models=[
                Subject(name=size, about={"parameters": sizes[size], "tokens": read[size]})
                for size in self.sizes
                if size in sizes
            ],
            data=[source],
            figures=law.figures(),
            curves=[*by_size, *law.curves()],
            caption=f"{len(runs)} runs of {tokens[0]:,} to {tokens[-1]:,} tokens of "
            f"{self.tokenizer} from {source.name}, context {self.context}, float32; judged on "
            f"{found[0][1]['judged on']:,} held-out tokens",
            notes=notes,
            details={
                "runs": [
                    piece | {k: v for k, v in it.items() if k != "source"} for piece, it in found
                ]
            },
        )

    def panels(self, result: Result) -> list[Panel]:
        """All runs, those of a size joined, with the front and the line."""
        styles = {FITTED: "ro", BEYOND: "bs", EDGE: "b+", LINE: "k--"}
        lines = [
            Line(curve.model or curve.name, curve.x, curve.y, style=styles.get(curve.name, ".-"))
            for curve in result.curves
        ]
        slope = next((x for x in result.figures if x.name == SLOPE), None)
        fit = "" if slope is None else f": loss ~ compute^{slope.value:.4f}"
        return [
            Panel(
                title=f"Loss against compute{fit}",
                x=COMPUTE,
                y=LOSS,
                lines=lines,
                log_x=True,
                log_y=True,
            )
        ]


def _parameters(found: Sequence[tuple[Piece, Mapping[str, Any]]], size: str) -> int:
    return next((it["parameters"] for piece, it in found if piece["size"] == size), 0)


def _by_size(sizes: Sequence[str], runs: Sequence[tuple[Piece, Mapping[str, Any]]]) -> list[Curve]:
    """The runs of each size."""
    made = []
    for size in sizes:
        some = sorted(
            (it["flops"], it["loss"], it["tokens"]) for p, it in runs if p["size"] == size
        )
        if some:
            x, y, tokens = zip(*some, strict=True)
            made.append(curve(LOSS, zip(x, y, strict=True), size, tokens=list(tokens)))
    return made
