"""The derivatives of wkv by its matrices, by autograd and by the formulas of appendix H."""

from __future__ import annotations

import torch
from torch import Tensor

from receptance.analysis.decays import log_decays
from receptance.config import ModelConfig
from receptance.model import Model
from receptance.ops import wkv4

IDENTITIES = ("by W_v: not the weighted mean", "by W_k: not the weighted covariance")
"""The largest difference between a derivative and its formula, relative to the largest one."""
SHARES = ("by W_v: of its bound", "by W_k: of its bound")
"""The largest derivative, as a share of its bound."""
_LAYERS, _LAYER = 12, 8  # whose starting decays are taken: long memories and short ones


def average(log_decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """wkv: [C], [C], [B,T,C], [B,T,C] -> [B,T,C]."""
    return wkv4(log_decay, bonus, key, value, backend="reference")[0]


def derivatives(width: int, length: int, seed: int) -> dict[str, float]:
    """The `IDENTITIES` and `SHARES` at the last of T tokens, which are drawn, in float64."""
    generator = torch.Generator().manual_seed(seed)
    x, w_k, w_v = (
        torch.randn(n, width, generator=generator, dtype=torch.float64)
        for n in (length, width, width)
    )
    w_k, w_v = ((w / width**0.5).requires_grad_() for w in (w_k, w_v))
    log_decay = _decays(width)
    bonus = torch.randn(width, generator=generator, dtype=torch.float64)
    key, value = x @ w_k.T, x @ w_v.T
    # wkv_i depends on row i of both matrices alone, so one sum has all derivatives.
    average(log_decay, bonus, key[None], value[None])[0, -1].sum().backward()
    assert w_k.grad is not None and w_v.grad is not None
    with torch.no_grad():
        share = weights(log_decay, bonus, key)
        by_value = share.T @ x
        by_key = (share * value).T @ x - (share * value).sum(0)[:, None] * by_value
        spans = [a.amax(0) - a.amin(0) for a in (x, value)]
        bounds = x.abs().amax(0).expand(width, -1), spans[1][:, None] * spans[0] / 4
        found = w_v.grad, w_k.grad
        off = [_off(*pair) for pair in zip(found, (by_value, by_key), strict=True)]
        of = [float((d.abs() / b).max()) for d, b in zip(found, bounds, strict=True)]
    return dict(zip((*IDENTITIES, *SHARES), (*off, *of), strict=True))


def weights(log_decay: Tensor, bonus: Tensor, key: Tensor) -> Tensor:
    """The share of each token in the last average, by the sum of equation 16: [C], [C], [T,C]."""
    back = torch.arange(len(key) - 2, -1, -1, dtype=key.dtype)[:, None]
    exponents = torch.cat([key[:-1] + back * log_decay, key[-1:] + bonus])
    return exponents.softmax(0)


def _decays(width: int) -> Tensor:
    """The decays of a new model's layer, as logarithms [C]."""
    config = ModelConfig(vocab_size=1, width=width, num_layers=_LAYERS, ffn_width=1)
    return log_decays(Model(config))[_LAYER].double()


def _off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())
