"""RWKV-5 (arXiv 2404.05892) in its three forms: 5.2, which is Eagle, and 5.1 and 5.0 before it.

    r, k, v = W_r mix_r(x), W_k mix_k(x), W_v mix_v(x)     g = silu(W_g mix_g(x))
    y = (S + diag(u) k v^T)^T r                            S <- diag(w) S + k v^T
    o = W_o (g * norm(y))
    o' = sigmoid(W'_r mix'_r(x)) * W'_v relu(W'_k mix'_k(x))^2

log w = -exp(d). In 5.2 every channel has its d and u, in 5.1 and 5.0 every head; 5.0 has no gate g.
Starting values are those of BlinkDL/RWKV-LM (RWKV-v5/src/model.py, x052), and for 5.1 and 5.0 those
of its earlier RWKV_TimeMix_RWKV5_Preview.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

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
    mix,
    token_shift,
)
from receptance.ops import Sources, wkv6, wkv6_sources


class LayerState(NamedTuple):
    """The state of one layer: two vectors, and a matrix for each of H heads of N channels."""

    time_shift: Tensor  # [B,C], the last input of time mixing
    channel_shift: Tensor  # [B,C], the last input of channel mixing
    key_by_value: Tensor  # [B,H,N,N] float32: S, whose rows belong to keys, columns to values


class TimeMix(nn.Module):
    """Time mixing of 5.2: a memory of values by keys, which each token reads, fades and adds to."""

    per_channel: ClassVar[bool] = True
    """Whether decays and bonuses belong to channels, and not to heads."""
    gated: ClassVar[bool] = True
    """Whether there is a gate."""

    def __init__(self, sizes: Sizes, layer: int) -> None:
        super().__init__()
        width, extras = sizes.width, sizes.extras
        self.depth = (layer, sizes.num_layers)
        self.heads, self.head_size = width // int(extras["head_size"]), int(extras["head_size"])
        self.backend: str | None = None
        # The share of the token itself, and not of the one before it, in the inputs of each part.
        self.time_mix_k, self.time_mix_v = _vector(width), _vector(width)
        self.time_mix_r = _vector(width)
        shape = (self.heads, self.head_size) if self.per_channel else (self.heads,)
        self.time_decay = nn.Parameter(torch.empty(shape))
        self.time_faaaa = nn.Parameter(torch.empty(shape))  # the bonus
        self.receptance = Linear(width, width)
        self.key = Linear(width, width)
        self.value = Linear(width, width)
        if self.gated:
            self.time_mix_g = _vector(width)
            self.gate = Linear(width, width)
        self.output = Linear(width, width)
        self.ln_x = GroupNorm(self.heads, width, float(extras["group_norm_epsilon"]))

    def forward(self, x: Tensor, state: LayerState, reading: Reading) -> tuple[Tensor, LayerState]:
        """[B,T,C] -> [B,T,C], and the layer's next state."""
        previous, last = token_shift(x, state.time_shift, reading)
        r = self._by_heads(self.receptance(mix(x, previous, self.time_mix_r)))
        k = self._by_heads(self.key(mix(x, previous, self.time_mix_k)))
        v = self._by_heads(self.value(mix(x, previous, self.time_mix_v)))
        read, key_by_value = self.wkv(state.key_by_value, reading, r, k, v)
        read = self.ln_x(read.flatten(2))
        if self.gated:
            read = read * F.silu(self.gate(mix(x, previous, self.time_mix_g)))
        return self.output(read), LayerState(last, state.channel_shift, key_by_value)

    def wkv(self, state: Tensor, reading: Reading, *x: Tensor) -> tuple[Tensor, Tensor]:
        """What is read from the memory, [B,T,H,N], and its next state; x are r, k and v."""
        (r, k, v), (decay, bonus) = x, self._constants()
        return wkv6(r, decay, k, v, bonus, state, **reading._asdict(), backend=self.backend)

    def sources(self, state: Tensor, reading: Reading, *x: Tensor, positions: Tensor) -> Sources:
        """What is read at `positions` [P] is made of these; the other arguments are wkv's."""
        (r, k, v), (decay, bonus) = x, self._constants()
        inputs = r, decay.expand(r.shape), k, v
        return wkv6_sources(inputs, bonus, state, positions=positions, resets=reading.resets)

    def _constants(self) -> tuple[Tensor, Tensor]:
        """The logarithm of the decay, and the bonus: [H,N] each."""
        shape = self.heads, self.head_size
        decay, bonus = (x.reshape(self.heads, -1) for x in (self.time_decay, self.time_faaaa))
        return log_decay(decay).expand(shape), bonus.expand(shape)

    def _by_heads(self, x: Tensor) -> Tensor:
        """[B,T,C] -> [B,T,H,N]."""
        return x.reshape(*x.shape[:-1], self.heads, self.head_size)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Set the starting values, drawing the orthogonal matrices from the generator."""
        early, late = depth_fractions(*self.depth)
        width = self.time_mix_k.numel()
        share = torch.arange(width, dtype=torch.float64) / width
        self.time_mix_k[0, 0] = share**early
        self.time_mix_v[0, 0] = share**early + 0.3 * late
        self.time_mix_r[0, 0] = share ** (0.5 * early)
        count = self.time_decay.numel()
        number = torch.arange(count, dtype=torch.float64)
        fraction = number / max(count - 1, 1)
        decay = -6 + 5 * fraction ** (0.7 + 1.3 * late)
        self.time_decay.copy_(decay.view_as(self.time_decay))
        zigzag = 0.1 * ((number + 1) % 3 - 1) if self.per_channel else 0
        self.time_faaaa.copy_((late * (1 - fraction) + zigzag).view_as(self.time_faaaa))
        scales = {self.receptance: 1.0, self.key: 0.1, self.value: 1.0}
        if self.gated:
            self.time_mix_g[0, 0] = share ** (0.5 * early)
            scales[self.gate] = 0.1
        for matrix, scale in scales.items():
            nn.init.orthogonal_(matrix.weight, gain=scale, generator=generator)
        nn.init.zeros_(self.output.weight)
        nn.init.constant_(self.ln_x.weight, ((1 + self.depth[0]) / self.depth[1]) ** 0.7)

    def learning_rate_scales(self) -> dict[str, float]:
        """The learning-rate factors that differ from 1 (RWKV-v5, layerwise_lr)."""
        return {"time_decay": 2.0}


class HeadwiseTimeMix(TimeMix):
    """Time mixing of 5.1: as in 5.2, with one decay and one bonus for a whole head."""

    per_channel = False


class UngatedTimeMix(HeadwiseTimeMix):
    """Time mixing of 5.0: as in 5.1, without a gate."""

    gated = False


class ChannelMix(nn.Module):
    """Channel mixing: a feed-forward network with squared relu, gated by receptance."""

    def __init__(self, sizes: Sizes, layer: int) -> None:
        super().__init__()
        width, hidden = sizes.width, sizes.ffn_width
        self.depth = (layer, sizes.num_layers)
        self.time_mix_k, self.time_mix_r = _vector(width), _vector(width)
        self.key = Linear(width, hidden)
        self.receptance = Linear(width, width)
        self.value = Linear(hidden, width)

    def forward(self, x: Tensor, state: LayerState, reading: Reading) -> tuple[Tensor, LayerState]:
        """[B,T,C] -> [B,T,C], and the layer's next state."""
        previous, last = token_shift(x, state.channel_shift, reading)
        k = self.key(mix(x, previous, self.time_mix_k))
        r = self.receptance(mix(x, previous, self.time_mix_r))
        out = torch.sigmoid(r) * self.value(torch.relu(k).square())
        return out, state._replace(channel_shift=last)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Set the starting values, drawing the orthogonal matrix from the generator."""
        early, _ = depth_fractions(*self.depth)
        width = self.time_mix_k.numel()
        share = torch.arange(width, dtype=torch.float64) / width
        self.time_mix_k[0, 0] = self.time_mix_r[0, 0] = share**early
        nn.init.orthogonal_(self.key.weight, generator=generator)
        for matrix in (self.receptance, self.value):
            nn.init.zeros_(matrix.weight)

    def learning_rate_scales(self) -> dict[str, float]:
        """The learning-rate factors that differ from 1, of which there are none."""
        return {}


def log_decay(parameter: Tensor) -> Tensor:
    """The logarithm of the decay per token, never positive."""
    return -parameter.exp()


def _vector(width: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(1, 1, width))


# ---- the architectures --------------------------------------------------------------------------

_MIXED = ("receptance", "key", "value")  # the matrices of time mixing that read mixtures of tokens
_INTERMEDIATES = {
    **{f"att.mix_{x[0]}": Place(f"att.{x}", "argument") for x in _MIXED},
    **{f"att.{x}": Place(f"att.{x}") for x in _MIXED},
    "att.wkv": Place("att.wkv"),
    "att.gated": Place("att.output", "argument"),
    "ffn.mix_k": Place("ffn.key", "argument"),
    "ffn.mix_r": Place("ffn.receptance", "argument"),
    "ffn.key": Place("ffn.key"),
    "ffn.receptance": Place("ffn.receptance"),
    "ffn.hidden": Place("ffn.value", "argument"),
    "ffn.value": Place("ffn.value"),
}
_GATE = {"att.mix_g": Place("att.gate", "argument"), "att.gate": Place("att.gate")}


class RWKV52(Headwise):
    """Version 5.2 as the rest of the package sees it."""

    number, operator = 5.2, "wkv6"
    time_mix: ClassVar[type[TimeMix]] = TimeMix
    channel_mix, layer_state = ChannelMix, LayerState
    matrices = {  # noqa: RUF012 The dict is never changed.
        **dict.fromkeys(("att.receptance", "att.key", "att.value", "att.gate"), "tiles"),
        **dict.fromkeys(("att.output", "ffn.key", "ffn.receptance"), "tiles"),
        "ffn.value": "rows",  # Most of its inputs are zero; with rows kernels skip their weights.
    }
    float32_parameters = ("att.time_decay", "att.time_faaaa")
    static_decay = "att.time_decay"
    intermediates = _INTERMEDIATES | _GATE
    native_kernel: ClassVar[str | None] = "Rwkv5"
    native_vectors = (
        *(f"att.time_mix_{x}" for x in "kvrg"),
        *("att.time_decay", "att.time_faaaa", "att.ln_x.weight", "att.ln_x.bias"),
        *("ffn.time_mix_k", "ffn.time_mix_r"),
    )

    def default_ffn_width(self, width: int) -> int:
        """3.5 times the width, rounded down to a multiple of 32."""
        return max(32, 7 * width // 2 // 32 * 32)

    def infer(self, shapes: Mapping[str, Shape]) -> dict[str, Any]:
        """Read the size of a head off the number of decays."""
        found, decays = super().infer(shapes), shapes["blocks.0.att.time_decay"]
        return found | {"extras": {"head_size": max(1, found["width"] // max(1, decays[0]))}}

    def block_shapes(self, sizes: Sizes, layer: int) -> dict[str, Shape]:
        """The shapes of RWKV-v5/src/model.py (x052) in RWKV-LM."""
        width, hidden, head_size = sizes.width, sizes.ffn_width, int(sizes.extras["head_size"])
        mixing, vector = self.time_mix, (1, 1, width)
        heads: Shape = (width // head_size,)
        shape = (*heads, head_size) if mixing.per_channel else heads
        matrices = [name for name in self.matrices if name.startswith("att.")]
        return {
            **{f"att.time_mix_{x}": vector for x in ("kvrg" if mixing.gated else "kvr")},
            **dict.fromkeys(("att.time_decay", "att.time_faaaa"), shape),
            **{f"{name}.weight": (width, width) for name in matrices},
            **dict.fromkeys(("att.ln_x.weight", "att.ln_x.bias"), (width,)),
            **{f"ffn.time_mix_{x}": vector for x in "kr"},
            "ffn.key.weight": (hidden, width),
            "ffn.receptance.weight": (width, width),
            "ffn.value.weight": (width, hidden),
        }

    def forward_flops_per_token(self, sizes: Sizes) -> int:
        """Those of matrices; the recurrence, about 6 N operations per channel, is not in them."""
        shapes = self.block_shapes(sizes, 0)
        others = (x for n, x in shapes.items() if len(x) == 2 and not n.endswith(".weight"))
        constants = sum(rows * columns for rows, columns in others)
        return super().forward_flops_per_token(sizes) - 2 * sizes.num_layers * constants

    def log_decay(self, parameter: Tensor) -> Tensor:
        """The logarithm of the decay per token."""
        return log_decay(parameter)

    def kept_per_position(self, sizes: Sizes, element_bytes: int, *, inputs: bool) -> float:
        """About 16 vectors of C in the type of activations, and the decay in float32.

        There are also one of F, and a state for every 32 positions.
        """
        width = sizes.width
        narrow = (15 + (element_bytes < 4) + 8 * inputs) * width + (1 + inputs) * sizes.ffn_width
        return element_bytes * narrow + 4 * width * (1 + int(sizes.extras["head_size"]) / 32)

    def example_vector(self, name: str, shape: Shape, generator: torch.Generator) -> Tensor:
        """Random values around those of TimeMix.initialize."""
        line, noise = (
            torch.linspace(0, 1, shape[-1]).expand(shape),
            torch.randn(shape, generator=generator),
        )
        if name.endswith("time_decay"):
            return 5 * line - 6 + 0.1 * noise
        if "time_mix" in name:
            return (line + 0.01 * noise).clamp(0.01, 1)
        return float(name.endswith("weight")) + 0.1 * noise


class RWKV51(RWKV52):
    """Version 5.1 as the rest of the package sees it."""

    number, time_mix, native_kernel = 5.1, HeadwiseTimeMix, None


class RWKV50(RWKV51):
    """Version 5.0 as the rest of the package sees it."""

    number, time_mix = 5.0, UngatedTimeMix
    matrices = {  # noqa: RUF012 The dict is never changed.
        name: layout for name, layout in RWKV52.matrices.items() if name != "att.gate"
    }
    intermediates = _INTERMEDIATES
