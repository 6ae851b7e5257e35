"""RWKV-6 (arXiv 2404.05892): time mixing, channel mixing and their starting values.

    m_w, m_k, m_v, m_r, m_g = tanh(mix_x(x) W_1) W_2       what each share varies by
    r, k, v = W_r mix_r(x), W_k mix_k(x), W_v mix_v(x)
    log w = -exp(d + tanh(mix_w(x) D_1) D_2)               g = silu(W_g mix_g(x))
    y = (S + diag(u) k v^T)^T r                            S <- diag(w) S + k v^T
    o = W_o (g * norm(y))
    o' = sigmoid(W'_r mix'_r(x)) * W'_v relu(W'_k mix'_k(x))^2

Starting values are those of BlinkDL/RWKV-LM (RWKV-v5/src/model.py, x060).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from receptance.model.architecture import Place, Shape, Sizes
from receptance.model.headwise import Headwise
from receptance.model.parts import (
    GroupNorm,
    Linear,
    Reading,
    depth_fractions,
    low_rank,
    mix,
    product,
    token_shift,
    wide,
)
from receptance.ops import Sources, wkv6, wkv6_sources

_WIDE = 4096  # From this width on published models have ranks twice as large.
_MIXED = "wkvrg"  # The order of the mixtures in time_maa_w1 and time_maa_w2.


class LayerState(NamedTuple):
    """The state of one layer: two vectors, and a matrix for each of H heads of N channels."""

    time_shift: Tensor  # [B,C], the last input of time mixing
    channel_shift: Tensor  # [B,C], the last input of channel mixing
    key_by_value: Tensor  # [B,H,N,N] float32: S, whose rows belong to keys, columns to values


class TimeMix(nn.Module):
    """Time mixing: a memory of values by keys, which each token reads, fades and adds to."""

    def __init__(self, sizes: Sizes, layer: int) -> None:
        super().__init__()
        width, extras = sizes.width, sizes.extras
        self.depth = (layer, sizes.num_layers)
        self.heads = width // int(extras["head_size"])
        self.backend: str | None = None
        # The share of the preceding token: in what decides about the shares, and in each part.
        self.time_maa_x, self.time_maa_w, self.time_maa_k = (_vector(width) for _ in range(3))
        self.time_maa_v, self.time_maa_r, self.time_maa_g = (_vector(width) for _ in range(3))
        rank = int(extras["mix_rank"])
        self.time_maa_w1 = nn.Parameter(torch.empty(width, len(_MIXED) * rank))
        self.time_maa_w2 = nn.Parameter(torch.empty(len(_MIXED), rank, width))
        self.time_decay = _vector(width)
        self.time_decay_w1, self.time_decay_w2 = low_rank(width, int(extras["decay_rank"]))
        self.time_faaaa = nn.Parameter(torch.empty(self.heads, width // self.heads))  # the bonus
        self.receptance = Linear(width, width)
        self.key = Linear(width, width)
        self.value = Linear(width, width)
        self.gate = Linear(width, width)
        self.output = Linear(width, width)
        self.ln_x = GroupNorm(self.heads, width, float(extras["group_norm_epsilon"]))

    def forward(self, x: Tensor, state: LayerState, reading: Reading) -> tuple[Tensor, LayerState]:
        """[B,T,C] -> [B,T,C], and the layer's next state."""
        previous, last = token_shift(x, state.time_shift, reading)
        mixed = self._mixtures(x, previous)
        log_decay = self._log_decay(mixed["w"])
        r, k, v = self.receptance(mixed["r"]), self.key(mixed["k"]), self.value(mixed["v"])
        gate = F.silu(self.gate(mixed["g"]))
        inputs = (self._by_heads(x) for x in (r, log_decay, k, v))
        read, key_by_value = self.wkv(state.key_by_value, reading, *inputs)
        out = self.output(self.ln_x(read.flatten(2)) * gate)
        return out, LayerState(last, state.channel_shift, key_by_value)

    def wkv(self, state: Tensor, reading: Reading, *x: Tensor) -> tuple[Tensor, Tensor]:
        """What is read from the memory, [B,T,H,N], and its next state; x are the inputs of wkv6."""
        masks = reading._asdict()
        return wkv6(*x, self.time_faaaa, state, **masks, backend=self.backend)  # type: ignore[call-arg]

    def sources(self, state: Tensor, reading: Reading, *x: Tensor, positions: Tensor) -> Sources:
        """What is read at `positions` [P] is made of these; the other arguments are wkv's."""
        bonus = self.time_faaaa
        return wkv6_sources(x, bonus, state, positions=positions, resets=reading.resets)

    def _mixtures(self, x: Tensor, previous: Tensor) -> dict[str, Tensor]:
        """What each part reads, [B,T,C] by its letter: the token mixed with the one before it."""
        narrow = torch.tanh(product(mix(previous, x, self.time_maa_x), self.time_maa_w1))
        narrow = narrow.unflatten(-1, (len(_MIXED), -1)).movedim(-2, 0)
        varying = product(narrow, self.time_maa_w2[:, None])  # [5,B,T,C]
        shares = (self.get_parameter(f"time_maa_{letter}") for letter in _MIXED)
        return {
            letter: mix(previous, x, share.to(x.dtype) + change)
            for letter, share, change in zip(_MIXED, shares, varying, strict=True)
        }

    def _log_decay(self, x: Tensor) -> Tensor:
        """The logarithm of the decay, [B,T,C] in float32 or wider."""
        narrow = torch.tanh(product(x, self.time_decay_w1))
        varying = wide(product(narrow, self.time_decay_w2))
        return log_decay(self.time_decay.to(varying.dtype) + varying)

    def _by_heads(self, x: Tensor) -> Tensor:
        """[B,T,C] -> [B,T,H,N]."""
        return x.reshape(*x.shape[:-1], self.heads, x.shape[-1] // self.heads)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Set the starting values, drawing the matrices from the generator."""
        early, late = depth_fractions(*self.depth)
        width = self.time_decay.numel()
        channel = torch.arange(width, dtype=torch.float64)
        share, fraction = channel / width, channel / max(width - 1, 1)
        for letter in "xwk":
            self.get_parameter(f"time_maa_{letter}")[0, 0] = 1 - share**early
        self.time_maa_v[0, 0] = 1 - (share**early + 0.3 * late)
        self.time_maa_r[0, 0] = 1 - share ** (0.5 * early)
        self.time_maa_g[0, 0] = 1 - share ** (0.5 * early)
        self.time_decay[0, 0] = -6 + 5 * fraction ** (0.7 + 1.3 * late)
        bonus = late * (1 - fraction) + 0.1 * ((channel + 1) % 3 - 1)
        self.time_faaaa.copy_(bonus.view_as(self.time_faaaa))
        for narrow in (self.time_maa_w1, self.time_decay_w1, self.output.weight):
            nn.init.zeros_(narrow)
        for broad in (self.time_maa_w2, self.time_decay_w2):
            nn.init.uniform_(broad, -0.01, 0.01, generator=generator)
        for matrix, scale in (
            (self.receptance, 1.0),
            (self.key, 0.1),
            (self.value, 1.0),
            (self.gate, 0.1),
        ):
            nn.init.orthogonal_(matrix.weight, gain=scale, generator=generator)
        layer, layers = self.depth
        nn.init.constant_(self.ln_x.weight, ((1 + layer) / layers) ** 0.7)

    def learning_rate_scales(self) -> dict[str, float]:
        """The learning-rate factors that differ from 1 (RWKV-v5, layerwise_lr)."""
        return {"time_decay": 2.0}


class ChannelMix(nn.Module):
    """Channel mixing: a feed-forward network with squared relu, gated by receptance."""

    def __init__(self, sizes: Sizes, layer: int) -> None:
        super().__init__()
        width, hidden = sizes.width, sizes.ffn_width
        self.depth = (layer, sizes.num_layers)
        self.time_maa_k, self.time_maa_r = _vector(width), _vector(width)
        self.key = Linear(width, hidden)
        self.receptance = Linear(width, width)
        self.value = Linear(hidden, width)

    def forward(self, x: Tensor, state: LayerState, reading: Reading) -> tuple[Tensor, LayerState]:
        """[B,T,C] -> [B,T,C], and the layer's next state."""
        previous, last = token_shift(x, state.channel_shift, reading)
        k = self.key(mix(previous, x, self.time_maa_k))
        r = self.receptance(mix(previous, x, self.time_maa_r))
        out = torch.sigmoid(r) * self.value(torch.relu(k).square())
        return out, state._replace(channel_shift=last)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Set the starting values, drawing the orthogonal matrix from the generator."""
        early, _ = depth_fractions(*self.depth)
        width = self.time_maa_k.numel()
        share = torch.arange(width, dtype=torch.float64) / width
        self.time_maa_k[0, 0] = self.time_maa_r[0, 0] = 1 - share**early
        nn.init.orthogonal_(self.key.weight, generator=generator)
        for matrix in (self.receptance, self.value):
            nn.init.zeros_(matrix.weight)

    def learning_rate_scales(self) -> dict[str, float]:
        """The learning-rate factors that differ from 1, of which there are none."""
        return {}


def log_decay(logit: Tensor) -> Tensor:
    """The logarithm of the decay per token, never positive."""
    return -logit.exp()


def _vector(width: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(1, 1, width))


# ---- the architecture ---------------------------------------------------------------------------

_ATT_MATRICES = ("receptance", "key", "value", "gate", "output")
_SHARES = (*(f"att.time_maa_{x}" for x in "xwkvrg"), *(f"ffn.time_maa_{x}" for x in "kr"))
_READERS = {"w": "_log_decay", "k": "key", "v": "value", "r": "receptance", "g": "gate"}


class RWKV6(Headwise):
    """Version 6 as the rest of the package sees it."""

    number, operator = 6, "wkv6"
    time_mix, channel_mix, layer_state = TimeMix, ChannelMix, LayerState
    matrices = {  # noqa: RUF012 The dict is never changed.
        **{f"att.{name}": "tiles" for name in _ATT_MATRICES},
        **dict.fromkeys(("ffn.key", "ffn.receptance"), "tiles"),
        "ffn.value": "rows",  # Most of its inputs are zero; with rows kernels skip their weights.
    }
    float32_parameters = ("att.time_decay", "att.time_faaaa")
    decay_center = "att.time_decay"
    native_kernel = "Rwkv6"
    native_vectors = (
        *(f"att.time_maa_{x}" for x in "xwkvrg"),
        *("att.time_decay", "att.time_faaaa", "att.ln_x.weight", "att.ln_x.bias"),
        *("ffn.time_maa_k", "ffn.time_maa_r"),
    )
    native_factors = (
        *("att.time_maa_w1", "att.time_maa_w2", "att.time_decay_w1", "att.time_decay_w2"),
    )
    intermediates = {  # noqa: RUF012 The dict is never changed.
        **{f"att.mix_{x}": Place(f"att.{call}", "argument") for x, call in _READERS.items()},
        **{f"att.{call.strip('_')}": Place(f"att.{call}") for call in _READERS.values()},
        "att.wkv": Place("att.wkv"),
        "att.gated": Place("att.output", "argument"),
        "ffn.mix_k": Place("ffn.key", "argument"),
        "ffn.mix_r": Place("ffn.receptance", "argument"),
        "ffn.key": Place("ffn.key"),
        "ffn.receptance": Place("ffn.receptance"),
        "ffn.hidden": Place("ffn.value", "argument"),
        "ffn.value": Place("ffn.value"),
    }

    def default_extras(self, width: int) -> dict[str, float]:
        """The sizes of the published models."""
        double = 2 if width >= _WIDE else 1
        return super().default_extras(width) | {"mix_rank": 32 * double, "decay_rank": 64 * double}

    def default_ffn_width(self, width: int) -> int:
        """3.5 times the width, rounded down to a multiple of 32."""
        return max(32, 7 * width // 2 // 32 * 32)

    def infer(self, shapes: Mapping[str, Shape]) -> dict[str, Any]:
        """Read ranks and the size of a head."""
        extras = {
            "head_size": shapes["blocks.0.att.time_faaaa"][-1],
            "mix_rank": shapes["blocks.0.att.time_maa_w2"][-2],
            "decay_rank": shapes["blocks.0.att.time_decay_w1"][-1],
        }
        return super().infer(shapes) | {"extras": extras}

    def block_shapes(self, sizes: Sizes, layer: int) -> dict[str, Shape]:
        """The shapes of RWKV-v5/src/model.py (x060) in RWKV-LM."""
        width, hidden, extras = sizes.width, sizes.ffn_width, sizes.extras
        head_size, mixed = int(extras["head_size"]), int(extras["mix_rank"])
        decay, vector = int(extras["decay_rank"]), (1, 1, width)
        return {
            **{name: vector for name in _SHARES if name.startswith("att.")},
            "att.time_maa_w1": (width, len(_MIXED) * mixed),
            "att.time_maa_w2": (len(_MIXED), mixed, width),
            "att.time_decay": vector,
            "att.time_decay_w1": (width, decay),
            "att.time_decay_w2": (decay, width),
            "att.time_faaaa": (width // head_size, head_size),
            **{f"att.{x}.weight": (width, width) for x in _ATT_MATRICES},
            **dict.fromkeys(("att.ln_x.weight", "att.ln_x.bias"), (width,)),
            **{name: vector for name in _SHARES if name.startswith("ffn.")},
            "ffn.key.weight": (hidden, width),
            "ffn.receptance.weight": (width, width),
            "ffn.value.weight": (width, hidden),
        }

    def forward_flops_per_token(self, sizes: Sizes) -> int:
        """Those of matrices; the recurrence, about 6 N operations per channel, is not in them."""
        bonus = sizes.width  # It has two axes and is no matrix; time_maa_w2 has three, and is one.
        mixing = math.prod(self.block_shapes(sizes, 0)["att.time_maa_w2"])
        return super().forward_flops_per_token(sizes) + 2 * sizes.num_layers * (mixing - bonus)

    def log_decay(self, parameter: Tensor) -> Tensor:
        """The logarithm of the decay around which that of each token varies."""
        return log_decay(parameter)

    def kept_per_position(self, sizes: Sizes, element_bytes: int, *, inputs: bool) -> float:
        """About 19 vectors of C in the type of activations, and two of the decay in float32.

        There are also one of F, those of all ranks, and a state for every 32 positions.
        """
        width, extras = sizes.width, sizes.extras
        ranks = len(_MIXED) * int(extras["mix_rank"]) + int(extras["decay_rank"])
        narrow = (18 + (element_bytes < 4) + 14 * inputs) * width + (1 + inputs) * sizes.ffn_width
        wide_vectors = (2 + inputs) * width + int(extras["head_size"]) * width / 32
        return element_bytes * (narrow + ranks) + 4 * wide_vectors

    def example_vector(self, name: str, shape: Shape, generator: torch.Generator) -> Tensor:
        """Random values around those of TimeMix.initialize."""
        noise = torch.randn(shape, generator=generator)
        if name.endswith(("_w1", "_w2")):
            return 0.3 * noise / math.sqrt(shape[-2])
        line = torch.linspace(0, 1, shape[-1]).expand(shape)
        if name.endswith("time_decay"):
            return 5 * line - 6 + 0.1 * noise
        center = 1 - line if "time_maa" in name else float(name.endswith("weight"))
        return center + 0.1 * noise
