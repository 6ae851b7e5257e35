"""Which earlier tokens a prediction depends on: each is hidden in turn, and the model runs again.

Unlike the effective attention of a layer, this is an effect on the whole model, through all layers,
token shifts included.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from receptance.analysis.hooks import patch
from receptance.model import Model

_POSITIONS = 1 << 12  # positions that one call reads, over all rows
_LOGITS = 1 << 24


@torch.no_grad()
def attribution(
    model: Model, tokens: Tensor, *, note: Callable[[int], object] = lambda done: None
) -> Tensor:
    """What each token does for the prediction of each later one: ids [T] -> nats [T,T].

    Element [i,t] is log p(token t + 1), less the same with the embedding of token i replaced by the
    mean embedding. It is positive where token i helped, and zero for t < i. The last column is for
    the token that the model finds most likely after the text. This takes T runs over the text; note
    is called with the number of runs that are done.
    """
    if tokens.dim() != 1 or not len(tokens):
        raise ValueError(f"tokens are {[*tokens.shape]}; wanted the ids of one text, [T]")
    time = len(tokens)
    mean = model.emb.weight.float().mean(0)
    features, _ = model.features(tokens[None])
    best = model.head(features[:, -1]).argmax(-1).to(tokens.dtype)
    targets = torch.cat([tokens[1:], best]).long()
    whole = _log_probabilities(model, features, targets)
    effects = []
    for hidden in torch.arange(time, device=tokens.device).split(max(1, _POSITIONS // time)):
        rows = torch.zeros(len(hidden), time, dtype=torch.bool, device=tokens.device)
        rows[torch.arange(len(hidden)), hidden] = True
        with patch(model, "emb", mean.expand(1, 1, -1), where=rows):
            features, _ = model.features(tokens.expand(len(hidden), -1))
        effects.append(whole - _log_probabilities(model, features, targets))
        note(len(hidden))
    return torch.cat(effects).triu()


def _log_probabilities(model: Model, features: Tensor, targets: Tensor) -> Tensor:
    """log p of the targets [T] in each row: features [B,T,C] -> [B,T]."""
    pieces = []
    for row in features:
        for x, wanted in zip(
            row.split(max(1, _LOGITS // model.config.vocab_size)),
            targets.split(max(1, _LOGITS // model.config.vocab_size)),
            strict=True,
        ):
            found = model.head(x).float().log_softmax(-1)
            pieces.append(found.gather(1, wanted[:, None])[:, 0])
    return torch.cat(pieces).view(features.shape[:2])
