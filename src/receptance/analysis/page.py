"""One HTML file that shows what a model does with a text; it loads nothing."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from receptance.analysis.decays import half_lives, log_decays, retentions
from receptance.analysis.effective import Attention, attention
from receptance.analysis.lens import Lens, logit_lens
from receptance.analysis.occlusion import attribution
from receptance.analysis.tracing import NOTE, Trace
from receptance.analysis.units import Activations, activations
from receptance.atomic import check_replaceable, written
from receptance.evaluation.results import Curve, Figure, Result, Source, Subject
from receptance.model import Model
from receptance.tokenizer import Tokenizer

MOST_TOKENS = 256
"""A page shows at most so many tokens: the runs that it takes grow with their square."""

_MARK = b'content="receptance-analysis"'
_TOP = 3  # predictions of the logit lens that are shown


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What was found out about a text; `html` is the page, and notebooks show it."""

    name: str
    about: str
    """The model's sizes, in words."""
    texts: list[str]
    """The text of each token, T of them."""
    losses: list[float]
    """The loss of each token but the first, T - 1 of them, in nats."""
    lens: Lens
    words: dict[int, str]
    """The texts of the tokens that the lens names."""
    shares: list[Tensor]
    """What each layer reads from, [T,T] for each of L layers (see Attention.shares); empty, as are
    the distances, if the version does not tell."""
    distances: list[float]
    """The mean distance in tokens from which each layer reads."""
    units: Activations | None
    log_decays: Tensor | None
    """[L,C], None if the version has no parameter for them."""
    effects: Tensor | None = None
    """What each token does for the prediction of later ones, [T,T] (see attribution)."""
    trace: Trace | None = None
    answer: str = ""
    """The text of the answer that was traced."""
    subject: Subject = field(repr=False)

    def html(self) -> str:
        """The page as one file: style, script and numbers are inside."""
        page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
        # A token may hold "</script>".
        data = json.dumps(self._data(), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
        head, tail = page.split("DATA")
        return head.replace("TITLE", html.escape(self.name)) + data + tail

    def save(self, path: Path) -> None:
        """Write the page. ValueError if anything but such a page is at path."""
        check_page(path)
        with written(path) as file:
            file.write(self.html().encode("utf-8", errors="replace"))

    def _repr_html_(self) -> str:
        return (
            f'<iframe srcdoc="{html.escape(self.html())}" title="analysis" '
            'style="width:100%;height:720px;border:1px solid gray"></iframe>'
        )

    def result(self) -> Result:
        """The figures in the form that all results have, those of the trace included."""
        figures = [
            Figure(name=name, value=float(value), unit=unit, model=self.name, about={"layer": i})
            for name, unit, values in self._by_layer()
            for i, value in enumerate(values)
        ]
        curve = Curve(
            name="loss",
            x_name="token",
            x=[float(i) for i in range(1, len(self.texts))],
            y_name="nats",
            y=self.losses,
            model=self.name,
        )
        traced = self.trace
        return Result(
            kind="analysis",
            what="what a model does with a text",
            models=[self.subject],
            data=[Source(name="text", about={"tokens": len(self.texts)})],
            figures=[*figures, *(traced.figures(self.name) if traced else ())],
            curves=[curve, *(traced.curves(self.name) if traced else ())],
            notes=[NOTE] if traced else [],
            details={"texts": self.texts, "answer": self.answer},
        )

    def _by_layer(self) -> list[tuple[str, str, list[float]]]:
        """Name, unit and a value for each layer of what is known of layers."""
        rows = []
        if self.log_decays is not None:
            medians = half_lives(self.log_decays).median(dim=1).values
            rows.append(("median half-life", "tokens", medians.tolist()))
        if self.distances:
            rows.append(("mean reading distance", "tokens", self.distances))
        if self.units is not None:
            rows.append(("zeros in channel mixing", "share", self.units.sparsity.tolist()))
            rows.append(("hidden units never used", "units", self.units.dead.tolist()))
        return rows

    def _data(self) -> dict[str, Any]:
        """What the script of the page reads."""
        columns = self._by_layer()
        rows = [
            [str(i + 1), *(_shown(values[i], unit) for _, unit, values in columns)]
            for i in range(len(self.lens.ids) - 1)
        ]
        losses = [None, *(round(x, 4) for x in self.losses)]
        return {
            "about": self.about,
            "tokens": [
                {"text": text, "loss": loss} for text, loss in zip(self.texts, losses, strict=True)
            ],
            "reads": [_bytes(share) for share in self.shares],
            "effects": None if self.effects is None else _rounded(self.effects, 3),
            "lens": _lens(self.lens),
            "words": self.words,
            "decays": None
            if self.log_decays is None
            else [[round(x, 4) for x in row] for row in retentions(self.log_decays).values()],
            "columns": ["layer", *(f"{name} ({unit})" for name, unit, _ in columns)],
            "rows": rows,
            "trace": self._trace(),
        }

    def _trace(self) -> dict[str, Any] | None:
        if self.trace is None:
            return None
        found = self.trace
        return {
            "texts": found.texts,
            "subject": found.subject,
            "answer": self.answer,
            "clean": found.clean,
            "corrupted": found.corrupted,
            "restored": {place: _rounded(x, 4) for place, x in found.restored.items()},
        }


def analyze(
    model: Model,
    tokenizer: Tokenizer,
    text: str | bytes,
    *,
    name: str = "model",
    effects: bool = True,
    max_tokens: int = MOST_TOKENS,
    note: Callable[[int], object] = lambda done: None,
) -> Analysis:
    """Find out what a model does with a text, for a page about it.

    effects also measures what each token does for each later prediction, with one run over the
    text for each token. note is called with the number of steps that are done, of `steps(...)`.
    ValueError for a text of fewer than two tokens or more than max_tokens.
    """
    ids = tokenizer.encode(text)
    check_length(len(ids), max_tokens)
    tokens = torch.tensor(ids, device=model.device)[None]
    with model.evaluating():
        lens = logit_lens(model, tokens, top=min(_TOP, model.config.vocab_size))
        read = _attention(model, tokens)
        shares, distances = [], []
        for layer in range(model.config.num_layers):
            if read is not None:
                shares.append(read.shares(layer)[0, :, 1:].float().cpu())
                distances.append(float(read.memory(layer).mean()))
            note(1)
        done = attribution(model, tokens[0], note=note).cpu() if effects else None
        named = {int(i) for i in lens.ids.unique()}
        return Analysis(
            name=name,
            about=_about(model, tokenizer),
            texts=[token_text(tokenizer, i) for i in ids],
            losses=(-lens.next_log_probabilities[-1, 0]).tolist(),
            lens=lens,
            words={i: token_text(tokenizer, i) for i in sorted(named)},
            shares=shares,
            distances=distances,
            units=_units(model, tokens),
            log_decays=_decays(model),
            effects=done,
            subject=Subject(
                name=name, fingerprint=model.fingerprint(), about=model.config.to_dict()
            ),
        )


def check_length(tokens: int, most: int) -> None:
    """ValueError for a text that is too short to say anything about, or too long for a page."""
    if tokens < 2:
        raise ValueError(f"the text has {tokens} tokens; wanted at least 2")
    if tokens > most:
        raise ValueError(
            f"the text has {tokens} tokens, and a page shows at most {most}; take a shorter text, "
            "or set max_tokens higher (time and size grow with its square)"
        )


def check_page(path: Path) -> None:
    """ValueError if there is something at path that is not such a page: it would be lost."""
    check_replaceable(path, "the page", "such a page", _is_page)


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The text of a token; bytes that are no whole characters are shown as <e7>."""
    if token >= tokenizer.vocab_size:
        return f"<id {token}>"
    found = tokenizer.decode_bytes([token])
    try:
        return found.decode()
    except UnicodeDecodeError:
        return "".join(chr(b) if 32 <= b < 127 else f"<{b:02x}>" for b in found)


def _is_page(path: Path) -> bool:
    with path.open("rb") as file:
        return _MARK in file.read(400)


def _about(model: Model, tokenizer: Tokenizer) -> str:
    sizes = model.config
    return (
        f"RWKV-{sizes.version}, {sizes.num_parameters:,} parameters: {sizes.num_layers} layers, "
        f"width {sizes.width}, vocabulary {sizes.vocab_size} ({tokenizer.kind})"
    )


def _attention(model: Model, tokens: Tensor) -> Attention | None:
    try:
        return attention(model, tokens)
    except ValueError:  # This version does not tell what its layers read from.
        return None


def _units(model: Model, tokens: Tensor) -> Activations | None:
    try:
        return activations(model, tokens)
    except ValueError:  # This version has no hidden units that could be zero.
        return None


def _decays(model: Model) -> Tensor | None:
    try:
        return log_decays(model).cpu()
    except ValueError:  # This version has no parameter of a decay.
        return None


def _shown(value: float, unit: str) -> str:
    if unit == "share":
        return f"{value:.1%}"
    return f"{value:,.0f}" if unit == "units" or value >= 100 else f"{value:.1f}"


def _bytes(shares: Tensor) -> str:
    """The lower triangle of shares [T,T] as bytes, whose squares they are, in base64."""
    codes = (shares.clamp(0, 1).sqrt() * 255).round().byte()
    rows, columns = torch.tril_indices(*codes.shape)
    return base64.b64encode(codes[rows, columns].numpy().tobytes()).decode()


def _rounded(values: Tensor, digits: int) -> list[list[float]]:
    return [[round(x, digits) for x in row] for row in values.tolist()]


def _lens(lens: Lens) -> list[list[Mapping[str, Any]]]:
    """For each depth and token: the likeliest ids, the probability of the first, and the text's."""
    depths, _, time, _ = lens.ids.shape
    likely = lens.log_probabilities[:, 0, :, 0].exp().tolist()
    following = lens.next_log_probabilities[:, 0].exp().tolist()
    return [
        [
            {
                "ids": lens.ids[d, 0, t].tolist(),
                "p": round(likely[d][t], 5),
                "next": round(following[d][t], 5) if t + 1 < time else None,
            }
            for t in range(time)
        ]
        for d in range(depths)
    ]
