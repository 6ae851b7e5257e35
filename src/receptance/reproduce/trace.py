"""Figure 11: where in the model a fact is found, and on which way it reaches the answer."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from receptance.analysis.page import token_text
from receptance.analysis.tracing import (
    EVERYTHING,
    NOTE,
    OUTPUT,
    Trace,
    Tracer,
    places,
    subject_positions,
)
from receptance.evaluation.results import Result, Subject
from receptance.model import Model
from receptance.plots.panels import Panel
from receptance.reproduce import facts
from receptance.reproduce.experiment import Check, Experiment, Found, Piece, Work
from receptance.storage.checkpoint import load

# A model knows a fact if the answer has at least this probability, and the noise has to take this
# many nats away.
_KNOWS, _LOST = 0.1, 1.0
# Shares of what the noise took away that count as "brought back" and as "not".
_BACK, _NOT_BACK = 0.5, 0.25
_PLANTED_NOISE, _PLANTED_FACT = 10.0, 3


@dataclass(frozen=True, kw_only=True)
class CausalTrace(Experiment):
    """Restore the clean value of one layer at one token of a corrupted run, for all of them."""

    NAME: ClassVar[str] = "trace"
    SHOWS: ClassVar[str] = "Figure 11"
    CLAIM: ClassVar[str] = (
        "In RWKV-4-Pile-430M a fact is retrieved at its subject in an early layer, carried to "
        "later tokens by the state of few layers, and handed up to the last layer at the end of "
        "the prompt."
    )
    DOES: ClassVar[str] = (
        "traces an answer by ROME's procedure through every layer, token and part of the state: of "
        "a small model that learns facts here in seconds, or of any model and prompt"
    )
    NEEDS: ClassVar[str] = "nothing; takes any model, the paper's is RWKV-4-Pile-430M"
    TAKES: ClassVar[tuple[str, str]] = ("20 seconds", "20 seconds; 430M 20 minutes")

    model: str | None = None
    """The model, as for `receptance generate`; without one a small model learns facts, of which it
    is known where they pass."""
    prompt: str = "The Eiffel Tower is located in the city of"
    """The prompt for the model that was named."""
    subject: str = "The Eiffel Tower"
    """The part of the prompt whose embeddings get noise."""
    answer: str = " Paris"
    """The text that should follow; its first token is traced."""
    noise: float | None = None
    """Deviation of the noise as a multiple of that of the embeddings; 3 by default, as in ROME."""
    samples: int = 10
    """Number of samples of noise over which probabilities are averaged."""
    seed: int = 0
    """Draw the noise from this seed."""
    device: str = "auto"
    """Run here: cpu, cuda; auto takes a GPU where there is one."""

    def identity(self) -> dict[str, Any]:
        """The weights of a model that was named."""
        return {} if self.model is None else {"weights": _question(self, "cpu").model.fingerprint()}

    def pieces(self) -> list[Piece]:
        """Every place in every layer."""
        model = _question(self, "cpu").model
        return [
            {"place": place, "layer": layer}
            for place in places(model)
            for layer in range(model.config.num_layers)
        ]

    def measure(self, piece: Piece, work: Work) -> dict[str, Any]:
        """Restore one place of one layer after each token in turn."""
        tracer = _question(self, work.device).tracer
        return {
            "restored": tracer.restored(piece["place"], piece["layer"]).tolist(),
            "clean": float(tracer.clean),
            "corrupted": float(tracer.corrupted),
        }

    def conclude(self, found: Sequence[tuple[Piece, Mapping[str, Any]]]) -> Found:
        """Follow the answer from its subject to the end of the prompt."""
        asked = _question(self, "cpu")
        rows: dict[str, list[list[float]]] = {}
        for piece, it in found:
            rows.setdefault(piece["place"], []).append(it["restored"])
        trace = Trace(
            tokens=asked.tokens.tolist(),
            texts=asked.texts,
            subject=asked.subject,
            answer=asked.answer,
            clean=found[0][1]["clean"],
            corrupted=found[0][1]["corrupted"],
            restored={place: torch.tensor(values) for place, values in rows.items()},
            noise=_noise(self),
            samples=self.samples,
        )
        config = asked.model.config
        about = {**config.to_dict(), "parameters": config.num_parameters}
        name = self.model or "planted facts"
        planted = self.model is None
        chance = f" (by chance 1 of {facts.FACTS} answers, {-math.log(facts.FACTS):.2f})"
        unused = (
            "The options prompt, subject and answer belong to a model that is named; they were "
            "not used here."
        )
        return Found(
            checks=checks(trace, planted=planted),
            headline="the procedure is tested on a fact that was planted at a known place; the "
            "figure itself needs RWKV-4-Pile-430M"
            if planted
            else "",
            models=[Subject(name=name, fingerprint=asked.model.fingerprint(), about=about)],
            figures=trace.figures(name),
            curves=trace.curves(name),
            caption=f"{len(trace.tokens)} tokens, noise of {trace.noise:g} deviations on tokens "
            f"{', '.join(str(i + 1) for i in trace.subject)}, {trace.samples} samples, seed "
            f"{self.seed}; log p(answer) is {trace.clean:z.2f} clean and "
            f"{trace.corrupted:z.2f} corrupted, in nats{chance if planted else ''}"
            + (f". The model learned {facts.FACTS} facts in {facts.STEPS} steps" * planted),
            notes=[NOTE, _UNSAID, *([unused] if planted else [])],
        )

    def panels(self, result: Result) -> list[Panel]:
        """A heat map of each place, tokens from top to bottom; the paper's comes first."""
        places = dict.fromkeys([EVERYTHING, *(curve.about["place"] for curve in result.curves)])
        values = [y for curve in result.curves for y in curve.y]
        found = []
        for place in places:
            some = [curve for curve in result.curves if curve.about["place"] == place]
            found.append(
                Panel(
                    title=some[0].name,
                    x="layer",
                    y="token",
                    unit="nats",
                    range=(min(values), max(values)),
                    matrix=[curve.y for curve in some],
                    rows=[curve.about["token"] for curve in some],
                    columns=[f"{x:g}" for x in some[0].x],
                )
            )
        return found


_UNSAID = (
    "The paper does not say how strong its noise was, how many samples it took, or what it "
    "restored; the output of the block with its whole state is the natural reading."
)


def _noise(options: CausalTrace) -> float:
    usual = _PLANTED_NOISE if options.model is None else 3.0
    return usual if options.noise is None else options.noise


@dataclass(frozen=True)
class _Question:
    model: Model
    tokens: Tensor
    subject: list[int]
    answer: int
    texts: list[str]
    tracer: Tracer


@functools.lru_cache(maxsize=1)
def _question(options: CausalTrace, device: str) -> _Question:
    """The model with its prompt, and the clean and the corrupted run."""
    if options.model is None:
        prompts, answers = facts.prompts()
        model, tokens, answer = (
            facts.trained(),
            prompts[_PLANTED_FACT],
            int(answers[_PLANTED_FACT]),
        )
        subject, texts = [0], list(facts.TEXTS)
    else:
        model, tokenizer = load(options.model, device=device)
        if tokenizer is None:
            raise ValueError(f"model {options.model} has no tokenizer; give a folder with one")
        ids, answers_ = tokenizer.encode(options.prompt), tokenizer.encode(options.answer)
        if not answers_:
            raise ValueError("answer is empty; it is the text that should follow the prompt")
        tokens, answer = torch.tensor(ids, device=model.device), answers_[0]
        subject = subject_positions(options.subject, tokenizer, ids)
        texts = [token_text(tokenizer, i) for i in ids]
    tracer = Tracer(
        model,
        tokens,
        subject,
        answer,
        generator=torch.Generator().manual_seed(options.seed),
        noise=_noise(options),
        samples=options.samples,
    )
    return _Question(model, tokens, subject, answer, texts, tracer)


def checks(trace: Trace, *, planted: bool = False) -> list[Check]:
    """The stations of the answer, as shares of what the noise took away."""
    lost = trace.clean - trace.corrupted
    known = torch.tensor(trace.clean).exp() >= _KNOWS and lost >= _LOST
    back = {place: (x - trace.corrupted) / max(lost, 1e-6) for place, x in trace.restored.items()}
    whole, output = back[EVERYTHING], back[OUTPUT]
    layers, length = whole.shape
    early, last = whole[: max(1, layers // 2), trace.subject], whole[:, -1]
    between = [t for t in range(max(trace.subject) + 1, length - 1)]
    if planted:
        between = [t for t in between if t > facts.REACH]
    carried = (whole - output)[:, between].amin(1) if between else torch.zeros(layers)
    carrier = int(carried.argmax())
    elsewhere = torch.cat([carried[:carrier], carried[carrier + 1 :]]).max()
    condition = (
        f"The clean probability is {float(torch.tensor(trace.clean).exp()):.2f}, and the "
        f"noise takes {lost:.2f} nats."
    )
    found = [
        Check(
            claim="The answer depends on the subject, and the model knows it.",
            rule=f"the clean probability is at least {_KNOWS:g}, and the noise takes at least "
            f"{_LOST:g} nats away.",
            found=condition,
            agrees=True if known else None,
        ),
        Check(
            claim="The fact is there at the subject in the first half of the layers.",
            rule=f"restoring one of these layers there brings at least {_BACK:.0%} back.",
            found=f"At most {float(early.max()):.0%} come back.",
            agrees=bool(early.max() >= _BACK) if known else None,
        ),
        Check(
            claim="Between subject and end it is in the state of one layer.",
            rule=f"there is a layer whose state brings at least {_BACK:.0%} more back than its "
            f"output after each token in between, and no other brings more than {_NOT_BACK:.0%}.",
            found=f"Layer {carrier + 1} brings {float(carried[carrier]):.0%} back, others at most "
            f"{float(elsewhere):.0%}.",
            agrees=bool(carried[carrier] >= _BACK and elsewhere <= _NOT_BACK) if known else None,
        ),
        Check(
            claim="At the end of the prompt it is in the last layers and not yet in the first.",
            rule=f"restoring the first layer there brings at most {_NOT_BACK:.0%} back, and "
            f"restoring the layer before the last at least {_BACK:.0%}.",
            found=f"They bring {float(last[0]):.0%} and {float(last[-2]):.0%} back.",
            agrees=bool(last[0] <= _NOT_BACK and last[-2] >= _BACK) if known else None,
        ),
    ]
    if planted:
        found.append(
            Check(
                claim="That layer is the only one that can carry it.",
                rule=f"it is layer {facts.CARRIER + 1}, as time mixing is off in all others.",
                found=f"It is layer {carrier + 1}.",
                agrees=carrier == facts.CARRIER if known else None,
            )
        )
        found = [replace(x, claim=f"Of the planted fact: {x.claim}") for x in found]
        found.append(
            Check(
                claim="In RWKV-4-Pile-430M the Eiffel Tower takes this way (figure 11).",
                rule="the same rules, without the one before this, of that model.",
                found="This is another model, whose way was planted. Name the paper's as model.",
                agrees=None,
            )
        )
    return found
