"""RWKV-7 (arXiv 2503.14456): time mixing, channel mixing and their starting values.

    r, k, v = W_r mix_r(x), W_k mix_k(x), W_v mix_v(x)
    log w = -e^{-1/2} sigmoid(w0 + tanh(mix_w(x) w1) w2)
    a = sigmoid(a0 + (mix_a(x) a1) a2)         g = sigmoid(mix_g(x) g1) g2
    v <- v + (v_first - v) sigmoid(v0 + (mix_v(x) v1) v2)
    kappa = normalize(k * k_k)                 k <- k (1 + (a - 1) k_a)
    S <- S diag(w) - (S kappa) (kappa a)^T + v k^T
    o = W_o (g * (norm(S r) + (r * r_k * k).sum() v))
    o' = W'_v relu(W'_k mix'_k(x))^2

Starting values are those of BlinkDL/RWKV-LM (RWKV-v7/train_temp), whose README has an older table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from receptance.model.architecture import Shape, Sizes
from receptance.model.headwise import Headwise
from receptance.model.parts import (
    GroupNorm,
    Linear,
    Reading,
    depth_fractions,
    low_rank,
    mix,
    orthogonal_,
    product,
    token_shift,
    wide,
)
from receptance.model.v7_places import INTERMEDIATES
from receptance.ops import Sources, wkv7, wkv7_sources

STRONGEST_DECAY = math.exp(-0.5)
"""The largest |log w|: at a token no channel keeps less than a share of 0.545."""
_SMALLEST_NORM = 1e-12  # This makes kappa zero where the key is zero.


class LayerState(NamedTuple):
    """The state of one layer: two vectors, and a matrix for each of H heads of N channels."""

    time_shift: Tensor  # [B,C], the last input of time mixing
    channel_shift: Tensor  # [B,C], the last input of channel mixing
    value_by_key: Tensor  # [B,H,N,N] float32: S, whose rows belong to values, columns to keys


class TimeMix(nn.Module):
    """Time mixing: a memory of values by keys, which each token fades, corrects and reads."""

    def __init__(self, sizes: Sizes, layer: int) -> None:
        super().__init__()
        width, extras = sizes.width, sizes.extras
        self.depth = (layer, sizes.num_layers)
        self.first = layer == 0
        self.heads = width // int(extras["head_size"])
        self.backend: str | None = None
        # The share of the preceding token in the inputs of each part.
        self.x_r, self.x_w, self.x_k = _vector(width), _vector(width), _vector(width)
        self.x_v, self.x_a, self.x_g = _vector(width), _vector(width), _vector(width)
        # The decay, the in-context learning rate, and the gate.
        self.w0 = _vector(width)
        self.w1, self.w2 = low_rank(width, int(extras["decay_rank"]))
        self.a0 = _vector(width)
        self.a1, self.a2 = low_rank(width, int(extras["rate_rank"]))
        self.g1, self.g2 = low_rank(width, int(extras["gate_rank"]))
        # The share of the first layer's value in this layer's. The first layer has them as well, in
        # every file, and never uses them.
        self.v0 = _vector(width)
        self.v1, self.v2 = low_rank(width, int(extras["value_rank"]))
        if self.first:
            for unused in (self.v0, self.v1, self.v2):
                unused.requires_grad_(False)
        self.k_k = _vector(width)  # the direction that is removed, relative to the key
        self.k_a = _vector(width)  # how much the learning rate scales the key
        self.r_k = nn.Parameter(torch.empty(self.heads, width // self.heads))  # the bonus
        self.receptance = Linear(width, width)
        self.key = Linear(width, width)
        self.value = Linear(width, width)
        self.output = Linear(width, width)
        self.ln_x = GroupNorm(self.heads, width, float(extras["group_norm_epsilon"]))

    def forward(
        self, x: Tensor, state: LayerState, reading: Reading, *handed: Tensor
    ) -> tuple[Tensor, LayerState, Tensor]:
        """[B,T,C] -> [B,T,C], the layer's next state, and the value of the first layer [B,T,C]."""
        previous, last = token_shift(x, state.time_shift, reading)
        r = self.receptance(mix(previous, x, self.x_r))
        k = self.key(mix(previous, x, self.x_k))
        v, v_first = self._value(mix(previous, x, self.x_v), *handed)
        log_decay = self._log_decay(mix(previous, x, self.x_w))
        rate = self._rate(mix(previous, x, self.x_a))
        gate = self._gate(mix(previous, x, self.x_g))
        removed = self._by_heads(k * self.k_k.to(x.dtype))
        kappa = F.normalize(wide(removed), dim=-1, eps=_SMALLEST_NORM).to(x.dtype)
        k = k * (1 + (rate - 1) * self.k_a.to(x.dtype))
        r, log_decay, k, v, rate = map(self._by_heads, (r, log_decay, k, v, rate))
        inputs = r, log_decay, k, v, -kappa, kappa * rate
        read, value_by_key = self.wkv(state.value_by_key, reading, *inputs)
        bonus = (r * self.r_k.to(x.dtype) * k).sum(-1, keepdim=True) * v
        out = self.output((self.ln_x(read.flatten(2)) + bonus.flatten(2)) * gate)
        return out, LayerState(last, state.channel_shift, value_by_key), v_first

    def wkv(self, state: Tensor, reading: Reading, *x: Tensor) -> tuple[Tensor, Tensor]:
        """What is read from the memory, [B,T,H,N], and its next state; x are the inputs of wkv7."""
        return wkv7(*x, state, **reading._asdict(), backend=self.backend)  # type: ignore[call-arg]

    def sources(self, state: Tensor, reading: Reading, *x: Tensor, positions: Tensor) -> Sources:
        """What is read at `positions` [P] is made of these; the other arguments are wkv's."""
        return wkv7_sources(x, state, positions=positions, resets=reading.resets)

    def _value(self, x: Tensor, *handed: Tensor) -> tuple[Tensor, Tensor]:
        """This layer's value [B,T,C], and that of the first layer, which is mixed into it."""
        value = self.value(x)
        if self.first:
            return value, value
        share = torch.sigmoid(self.v0.to(x.dtype) + product(product(x, self.v1), self.v2))
        return torch.lerp(value, handed[0], share), handed[0]

    def _log_decay(self, x: Tensor) -> Tensor:
        """The logarithm of the decay, [B,T,C] in float32 or wider."""
        varying = wide(product(torch.tanh(product(x, self.w1)), self.w2))
        return log_decay(self.w0.to(varying.dtype) + varying)

    def _rate(self, x: Tensor) -> Tensor:
        """The in-context learning rate: how much of what a key found before is replaced."""
        return torch.sigmoid(self.a0.to(x.dtype) + product(product(x, self.a1), self.a2))

    def _gate(self, x: Tensor) -> Tensor:
        return product(torch.sigmoid(product(x, self.g1)), self.g2)

    def _by_heads(self, x: Tensor) -> Tensor:
        """[B,T,C] -> [B,T,H,N]."""
        return x.reshape(*x.shape[:-1], self.heads, x.shape[-1] // self.heads)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Set the starting values, drawing the orthogonal matrices from the generator."""
        early, late = depth_fractions(*self.depth)
        width = self.w0.numel()
        channel = torch.arange(width, dtype=torch.float64)
        share, fraction = channel / width, channel / max(width - 1, 1)
        for name, power in zip(_SHARES, (0.2, 0.9, 0.7, 0.7, 0.9, 0.2), strict=True):
            self.get_parameter(name)[0, 0] = 1 - share ** (power * early)
        # Within a head: from -1 to 1, and flat in the middle.
        middle = (width // self.heads - 1) / 2
        place = (channel % (width // self.heads) - middle) / max(middle, 1)
        bend, line = place * place.abs(), fraction - 0.5
        self.w0[0, 0] = -5.5 + 6 * fraction ** (1 + late**0.3) + 2.5 * bend
        self.a0[0, 0] = -0.19 + 0.3 * bend + 0.4 * line
        self.v0[0, 0] = 0.73 - 0.4 * line
        self.k_k[0, 0] = 0.71 - 0.1 * line
        nn.init.constant_(self.k_a, 1.02)
        nn.init.constant_(self.r_k, -0.04)
        for narrow in (self.w1, self.a1, self.v1, self.g1, self.output.weight):
            nn.init.zeros_(narrow)
        for broad in (self.w2, self.a2, self.v2, self.g2):
            orthogonal_(broad, 0.1, generator)
        for matrix, scale in ((self.receptance, 1.0), (self.key, 0.1), (self.value, 1.0)):
            matrix.orthogonal_(scale, generator)
        layer, layers = self.depth
        nn.init.constant_(self.ln_x.weight, ((1 + layer) / layers) ** 0.7)

    def learning_rate_scales(self) -> dict[str, float]:
        """The learning-rate factors that differ from 1 (RWKV-v7/train_temp)."""
        return {"w0": 2.0}


class ChannelMix(nn.Module):
    """Channel mixing: a feed-forward network with squared relu."""

    def __init__(self, sizes: Sizes, layer: int) -> None:
        super().__init__()
        self.depth = (layer, sizes.num_layers)
        self.x_k = _vector(sizes.width)
        self.key = Linear(sizes.width, sizes.ffn_width)
        self.value = Linear(sizes.ffn_width, sizes.width)

    def forward(self, x: Tensor, state: LayerState, reading: Reading) -> tuple[Tensor, LayerState]:
        """[B,T,C] -> [B,T,C], and the layer's next state."""
        previous, last = token_shift(x, state.channel_shift, reading)
        k = self.key(mix(previous, x, self.x_k))
        out = self.value(torch.relu(k).square())
        return out, state._replace(channel_shift=last)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Set the starting values, drawing the orthogonal matrix from the generator."""
        early, _ = depth_fractions(*self.depth)
        width = self.x_k.numel()
        share = torch.arange(width, dtype=torch.float64) / width
        self.x_k[0, 0] = 1 - share ** (early**4)
        self.key.orthogonal_(1, generator)
        nn.init.zeros_(self.value.weight)

    def learning_rate_scales(self) -> dict[str, float]:
        """The learning-rate factors that differ from 1, of which there are none."""
        return {}


def log_decay(logit: Tensor) -> Tensor:
    """The logarithm of the decay per token: between -0.6066 and 0."""
    return -STRONGEST_DECAY * torch.sigmoid(logit)


def _vector(width: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(1, 1, width))


# ---- the architecture ---------------------------------------------------------------------------

_ATT_MATRICES = ("receptance", "key", "value", "output")
_RANKS = {"decay": "w", "rate": "a", "value": "v", "gate": "g"}
_LOW_RANK = tuple(f"{x}{i}" for x in _RANKS.values() for i in (1, 2))
_SHARES = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")
_VECTORS = tuple(f"att.{x}" for x in (*_SHARES, "w0", "a0", "v0", "k_k", "k_a"))


class RWKV7(Headwise):
    """Version 7 as the rest of the package sees it."""

    number, operator = 7, "wkv7"
    time_mix, channel_mix, layer_state = TimeMix, ChannelMix, LayerState
    matrices = {  # noqa: RUF012 The dict is never changed.
        **dict.fromkeys(("att.receptance", "att.key", "att.value", "att.output"), "tiles"),
        "ffn.key": "tiles",
        "ffn.value": "rows",  # Most of its inputs are zero; with rows kernels skip their weights.
    }
    float32_parameters = ("att.w0",)
    decay_center = "att.w0"
    native_kernel = "Rwkv7"
    native_vectors = (*_VECTORS, "att.r_k", "att.ln_x.weight", "att.ln_x.bias", "ffn.x_k")
    native_factors = tuple(f"att.{x}" for x in _LOW_RANK)
    intermediates = INTERMEDIATES

    def default_extras(self, width: int) -> dict[str, float]:
        """The sizes of RWKV-v7/train_temp; those of published models are in receptance.config."""
        factors = {"decay": 2.5, "rate": 2.5, "value": 1.7, "gate": 5.0}
        ranks = {f"{x}_rank": max(32, 32 * round(f * width**0.5 / 32)) for x, f in factors.items()}
        return super().default_extras(width) | ranks

    def infer(self, shapes: Mapping[str, Shape]) -> dict[str, Any]:
        """Read ranks and the size of a head; some files lack the unused tensors of block 0."""
        extras = {"head_size": shapes["blocks.0.att.r_k"][-1]}
        for name, x in _RANKS.items():
            found = (shapes.get(f"blocks.{layer}.att.{x}1") for layer in (0, 1))
            extras |= {f"{name}_rank": shape[-1] for shape in found if shape}
        return super().infer(shapes) | {"extras": extras}

    def block_shapes(self, sizes: Sizes, layer: int) -> dict[str, Shape]:
        """The shapes of RWKV-v7/train_temp/src/model.py in RWKV-LM."""
        width, hidden, extras = sizes.width, sizes.ffn_width, sizes.extras
        head_size = int(extras["head_size"])
        ranks = {x: int(extras[f"{name}_rank"]) for name, x in _RANKS.items()}
        return {
            **dict.fromkeys(_VECTORS, (1, 1, width)),
            **{f"att.{x}1": (width, rank) for x, rank in ranks.items()},
            **{f"att.{x}2": (rank, width) for x, rank in ranks.items()},
            "att.r_k": (width // head_size, head_size),
            **{f"att.{x}.weight": (width, width) for x in _ATT_MATRICES},
            **dict.fromkeys(("att.ln_x.weight", "att.ln_x.bias"), (width,)),
            "ffn.x_k": (1, 1, width),
            "ffn.key.weight": (hidden, width),
            "ffn.value.weight": (width, hidden),
        }

    def unused(self, sizes: Sizes) -> tuple[str, ...]:
        """The first block's share of its own value in itself."""
        return tuple(f"blocks.0.att.v{i}" for i in range(3))

    def forward_flops_per_token(self, sizes: Sizes) -> int:
        """Those of matrices; the recurrence, about 8 N operations per channel, is not in them."""
        bonuses, shapes = sizes.width * sizes.num_layers, self.shapes(sizes)  # r_k is no matrix.
        unused = sum(math.prod(shapes[n]) for n in self.unused(sizes) if len(shapes[n]) == 2)
        return super().forward_flops_per_token(sizes) - 2 * (bonuses + unused)

    def log_decay(self, parameter: Tensor) -> Tensor:
        """The logarithm of the decay around which that of each token varies."""
        return log_decay(parameter)

    def kept_per_position(self, sizes: Sizes, element_bytes: int, *, inputs: bool) -> float:
        """About 17 vectors of C in the type of activations, and two of the decay in float32.

        There are also one of F, those of all ranks, and a state for every 32 positions (native).
        """
        width, extras = sizes.width, sizes.extras
        ranks = sum(int(extras[f"{name}_rank"]) for name in _RANKS)
        narrow = (16 + (element_bytes < 4) + 14 * inputs) * width + (1 + inputs) * sizes.ffn_width
        wide_vectors = (2 + inputs) * width + int(extras["head_size"]) * width / 32
        return element_bytes * (narrow + ranks) + 4 * wide_vectors

    def example_vector(self, name: str, shape: Shape, generator: torch.Generator) -> Tensor:
        """Random values around those of TimeMix.initialize."""
        own = name.rpartition(".")[2]
        noise = torch.randn(shape, generator=generator)
        if own in _LOW_RANK:
            return noise / math.sqrt(shape[0])
        line = torch.linspace(0, 1, shape[-1]).expand(shape)
        centers: dict[str, Tensor | float] = {"w0": 6 * line - 5.5, "weight": 1.0}
        centers |= {"v0": 0.73, "k_k": 0.71, "k_a": 1.02, **dict.fromkeys(_SHARES, 1 - line)}
        return 0.1 * noise + centers.get(own, 0.0)
