"""What the model would say if it stopped at a layer, and what a layer's state makes it say."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from receptance.analysis.hooks import record
from receptance.analysis.notebook import table
from receptance.analysis.surgery import ablate
from receptance.model import Model
from receptance.state import State
from receptance.tokenizer import Tokenizer

_AT_ONCE = 1 << 24  # logits in memory at one time


@dataclass(frozen=True)
class Lens:
    """The predictions of every layer for a text [B,T]; depth 0 is the embedding, depth L the end.

    Predictions at position t are for the token after it.
    """

    ids: Tensor
    """[L+1,B,T,K], the most likely tokens, the first of them the likeliest."""
    log_probabilities: Tensor
    """[L+1,B,T,K], those of `ids`, in nats."""
    next_log_probabilities: Tensor
    """[L+1,B,T-1], those of the tokens that follow in the text."""
    tokenizer: Tokenizer | None = None

    def _repr_html_(self) -> str:
        depths, _, time, _ = self.ids.shape
        header = ["depth", *(f"after token {t}" for t in range(time))]
        rows = [
            [str(depth), *(self._shown(depth, t) for t in range(time))]
            for depth in reversed(range(depths))
        ]
        return table(header, rows)

    def _shown(self, depth: int, t: int) -> str:
        token = int(self.ids[depth, 0, t, 0])
        share = float(self.log_probabilities[depth, 0, t, 0].exp())
        text = str(token) if self.tokenizer is None else repr(self.tokenizer.decode([token]))
        return f"{text} {share:.0%}"


@torch.no_grad()
def logit_lens(
    model: Model,
    tokens: Tensor,
    state: State | None = None,
    *,
    top: int = 5,
    tokenizer: Tokenizer | None = None,
) -> Lens:
    """Read the residual stream after each layer through the last norm and the head.

    The idea is nostalgebraist's (2020). tokens are [B,T]; the tokenizer is only for what a notebook
    shows. At depth L the predictions are the model's.
    """
    with record(model, "blocks.0.resid_pre", "blocks.*.resid_post") as cache:
        model.features(tokens, state)
    if not 1 <= top <= model.config.vocab_size:
        raise ValueError(f"top is {top}; wanted 1 to {model.config.vocab_size}")
    depths = [_predictions(model, cache[name], tokens[:, 1:].long(), top) for name in cache]
    ids, likely, following = (torch.stack(part) for part in zip(*depths, strict=True))
    return Lens(ids, likely, following, tokenizer=tokenizer)


def _predictions(
    model: Model, x: Tensor, following: Tensor, top: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest ids [B,T,K], their log p, and log p of what follows [B,T-1], of x [B,T,C]."""
    ids, likely, found = [], [], []
    at_once = max(1, _AT_ONCE // (len(x) * model.config.vocab_size))
    for begin in range(0, x.shape[1], at_once):
        logits = model.head(model.ln_out(x[:, begin : begin + at_once]))
        every = logits.float().log_softmax(-1)
        best = every.topk(top)
        ids.append(best.indices)
        likely.append(best.values)
        nexts = following[:, begin : begin + at_once, None]
        found.append(every[:, : nexts.shape[1]].gather(2, nexts)[..., 0])
    return torch.cat(ids, 1), torch.cat(likely, 1), torch.cat(found, 1)


@torch.no_grad()
def state_lens(model: Model, state: State, tokens: Tensor) -> Tensor:
    """How the state of each layer changes the logits after the next token: [B] ids -> [L,B,V].

    It is the difference between the logits with the whole state, and those where the layer has read
    nothing before this token. What a layer adds there is what its memory of the text makes the
    model say.
    """
    whole = model(tokens[:, None], state)[0][:, 0]
    without = [
        model(tokens[:, None], ablate(model, state, layers=[layer]))[0][:, 0]
        for layer in range(model.config.num_layers)
    ]
    return whole - torch.stack(without)
