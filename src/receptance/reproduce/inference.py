"""Figures 7, 13 and 14: seconds and memory of generated text, RWKV against Transformers."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from receptance.evaluation.compare.families import Decoder
from receptance.evaluation.intervals import Line, fitted_line
from receptance.evaluation.results import Curve, Figure, Subject
from receptance.inference.measure import seconds
from receptance.model.devices import resolve_device
from receptance.reproduce.experiment import Check, Experiment, Found, Piece, Work
from receptance.reproduce.generators import (
    CACHE,
    NO_CACHE,
    RWKV,
    STATE,
    TRANSFORMERS,
    Precision,
    Setting,
    decoder,
    parameters,
    watched,
)
from receptance.reproduce.mechanisms import Counter

# A cost per token is constant if it grows by less than the first share over the run, and it grows
# if that is more than the second; between them nobody can say.
_CONSTANT, _GROWS = 0.1, 0.25
_WARM_UP = 8
TIME, STEP, MEMORY = "cumulative seconds", "seconds of a token", "memory"


@dataclass(frozen=True, kw_only=True)
class Inference(Experiment):
    """Cumulative seconds and peak memory against generated tokens, at the same size."""

    NAME: ClassVar[str] = "inference"
    SHOWS: ClassVar[str] = "Figures 7, 13 and 14"
    CLAIM: ClassVar[str] = (
        "RWKV generates text in time linear in its length and in constant memory; Transformers of "
        "its size take more than linear time and growing memory. The paper ran them without their "
        "KV cache."
    )
    DOES: ClassVar[str] = (
        "lets RWKV and transformers' GPT-NeoX, OPT, BLOOM and GPT-Neo of random weights generate "
        "text, with and without their KV cache, on a CPU or a GPU, and fits what a token costs"
    )
    NEEDS: ClassVar[str] = "transformers"
    TAKES: ClassVar[tuple[str, str]] = ("1 minute", "1.5 hours; minutes on a GPU")
    PACKAGES: ClassVar[tuple[str, ...]] = ("transformers",)

    width: int = 768
    """Channels of all models."""
    layers: int = 12
    """Layers of all models; an even number."""
    vocabulary: int = 50277
    """Size of the vocabulary."""
    tokens: int = 512
    """Number of tokens that are generated."""
    windows: int = 16
    """Number of parts of the run, in each of which the median step counts."""
    dtypes: tuple[Precision, ...] = ("float32",)
    """Types of the weights; the paper has float32. int8 is for RWKV alone."""
    device: str = "auto"
    """Run here: cpu, cuda; auto takes a GPU where there is one."""

    def __post_init__(self) -> None:
        if self.windows < 3 or self.tokens < 2 * self.windows:
            raise ValueError(
                f"windows is {self.windows}; wanted 3 or more, of at least 2 of the {self.tokens} "
                "tokens each"
            )
        if self.layers < 2 or self.layers % 2:
            raise ValueError(f"layers is {self.layers}; GPT-Neo needs an even number")

    @classmethod
    def quick(cls) -> Inference:
        """Small models, and a text that is long for them."""
        return cls(width=128, layers=4, vocabulary=512, tokens=256, windows=8)

    def pieces(self) -> list[Piece]:
        """Every model in every way of remembering and every precision."""
        found = []
        for dtype in self.dtypes:
            found.append({"model": RWKV, "how": STATE, "dtype": dtype})
            if dtype != "int8":
                ways = [(model, how) for how in (NO_CACHE, CACHE) for model in TRANSFORMERS]
                found += [{"model": model, "how": how, "dtype": dtype} for model, how in ways]
        return found

    def cost(self, piece: Piece) -> float:
        """Reading all again takes as often as long as there are tokens, but for the overhead."""
        return 1 + self.tokens / 64 if piece["how"] == NO_CACHE else 2

    def measure(self, piece: Piece, work: Work) -> dict[str, Any]:
        """Generate once for the time and once for the memory."""
        setting = self._setting(piece["dtype"], work.device)
        named = piece["model"], piece["how"], setting
        return {
            **timed(decoder(*named), self.tokens, self.windows, self.vocabulary, work),
            "bytes": remembered(*watched(*named), self.tokens, self.windows, setting),
            "parameters": parameters(piece["model"], setting),
            "device": str(resolve_device(work.device)),
        }

    def _setting(self, dtype: Precision, device: str) -> Setting:
        return Setting(
            width=self.width,
            layers=self.layers,
            vocabulary=self.vocabulary,
            positions=self.tokens + 2 * _WARM_UP + 2,
            device=device,
            dtype=dtype,
        )

    def conclude(self, found: Sequence[tuple[Piece, Mapping[str, Any]]]) -> Found:
        """Fit the cost of a token in every run."""
        runs = [_Run(piece, it) for piece, it in found]
        names = {run.piece["model"]: run.found["parameters"] for run in runs}
        first = [run for run in runs if run.piece["dtype"] == self.dtypes[0]]
        return Found(
            checks=list(_checks(first)),
            models=[
                Subject(name=n, about={"parameters": x, "D": self.width, "L": self.layers})
                for n, x in names.items()
            ],
            figures=[figure for run in runs for figure in run.figures()],
            curves=[curve for what in (TIME, STEP, MEMORY) for curve in _curves(runs, what)],
            caption=f"{self.tokens} generated tokens of one row, random weights, vocabulary "
            f"{self.vocabulary:,}, {', '.join(self.dtypes)}, on {runs[0].found['device']}",
            notes=[
                "Memory is what a model remembers of the text, and the most that one step makes on "
                "top, logits included; weights are not counted. On a CPU the tensors that torch "
                "makes are counted, on a GPU what its allocator gives.",
                "The paper's script calls transformers without a KV cache, so that a token costs "
                "as much as reading the whole text. Its memory of RWKV is a sum over 512 tokens, "
                "that of the others the last token's; here all are those of a single token.",
                *_cached(first),
            ],
        )


@dataclass(frozen=True)
class _Run:
    """One model that has generated a text in one way."""

    piece: Piece
    found: Mapping[str, Any]

    @property
    def name(self) -> str:
        how = f", {self.piece['how']}" if self.piece["model"] != RWKV else ""
        return f"{self.piece['model']}{how}"

    def line(self, what: str) -> Line:
        """The line through what a token costs, over the tokens that were there before."""
        return fitted_line(self.found["tokens"], self.found[what], "parts of the run")

    def growth(self, what: str) -> float:
        """By which share a token costs more in the last part of the run than in the first."""
        first, *_, last = self.found[what]
        return float(last / first - 1)

    def figures(self) -> Iterator[Figure]:
        about = {"dtype": self.piece["dtype"], "remembers by": self.piece["how"]}
        for what, unit, scale in (("step", "ms", 1e3), ("bytes", "kB", 1e-3)):
            line = self.line(what)
            named = "time" if what == "step" else "memory"
            low, high = line.slope.low, line.slope.high
            model = self.piece["model"]
            yield Figure(
                name=f"{named} of the first token",
                value=line.at(self.found["tokens"][0]) * scale,
                unit=unit,
                model=model,
                about=about,
            )
            yield Figure(
                name=f"{named} on top per 1,000 tokens",
                value=line.slope.value * 1000 * scale,
                low=None if low is None else low * 1000 * scale,
                high=None if high is None else high * 1000 * scale,
                interval=line.slope.interval,
                unit=unit,
                model=model,
                about=about,
            )
        yield Figure(
            name="all tokens", value=self.found["seconds"][-1], unit="s", model=model, about=about
        )


def timed(
    generator: Decoder, tokens: int, windows: int, vocabulary: int, work: Work
) -> dict[str, Any]:
    """Seconds of all steps: cumulative at the end of each part, and the median step within it."""
    generator.read(_ids(1, vocabulary, work.device))
    for _ in range(_WARM_UP):
        _timed_step(generator, work.device)
    ends, total, steps = _ends(tokens, windows), 0.0, list[float]()
    found: dict[str, Any] = {"tokens": ends, "seconds": [], "step": []}
    for n in range(1, tokens + 1):
        steps.append(_timed_step(generator, work.device))
        total += steps[-1]
        if n in ends:
            found["seconds"].append(total)
            found["step"].append(statistics.median(steps))
            steps.clear()
            work.note(f"{n} tokens", (n / tokens) ** 2)
    return found


def _timed_step(generator: Decoder, device: str) -> float:
    def step() -> None:
        generator.step()
        if device != "cpu":
            torch.cuda.synchronize(device)

    return seconds(step)


def remembered(
    generator: Decoder, model: nn.Module, tokens: int, windows: int, setting: Setting
) -> list[int]:
    """The bytes that the model remembers, and that one step makes on top, after each part."""
    found, read = [], 0
    for end in _ends(tokens, windows):
        generator.read(_ids(end - read, setting.vocabulary, setting.device))
        read = end + 1
        held = sum(x.nbytes for x in generator.remembered)
        if setting.device == "cpu":
            given = [*model.parameters(), *model.buffers(), *generator.remembered]
            with Counter(given) as counter:
                generator.step()
            found.append(held + counter.most)
        else:
            torch.cuda.reset_peak_memory_stats(setting.device)
            before = torch.cuda.memory_allocated(setting.device)
            generator.step()
            found.append(held + torch.cuda.max_memory_allocated(setting.device) - before)
    return found


def _ends(tokens: int, windows: int) -> list[int]:
    return [tokens * (n + 1) // windows for n in range(windows)]


def _ids(count: int, vocabulary: int, device: str) -> Tensor:
    return torch.arange(1, count + 1, device=device) * 7919 % vocabulary


def _curves(runs: Sequence[_Run], what: str) -> Iterator[Curve]:
    field, unit = {TIME: ("seconds", "s"), STEP: ("step", "s"), MEMORY: ("bytes", "bytes")}[what]
    for run in runs:
        yield Curve(
            name=what,
            x_name="generated tokens",
            x=[float(n) for n in run.found["tokens"]],
            y_name=unit,
            y=[float(x) for x in run.found[field]],
            model=run.name,
            about={"remembers by": run.piece["how"], "dtype": run.piece["dtype"]},
        )


def _checks(runs: Sequence[_Run]) -> Iterator[Check]:
    """What the figures show: of RWKV, of the Transformers as the paper ran them, of both."""
    ours = next(run for run in runs if run.piece["model"] == RWKV)
    theirs = [run for run in runs if run.piece["how"] == NO_CACHE]
    for what, word in (("step", "time"), ("bytes", "memory")):
        grown = ours.growth(what)
        yield Check(
            claim=f"The {word} of a token of RWKV does not depend on how many there were.",
            rule=f"from the first part of the run to the last it grows by less than "
            f"{_CONSTANT:.0%}.",
            found=f"It grows by {grown:+.1%} over {ours.found['tokens'][-1]} tokens.",
            agrees=grown < _CONSTANT or (None if grown < _GROWS else False),
        )
        least = min(run.growth(what) for run in theirs)
        yield Check(
            claim=f"The {word} of a token of a Transformer without its cache grows.",
            rule=f"from the first part of the run to the last it grows by more than "
            f"{_GROWS:.0%} in each.",
            found="; ".join(f"{x.piece['model']} {x.growth(what):+.0%}" for x in theirs) + ".",
            agrees=least > _GROWS or (None if least > _CONSTANT else False),
        )
    totals = {run.piece["model"]: run.found["seconds"][-1] for run in theirs}
    mine = ours.found["seconds"][-1]
    yield Check(
        claim="In all RWKV takes less time than each of them.",
        rule="its cumulative seconds at the end of the run are the least.",
        found=f"RWKV {mine:.3g} s; {'; '.join(f'{n} {x:.3g} s' for n, x in totals.items())}.",
        agrees=mine < min(totals.values()),
    )


def _cached(runs: Sequence[_Run]) -> Iterator[str]:
    """What the paper does not show: the same with caches."""
    ours = next(run for run in runs if run.piece["model"] == RWKV)
    for run in runs:
        if run.piece["how"] == CACHE:
            yield (
                f"With its KV cache {run.piece['model']} takes {run.found['seconds'][-1]:.3g} s "
                f"(RWKV {ours.found['seconds'][-1]:.3g} s); a token costs "
                f"{run.growth('step'):+.0%} at the end, and {run.growth('bytes'):+.0%} of memory."
            )
