"""Figures 7, 13 and 14: seconds and memory of generated text, RWKV against Transformers."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from receptance.evaluation.compare.families import Decoder
from receptance.evaluation.compare.options import parse_size
from receptance.evaluation.results import Result, Subject
from receptance.inference.measure import seconds
from receptance.model.devices import resolve_device
from receptance.plots.panels import Panel
from receptance.reproduce.experiment import Experiment, Found, Piece, Work
from receptance.reproduce.generators import (
    CACHE,
    NO_CACHE,
    RWKV,
    STATE,
    TORCH,
    TRANSFORMERS,
    Precision,
    Setting,
    decoder,
    parameters,
    runs_by,
    watched,
)
from receptance.reproduce.inference_runs import Run, checks, curves, panels, with_caches
from receptance.reproduce.mechanisms import Counter

_WARM_UP = 8


@dataclass(frozen=True, kw_only=True)
class Inference(Experiment):
    """Cumulative seconds and peak memory against generated tokens, at several sizes."""

    NAME: ClassVar[str] = "inference"
    SHOWS: ClassVar[str] = "Figures 7, 13 and 14"
    CLAIM: ClassVar[str] = (
        "RWKV generates text in time linear in its length and in constant memory; Transformers of "
        "its size take more than linear time and growing memory. The paper ran them without their "
        "KV cache."
    )
    DOES: ClassVar[str] = (
        "lets RWKV and transformers' GPT-NeoX, OPT, BLOOM and GPT-Neo of random weights generate "
        "text at several sizes, with and without their KV cache, on a CPU or a GPU, and looks at "
        "what a token costs"
    )
    NEEDS: ClassVar[str] = "transformers"
    TAKES: ClassVar[tuple[str, str]] = ("1 to 2 minutes", "2 hours; minutes on a GPU")
    PACKAGES: ClassVar[tuple[str, ...]] = ("transformers",)

    sizes: tuple[str, ...] = ("256x4", "512x8", "768x12")
    """Sizes of all models, as WIDTHxLAYERS with an even number of layers, from small to large."""
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
        if not self.dtypes or self.dtypes[0] == "int8":
            raise ValueError(
                f"dtypes is {self.dtypes}; wanted first one that transformers run as well, such as "
                "float32"
            )
        if not self.sizes or len({*self.sizes}) < len(self.sizes):
            raise ValueError(f"sizes is {self.sizes}; name each once, at least one")
        for size in self.sizes:
            if parse_size(size)[1] % 2:
                raise ValueError(f"sizes has {size}; GPT-Neo needs an even number of layers")

    @classmethod
    def quick(cls) -> Inference:
        """Small models, and a text that is long for them."""
        return cls(sizes=("64x2", "128x4", "192x4"), vocabulary=512, tokens=256, windows=8)

    def pieces(self) -> list[Piece]:
        """Every model in every way of remembering and every precision."""
        found = []
        for dtype in self.dtypes:
            ways = [(RWKV, STATE)]
            if dtype != "int8":
                ways += [(RWKV, TORCH)]
                ways += [(model, how) for how in (NO_CACHE, CACHE) for model in TRANSFORMERS]
            found += [
                {"model": model, "how": how, "size": size, "dtype": dtype}
                for size in self.sizes
                for model, how in ways
            ]
        return found

    def cost(self, piece: Piece) -> float:
        """Reading all again takes as often as long as there are tokens, but for the overhead."""
        width, layers = parse_size(piece["size"])
        again = self.tokens / 64 if piece["how"] == NO_CACHE else 1
        return 1 + again * width**2 * layers / 128**2

    def measure(self, piece: Piece, work: Work) -> dict[str, Any]:
        """Generate once for the time and once for the memory."""
        setting = self._setting(piece, work.device)
        named = piece["model"], piece["how"], setting
        generator = decoder(*named)
        return {
            **timed(generator, self.tokens, self.windows, self.vocabulary, work),
            "bytes": remembered(*watched(*named), self.tokens, self.windows, setting),
            "runs by": runs_by(generator),
            "parameters": parameters(piece["model"], setting),
            "device": str(resolve_device(work.device)),
        }

    def _setting(self, piece: Piece, device: str) -> Setting:
        width, layers = parse_size(piece["size"])
        return Setting(
            width=width,
            layers=layers,
            vocabulary=self.vocabulary,
            positions=self.tokens + 2 * _WARM_UP + 2,
            device=device,
            dtype=piece["dtype"],
        )

    def conclude(self, found: Sequence[tuple[Piece, Mapping[str, Any]]]) -> Found:
        """What a token costs in every run."""
        runs = [Run(piece, it) for piece, it in found]
        first = [run for run in runs if run.piece["dtype"] == self.dtypes[0]]
        sizes = {(x.piece["model"], x.piece["size"]): x.found["parameters"] for x in first}
        largest = [run for run in first if run.piece["size"] == self.sizes[-1]]
        return Found(
            checks=list(checks(first, self.sizes)),
            models=[
                Subject(name=f"{model} {size}", about={"parameters": count})
                for (model, size), count in sizes.items()
            ],
            figures=[figure for run in runs for figure in run.figures()],
            curves=list(curves(runs)),
            caption=f"{self.tokens} generated tokens of one row, random weights, vocabulary "
            f"{self.vocabulary:,}, {', '.join(self.dtypes)}, on {runs[0].found['device']}; sizes "
            "are channels and layers",
            notes=[
                "A point is the median of a part of the run, whose last token it names.",
                "Memory is the most that a model remembers of the text and makes in one step, "
                "logits included; weights are not counted. On a CPU the tensors that torch makes "
                "are counted, on a GPU what its allocator gives. RWKV's is that of plain torch.",
                "The paper's script calls transformers without a KV cache, so that a token costs "
                "as much as reading the whole text. Its memory of RWKV is a sum over 512 tokens, "
                "that of the others the last token's; here all are those of a single token.",
                *with_caches(largest),
            ],
        )

    def panels(self, result: Result) -> list[Panel]:
        """The largest size over its tokens, then all sizes."""
        return list(panels(result.curves, self.sizes[-1]))


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
    """The most bytes of what the model remembers and one step makes, after each part."""
    found, read = [], 0
    weights = [*model.parameters(), *model.buffers()]
    for end in _ends(tokens, windows):
        generator.read(_ids(end - read, setting.vocabulary, setting.device))
        read = end + 1
        if setting.device == "cpu":
            with Counter(weights, generator.remembered) as counter:
                generator.step()
            found.append(counter.most)
        else:
            held = sum(x.nbytes for x in generator.remembered)
            torch.cuda.reset_peak_memory_stats(setting.device)
            before = torch.cuda.memory_allocated(setting.device)
            generator.step()
            found.append(held + torch.cuda.max_memory_allocated(setting.device) - before)
    return found


def _ends(tokens: int, windows: int) -> list[int]:
    return [tokens * (n + 1) // windows for n in range(windows)]


def _ids(count: int, vocabulary: int, device: str) -> Tensor:
    return torch.arange(1, count + 1, device=device) * 7919 % vocabulary
