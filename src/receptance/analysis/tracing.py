"""Causal tracing: where in the model, and at which token, a fact passes through.

The procedure is that of ROME (Meng et al., arXiv 2202.05262, section 2.1), as in figure 11 of the
RWKV paper. A clean run finds the right answer. A corrupted run reads the subject with noise on its
embeddings, and loses the answer. Then the clean value of one place is put back into the corrupted
run, and what returns of the answer shows what passes through that place.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from receptance.analysis.hooks import patch, record
from receptance.analysis.notebook import image, row_of_figures
from receptance.evaluation.results import Curve, Figure, Result, Subject
from receptance.model import Model
from receptance.plots.panels import draw_heat_map
from receptance.tokenizer import Tokenizer
from receptance.tokenizer.base import to_bytes

_POSITIONS = 1 << 12  # positions that one call reads, over all rows

OUTPUT = "output"
"""The place that is the residual stream after a block."""
EVERYTHING = "output and state"
"""The place that is the output of a block together with its whole state, as in the paper."""
NOTE = (
    "In a causal trace noise is a multiple of the deviation of all embeddings. Probabilities are "
    "averaged over the samples, as in ROME, and then their logarithm is taken."
)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What a causal trace found, in nats: logarithms of the probability of the answer."""

    tokens: list[int]
    texts: list[str]
    """The text of each token, for axes."""
    subject: list[int]
    """The positions whose embeddings were corrupted."""
    answer: int
    clean: float
    corrupted: float
    restored: dict[str, Tensor]
    """[L,T] by place: the answer when that layer's place was restored after that token."""
    noise: float
    """The deviation of the noise, in multiples of the deviation of the embeddings."""
    samples: int

    def strongest(self, place: str) -> tuple[int, int]:
        """The layer and the token at which restoring a place brings most of the answer back."""
        restored = self.restored[place]
        layer, token = divmod(int(restored.argmax()), restored.shape[1])
        return layer, token

    def draw(self, place: str, picture: Path) -> None:
        """Draw the heat map of a place as a PNG, tokens from top to bottom (see plots)."""
        marked = [t + " *" if i in self.subject else t for i, t in enumerate(self.texts)]
        draw_heat_map(
            self.restored[place].T.tolist(),
            marked,
            [str(i + 1) for i in range(len(self.restored[place]))],
            picture,
            title=f"{place} restored after one token; clean {self.clean:.2f}, corrupted "
            f"{self.corrupted:.2f}, noise {self.noise:g} deviations, {self.samples} samples",
            row_name="token (* corrupted)",
            column_name="layer",
            unit="log p(answer), nats",
        )

    def curves(self, name: str) -> list[Curve]:
        """The trace of the model of this name as curves over layers, one for each token."""
        return [
            Curve(
                name=f"log p(answer), {place} restored",
                x_name="layer",
                x=[float(i + 1) for i in range(len(values))],
                y_name="nats",
                y=values[:, t].tolist(),
                model=name,
                about={"place": place, "position": t, "token": text},
            )
            for place, values in self.restored.items()
            for t, text in enumerate(self.texts)
        ]

    def figures(self, name: str) -> list[Figure]:
        """The answer in the clean and in the corrupted run of the model of this name."""
        return [
            Figure(name=f"log p(answer), {run} run", value=value, unit="nats", model=name)
            for run, value in (("clean", self.clean), ("corrupted", self.corrupted))
        ]

    def result(self, model: Model, name: str, *, seed: int | None = None) -> Result:
        """The trace in the form that all results have; seed is that of the generator."""
        return Result(
            kind="causal trace",
            what="where the answer to a prompt passes through the model",
            models=[
                Subject(name=name, fingerprint=model.fingerprint(), about=model.config.to_dict())
            ],
            figures=self.figures(name),
            curves=self.curves(name),
            options={"noise": self.noise, "samples": self.samples, "subject": self.subject},
            seed=seed,
            notes=[NOTE],
            details={"tokens": self.tokens, "texts": self.texts, "answer": self.answer},
        )

    def _repr_html_(self) -> str:
        head = (
            f"log p(answer): clean {self.clean:.2f}, corrupted {self.corrupted:.2f}. Rows are "
            f"layers, columns the tokens {' | '.join(self.texts)}"
        )
        maps = {place: image(values) for place, values in self.restored.items()}
        return f"<p>{html.escape(head)}</p>{row_of_figures(maps)}"


class Tracer:
    """The runs of one causal trace; `causal_trace` makes all of them.

    Whoever wants to stop and resume calls `restored` for one place and layer after another. With
    a generator of the same seed the noise is the same.
    """

    def __init__(
        self,
        model: Model,
        tokens: Tensor,
        subject: Sequence[int],
        answer: int,
        *,
        generator: torch.Generator,
        noise: float = 3.0,
        samples: int = 10,
    ) -> None:
        _check(model, tokens, subject, answer, noise, samples)
        self._model, self._tokens, self._answer = model, tokens, answer
        self._samples = samples
        self.places = places(model)
        with torch.no_grad(), record(model, "emb", "blocks.*.resid_post", "blocks.*.state.*") as c:
            features, _ = model.features(tokens[None])
            self.clean = self._mean(features)
        self._cache = c
        shape = samples, len(subject), model.config.width
        drawn = torch.randn(shape, generator=generator).to(model.device)
        spread = noise * model.emb.weight.detach().float().std(correction=0)
        self._emb = c["emb"].repeat(samples, 1, 1)
        self._emb[:, list(subject)] += (spread * drawn).to(self._emb.dtype)
        self.corrupted = self._run(1)

    def restored(self, place: str, layer: int) -> Tensor:
        """log p(answer) with the place of a layer restored after each token in turn, [T]."""
        time = len(self._tokens)
        at_once = max(1, _POSITIONS // (time * self._samples))
        pieces = []
        for positions in torch.arange(time).split(at_once):
            where = torch.zeros(len(positions), self._samples, time, dtype=torch.bool)
            where[torch.arange(len(positions)), :, positions] = True
            names = [f"blocks.{layer}.{name}" for name in self.places[place]]
            with self._written(names, where.flatten(0, 1).to(self._model.device)):
                pieces.append(self._run(len(positions)))
        return torch.cat(pieces)

    @torch.no_grad()
    def _run(self, repeats: int) -> Tensor:
        """log p(answer) of `repeats` corrupted runs of all samples, [repeats]."""
        with patch(self._model, "emb", self._emb.repeat(repeats, 1, 1)):
            rows = self._tokens.expand(repeats * self._samples, -1)
            features, _ = self._model.features(rows)
        return self._mean(features)

    def _mean(self, features: Tensor) -> Tensor:
        """The logarithm of the mean probability over every so many rows as there are samples."""
        logits = self._model.head(features[:, -1]).float()
        found = logits.log_softmax(-1)[:, self._answer].view(-1, min(len(logits), self._samples))
        return (found.logsumexp(1) - math.log(found.shape[1])).cpu()

    @contextmanager
    def _written(self, names: list[str], where: Tensor) -> Iterator[None]:
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(patch(self._model, name, self._cache[name], where=where))
            yield


def causal_trace(
    model: Model,
    tokens: Tensor,
    subject: Sequence[int],
    answer: int,
    *,
    generator: torch.Generator,
    noise: float = 3.0,
    samples: int = 10,
    only: Sequence[str] | None = None,
    texts: Sequence[str] | None = None,
    note: Callable[[int], object] = lambda done: None,
) -> Trace:
    """Restore each place of each layer after each token of a prompt [T], one at a time.

    subject are the positions whose embeddings get normal noise of `noise` times the deviation of
    all embeddings, drawn from the generator once and used in all runs. answer is the id that should
    follow the prompt. only chooses some of the `places(model)`: OUTPUT, the parts of the state, and
    EVERYTHING. texts label the tokens. note is called with 1 after each layer of each place.

    Numbers of a state that mean nothing alone are restored together. ValueError for arguments that
    do not fit.
    """
    tracer = Tracer(
        model, tokens, subject, answer, generator=generator, noise=noise, samples=samples
    )
    chosen = list(tracer.places if only is None else only)
    if wrong := [place for place in chosen if place not in tracer.places]:
        raise ValueError(f"there is no place {wrong[0]!r}; there are {', '.join(tracer.places)}")
    restored = {}
    for place in chosen:
        rows = []
        for layer in range(model.config.num_layers):
            rows.append(tracer.restored(place, layer))
            note(1)
        restored[place] = torch.stack(rows)
    return Trace(
        tokens=tokens.tolist(),
        texts=list(map(str, tokens.tolist())) if texts is None else list(texts),
        subject=list(subject),
        answer=answer,
        clean=float(tracer.clean),
        corrupted=float(tracer.corrupted),
        restored=restored,
        noise=noise,
        samples=samples,
    )


def subject_positions(subject: str, tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """The tokens that hold any byte of the subject, where it first stands in the text.

    ValueError if the text does not hold it.
    """
    wanted, whole = to_bytes(subject), tokenizer.decode_bytes(ids)
    begin = whole.find(wanted)
    if begin < 0 or not wanted:
        raise ValueError(f"the text does not hold the subject {subject!r}")
    found, at = [], 0
    for position, token in enumerate(ids):
        end = at + len(tokenizer.decode_bytes([token]))
        if at < begin + len(wanted) and end > begin:
            found.append(position)
        at = end
    return found


def places(model: Model) -> dict[str, list[str]]:
    """The places that can be restored, and the names of the intermediates in each."""
    states = model.config.architecture.state_parts
    parts = {part: [f"state.{field}" for field in fields] for part, fields in states.items()}
    everything = ["resid_post", *(name for names in parts.values() for name in names)]
    return {OUTPUT: ["resid_post"], **parts, EVERYTHING: everything}


def _check(
    model: Model, tokens: Tensor, subject: Sequence[int], answer: int, noise: float, samples: int
) -> None:
    if tokens.dim() != 1 or len(tokens) < 2:
        raise ValueError(f"tokens are {[*tokens.shape]}; wanted the ids of a prompt, [T]")
    if not len(subject) or not all(0 <= place < len(tokens) for place in subject):
        raise ValueError(
            f"subject is {list(subject)}; wanted positions of the prompt, 0 to {len(tokens) - 1}"
        )
    if not 0 <= answer < model.config.vocab_size:
        raise ValueError(f"answer is {answer}; wanted an id below {model.config.vocab_size}")
    if not (math.isfinite(noise) and noise > 0):
        raise ValueError(f"noise is {noise}; it must be above 0")
    if samples < 1:
        raise ValueError(f"samples is {samples}; it must be at least 1")
