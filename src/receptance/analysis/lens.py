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
    following = tokens[:, 1:].long()
    ids, likely, following_likely = [], [], []
    for name in cache:
        pieces = []
        for x in cache[name].split(max(1, _AT_ONCE // (len(tokens) * model.config.vocab_size)), 1):
            begin = sum(piece[0].shape[1] for piece in pieces)
            found = model.head(model.ln_out(x)).float().log_softmax(-1)
            nexts = following[:, begin : begin + x.shape[1]]
            gathered = found[:, : nexts.shape[1]].gather(2, nexts[..., None])[..., 0]
            best = found.topk(top)
            pieces.append((best.indices, best.values, gathered))
        parts = [torch.cat(part, dim=1) for part in zip(*pieces, strict=True)]
        for whole, part in zip((ids, likely, following_likely), parts, strict=True):
            whole.append(part)
    return Lens(
        torch.stack(ids), torch.stack(likely), torch.stack(following_likely), tokenizer=tokenizer
    )


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
