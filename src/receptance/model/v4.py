"""RWKV-4 (arXiv 2305.13048): time mixing, channel mixing and their starting values.

    r, k, v = W_r mix_r(x), W_k mix_k(x), W_v mix_v(x)          equations 11 to 13
    o = W_o (sigmoid(r) * wkv(w, u, k, v))                      equations 16, 17
    o' = sigmoid(W'_r mix'_r(x)) * (W'_v relu(W'_k mix'_k(x))^2)  equations 14, 15, 18

Starting values are those of BlinkDL/RWKV-LM (RWKV-v4neo). The appendix of the paper prints others,
whose zero key matrix would leave channel mixing without a gradient for ever.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from receptance.model.architecture import Architecture, Place, Shape, Sizes
from receptance.model.parts import Linear, Reading, depth_fractions, mix, token_shift
from receptance.ops import Sources, WKVState, wkv4, wkv4_sources


class LayerState(NamedTuple):
    """The state of one layer: five vectors of C numbers for each row."""

    time_shift: Tensor  # [B,C], the last input of time mixing
    channel_shift: Tensor  # [B,C], the last input of channel mixing
    # The WKVState (see ops) is float32 in every dtype of the model: three tensors [B,C].
    numerator: Tensor
    denominator: Tensor
    exponent: Tensor

    @property
    def wkv(self) -> WKVState:
        """The three tensors that the recurrence reads and writes."""
        return WKVState(self.numerator, self.denominator, self.exponent)


class TimeMix(nn.Module):
    """Time mixing: a decaying average of values, weighted by keys and gated by receptance."""

    def __init__(self, sizes: Sizes, layer: int) -> None:
        super().__init__()
        width = sizes.width
        self.depth = (layer, sizes.num_layers)
        self.backend: str | None = None
        self.time_decay = nn.Parameter(torch.empty(width))  # log(-log of the decay per token)
        self.time_first = nn.Parameter(torch.empty(width))  # the bonus u
        self.time_mix_k = nn.Parameter(torch.empty(1, 1, width))
        self.time_mix_v = nn.Parameter(torch.empty(1, 1, width))
        self.time_mix_r = nn.Parameter(torch.empty(1, 1, width))
        self.key = Linear(width, width)
        self.value = Linear(width, width)
        self.receptance = Linear(width, width)
        self.output = Linear(width, width)

    def forward(self, x: Tensor, state: LayerState, reading: Reading) -> tuple[Tensor, LayerState]:
        """[B,T,C] -> [B,T,C], and the layer's next state."""
        previous, last = token_shift(x, state.time_shift, reading)
        r = self.receptance(mix(x, previous, self.time_mix_r))  # equation 11
        k = self.key(mix(x, previous, self.time_mix_k))  # equation 12
        v = self.value(mix(x, previous, self.time_mix_v))  # equation 13
        average, wkv = self.wkv(k, v, state.wkv, reading)  # equation 16
        out = self.output(torch.sigmoid(r) * average)  # equation 17
        return out, LayerState(last, state.channel_shift, *wkv)

    def wkv(
        self, key: Tensor, value: Tensor, state: WKVState, reading: Reading
    ) -> tuple[Tensor, WKVState]:
        """The averages [B,T,C] of values by keys [B,T,C], and the operator's next state."""
        return wkv4(
            log_decay(self.time_decay),
            self.time_first,
            key,
            value,
            state,
            resets=reading.resets,
            lengths=reading.lengths,
            backend=self.backend,
        )

    def sources(
        self, key: Tensor, value: Tensor, state: WKVState, reading: Reading, *, positions: Tensor
    ) -> Sources:
        """What the averages at `positions` [P] are made of; the other arguments are wkv's."""
        decay, bonus = log_decay(self.time_decay), self.time_first
        return wkv4_sources(
            decay, bonus, key, value, state, positions=positions, resets=reading.resets
        )

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Set the starting values, drawing the orthogonal matrix from the generator."""
        early, late = depth_fractions(*self.depth)
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
        """The learning-rate factors that differ from 1 (RWKV-v4neo, layerwise_lr)."""
        return {"time_decay": 2.0, "time_first": 3.0}


class ChannelMix(nn.Module):
    """Channel mixing: a feed-forward network with squared relu, gated by receptance."""

    def __init__(self, sizes: Sizes, layer: int) -> None:
        super().__init__()
        width, hidden = sizes.width, sizes.ffn_width
        self.depth = (layer, sizes.num_layers)
        self.time_mix_k = nn.Parameter(torch.empty(1, 1, width))
        self.time_mix_r = nn.Parameter(torch.empty(1, 1, width))
        self.key = Linear(width, hidden)
        self.receptance = Linear(width, width)
        self.value = Linear(hidden, width)

    def forward(self, x: Tensor, state: LayerState, reading: Reading) -> tuple[Tensor, LayerState]:
        """[B,T,C] -> [B,T,C], and the layer's next state."""
        previous, last = token_shift(x, state.channel_shift, reading)
        r = self.receptance(mix(x, previous, self.time_mix_r))  # equation 14
        k = self.key(mix(x, previous, self.time_mix_k))  # equation 15
        out = torch.sigmoid(r) * self.value(torch.relu(k).square())  # equation 18
        return out, LayerState(state.time_shift, last, *state.wkv)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Set the starting values, drawing the orthogonal matrix from the generator."""
        early, _ = depth_fractions(*self.depth)
        width = self.time_mix_k.shape[-1]
        share = torch.arange(width, dtype=torch.float64) / width
        self.time_mix_k[0, 0] = share**early
        self.time_mix_r[0, 0] = share**early
        self.key.orthogonal_(1, generator)
        for matrix in (self.receptance, self.value):
            nn.init.zeros_(matrix.weight)

    def learning_rate_scales(self) -> dict[str, float]:
        """The learning-rate factors that differ from 1, of which there are none."""
        return {}


def log_decay(time_decay: Tensor) -> Tensor:
    """The w of equation 16: the logarithm of the decay per token, never positive."""
    return -time_decay.exp()


# ---- the architecture ---------------------------------------------------------------------------

_MIXED = ("receptance", "key", "value")  # the matrices of time mixing that read mixtures of tokens


class RWKV4(Architecture):
    """Version 4 as the rest of the package sees it."""

    number, operator = 4, "wkv4"
    time_mix, channel_mix, layer_state = TimeMix, ChannelMix, LayerState
    matrices = {  # noqa: RUF012 The dict is never changed.
        **dict.fromkeys(("att.key", "att.value", "att.receptance", "att.output"), "tiles"),
        **dict.fromkeys(("ffn.key", "ffn.receptance"), "tiles"),
        "ffn.value": "rows",  # Most of its inputs are zero; with rows kernels skip their weights.
    }
    residual_outputs = ("att.output", "ffn.value")
    float32_parameters = ("att.time_decay", "att.time_first")
    static_decay = "att.time_decay"
    intermediates = {  # noqa: RUF012 The dict is never changed.
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
    native_kernel = "Rwkv4"
    native_vectors = (
        *("att.time_decay", "att.time_first"),
        *("att.time_mix_k", "att.time_mix_v", "att.time_mix_r", "ffn.time_mix_k", "ffn.time_mix_r"),
    )
    gpu_kernels = {  # noqa: RUF012 The dict is never changed.
        "att_shares": ("att.time_mix_k", "att.time_mix_v", "att.time_mix_r"),
        "projections": ("att.key", "att.value", "att.receptance"),
        "log_decay": ("att.time_decay",),
        "bonus": ("att.time_first",),
        "output": ("att.output",),
        "ffn_shares": ("ffn.time_mix_k", "ffn.time_mix_r"),
        "channel": ("ffn.key", "ffn.receptance"),
        "value": ("ffn.value",),
    }

    def block_shapes(self, sizes: Sizes, layer: int) -> dict[str, Shape]:
        """The shapes of RWKV-v4neo/src/model.py in RWKV-LM."""
        width, hidden = sizes.width, sizes.ffn_width
        return {
            **dict.fromkeys(("att.time_decay", "att.time_first"), (width,)),
            **{f"att.time_mix_{x}": (1, 1, width) for x in "kvr"},
            **{f"att.{x}.weight": (width, width) for x in _ATT_MATRICES},
            **{f"ffn.time_mix_{x}": (1, 1, width) for x in "kr"},
            "ffn.key.weight": (hidden, width),
            "ffn.receptance.weight": (width, width),
            "ffn.value.weight": (width, hidden),
        }

    def log_decay(self, parameter: Tensor) -> Tensor:
        """The w of equation 16."""
        return log_decay(parameter)

    def kept_per_position(self, sizes: Sizes, element_bytes: int, *, inputs: bool) -> float:
        """The bytes that a block saves per position, counted by vectors.

        Time mixing saves 6 vectors of C: the inputs of its layer norm and of the token shift, gate,
        key, value and average. Channel mixing saves 4, and one of its hidden width F. With `inputs`
        the shifted inputs and the inputs of matrices are saved as well. WKV adds three vectors of C
        in float32 for every 16 positions.
        """
        vectors = 10 * sizes.width + sizes.ffn_width
        if inputs:
            vectors += 8 * sizes.width + sizes.ffn_width
        return element_bytes * vectors + 3 * 4 * sizes.width / 16

    def state_shapes(self, sizes: Sizes) -> dict[str, Shape]:
        """The state is five vectors of C."""
        return dict.fromkeys(LayerState._fields, (sizes.width,))

    def empty_layer(self, sizes: Sizes, batch: int, like: Tensor) -> LayerState:
        """The shifts are zero, in the dtype of `like`, and the WKVState is empty."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        shift = torch.zeros(batch, sizes.width, device=like.device, dtype=like.dtype)
        wkv = WKVState.empty(batch, sizes.width, device=like.device, dtype=dtype)
        return LayerState(shift, shift, *wkv)

    @property
    def state_parts(self) -> dict[str, tuple[str, ...]]:
        """The three tensors of WKV mean nothing without each other."""
        shifts = ("time_shift", "channel_shift")
        return {**{name: (name,) for name in shifts}, "wkv": WKVState._fields}

    def interpolate(self, one: LayerState, other: LayerState, share: float) -> LayerState:
        """The sums a and b are interpolated, and not the three tensors that hold them."""
        exponent = torch.maximum(one.exponent, other.exponent)
        kept = (1 - share) * (one.exponent - exponent).exp()
        taken = share * (other.exponent - exponent).exp()
        return LayerState(
            torch.lerp(one.time_shift, other.time_shift, share),
            torch.lerp(one.channel_shift, other.channel_shift, share),
            one.numerator * kept + other.numerator * taken,
            one.denominator * kept + other.denominator * taken,
            exponent,
        )

    def learnable_state(self, sizes: Sizes, strength: float) -> dict[str, Tensor]:
        """Both shifts, and value and key of an imagined token that was read: [L,C] each.

        Every state with a positive denominator is the one after some such token.
        """
        zeros = torch.zeros(sizes.num_layers, sizes.width)
        learned = {name: zeros.clone() for name in ("time_shift", "channel_shift", "value")}
        return learned | {"key": torch.full_like(zeros, strength)}

    def learned_state(self, learned: Mapping[str, Tensor], like: Tensor) -> dict[str, Tensor]:
        """The state after the imagined token: numerator e^key value, denominator e^key."""
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        key = learned["key"]
        # The exponent has no gradient, because it cancels (see ops.reference). The key gets its
        # gradient through a factor that is always 1.
        weight = (key - key.detach()).exp()
        return {
            "time_shift": learned["time_shift"].to(like.dtype),
            "channel_shift": learned["channel_shift"].to(like.dtype),
            "numerator": (learned["value"] * weight).to(wide),
            "denominator": weight.to(wide),
            "exponent": key.detach().to(wide),
        }

    def example_vector(self, name: str, shape: Shape, generator: torch.Generator) -> Tensor:
        """Random values in the ranges of TimeMix.initialize."""
        line = torch.linspace(0, 1, shape[-1]).expand(shape)
        noise = torch.randn(shape, generator=generator)
        if name.endswith("time_decay"):
            return 8 * line - 5 + 0.1 * noise
        if "time_mix" in name:
            return (line + 0.01 * noise).clamp(0.01, 1)
        center = {"time_first": math.log(0.3), "weight": 1.0, "bias": 0.0}
        return center[name.rpartition(".")[2]] + 0.1 * noise


_ATT_MATRICES = ("key", "value", "receptance", "output")
