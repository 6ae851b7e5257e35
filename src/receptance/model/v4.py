"""RWKV-4 (arXiv 2305.13048): time mixing, channel mixing, their starting values.

    r, k, v = W_r mix_r(x), W_k mix_k(x), W_v mix_v(x)          equations 11 to 13
    o = W_o (sigmoid(r) * wkv(w, u, k, v))                      equations 16, 17
    o' = sigmoid(W'_r mix'_r(x)) * (W'_v relu(W'_k mix'_k(x))^2)  equations 14, 15, 18

Starting values are those of BlinkDL/RWKV-LM (RWKV-v4neo), which the appendix of the paper prints
differently: its zero key matrix would leave channel mixing without a gradient for ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from receptance.config import ModelConfig
from receptance.model.architecture import Layout
from receptance.model.parts import Linear, Reading, apply, mix, squared_relu, token_shift
from receptance.ops import WKVState, wkv4


class LayerState(NamedTuple):
    """What one layer remembers of each row: five vectors of C numbers."""

    time_shift: Tensor  # [B,C] last input of time mixing
    channel_shift: Tensor  # [B,C] last input of channel mixing
    numerator: Tensor  # [B,C] these three float32 whatever the model's dtype: ops.WKVState
    denominator: Tensor
    exponent: Tensor

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, like: Tensor) -> LayerState:
        """The state of rows that have read nothing, shifts in the dtype of `like`."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        shift = torch.zeros(batch, config.width, device=like.device, dtype=like.dtype)
        wkv = WKVState.empty(batch, config.width, device=like.device, dtype=dtype)
        return cls(shift, shift, *wkv)


class TimeMix(nn.Module):
    """Attention's place: a decaying average of values, weighted by keys, gated by receptance."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        width = config.width
        self.depth = (layer, config.num_layers)
        self.time_decay = nn.Parameter(torch.empty(width))  # log(-log of the decay per token)
        self.time_first = nn.Parameter(torch.empty(width))  # the bonus u
        self.time_mix_k = nn.Parameter(torch.empty(1, 1, width))
        self.time_mix_v = nn.Parameter(torch.empty(1, 1, width))
        self.time_mix_r = nn.Parameter(torch.empty(1, 1, width))
        self.key = Linear(width, width)
        self.value = Linear(width, width)
        self.receptance = Linear(width, width)
        self.output = Linear(width, width)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Starting values, orthogonal draws from the generator."""
        early, late = _depth_fractions(*self.depth)
        width = self.time_decay.numel()
        channel = torch.arange(width, dtype=torch.float64)
        fraction = channel / max(width - 1, 1)
        self.time_decay.copy_(-5 + 8 * fraction ** (0.7 + 1.3 * late))
        self.time_first.copy_(math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1))
        share = channel / width
        self.time_mix_k[0, 0] = share**early
        self.time_mix_v[0, 0] = share**early + 0.3 * late
        self.time_mix_r[0, 0] = share ** (0.5 * early)
        self.value.orthogonal_(1, generator)
        for matrix in (self.key, self.receptance, self.output):
            nn.init.zeros_(matrix.weight)

    def learning_rate_scales(self) -> dict[str, float]:
        """Multipliers that differ from 1 (RWKV-v4neo, layerwise_lr)."""
        return {"time_decay": 2.0, "time_first": 3.0}

    def forward(
        self,
        x: Tensor,
        state: LayerState,
        reading: Reading,
    ) -> tuple[Tensor, LayerState]:
        """[B,T,C] -> [B,T,C], and the state after it."""
        previous, x, last = token_shift(x, state.time_shift, reading)
        receptance = apply(self.receptance, reading, mix, previous, x, self.time_mix_r).sigmoid_()
        wkv = WKVState(state.numerator, state.denominator, state.exponent)
        average, wkv = wkv4(
            -self.time_decay.exp(),
            self.time_first,
            apply(self.key, reading, mix, previous, x, self.time_mix_k),
            apply(self.value, reading, mix, previous, x, self.time_mix_v),
            wkv,
            resets=reading.resets,
            lengths=reading.lengths,
            backend=reading.backend,
        )
        state = LayerState(last, state.channel_shift, *wkv)
        return apply(self.output, reading, torch.mul, receptance, average), state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TimeMix:
        # bfloat16 rounds a decay of 0.999 to 1, and the state would never forget: whatever the
        # model is cast to, these two move to its device but are never narrower than float32.
        kept = {name: getattr(self, name).detach() for name in ("time_decay", "time_first")}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            parameter = getattr(self, name)
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = before.to(parameter.device, torch.float32)
        return self


class ChannelMix(nn.Module):
    """The feed-forward network: squared relu, gated by receptance."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        width, hidden = config.width, config.ffn_width
        self.depth = (layer, config.num_layers)
        self.time_mix_k = nn.Parameter(torch.empty(1, 1, width))
        self.time_mix_r = nn.Parameter(torch.empty(1, 1, width))
        self.key = Linear(width, hidden)
        self.receptance = Linear(width, width)
        self.value = Linear(hidden, width)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Starting values, orthogonal draws from the generator."""
        early, _ = _depth_fractions(*self.depth)
        width = self.time_mix_k.shape[-1]
        share = torch.arange(width, dtype=torch.float64) / width
        self.time_mix_k[0, 0] = share**early
        self.time_mix_r[0, 0] = share**early
        self.key.orthogonal_(1, generator)
        for matrix in (self.receptance, self.value):
            nn.init.zeros_(matrix.weight)

    def learning_rate_scales(self) -> dict[str, float]:
        """Multipliers that differ from 1: none."""
        return {}

    def forward(
        self,
        x: Tensor,
        state: LayerState,
        reading: Reading,
    ) -> tuple[Tensor, LayerState]:
        """[B,T,C] -> [B,T,C], and the state after it."""
        previous, x, last = token_shift(x, state.channel_shift, reading)
        receptance = apply(self.receptance, reading, mix, previous, x, self.time_mix_r).sigmoid_()
        key = apply(self.key, reading, mix, previous, x, self.time_mix_k)
        value = apply(self.value, reading, squared_relu, key)
        # Not _replace, which torch.compile of torch 2.11 cannot follow.
        return receptance * value, LayerState(state.time_shift, last, *state[2:])


def _depth_fractions(layer: int, num_layers: int) -> tuple[float, float]:
    """1 at the first layer and near 0 at the last; 0 at the first layer and 1 at the last."""
    return 1 - layer / num_layers, layer / max(num_layers - 1, 1)


_LAYER_MATRICES = (
    *("att.key", "att.value", "att.receptance", "att.output"),
    *("ffn.key", "ffn.receptance", "ffn.value"),
)


def layouts(config: ModelConfig) -> dict[str, Layout]:
    """The layout that each matrix is wanted in, by official name."""
    found: dict[str, Layout] = {"emb.weight": "embedding", "head.weight": "tiles"}
    for layer in range(config.num_layers):
        for name in _LAYER_MATRICES:
            layout: Layout = "rows" if name == "ffn.value" else "tiles"
            found[f"blocks.{layer}.{name}.weight"] = layout
    return found
