"""One token of every row of a batch: kernels over fixed buffers, which a CUDA graph can record."""

from __future__ import annotations

import torch
from torch import Tensor

from receptance.config import ModelConfig
from receptance.engine.gpu_weights import GpuLayer, GpuWeights, times
from receptance.ops import triton_steps as kernels
from receptance.ops.triton_products import Epilogue, Tiles, product
from receptance.ops.triton_weights import Weights


class Buffers:
    """What a step over B rows reads and writes, always at the same addresses."""

    def __init__(self, config: ModelConfig, batch: int, device: torch.device) -> None:
        width, parts = config.width, len(config.architecture.state_fields)

        def floats(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device)

        self.tokens = torch.zeros(batch, device=device, dtype=torch.int64)
        self.state = floats(parts, config.num_layers, batch, width)
        """In the order of Architecture.state_fields."""
        self.features = floats(batch, width)
        self.x, self.gated, self.mixed = (floats(n, batch, width) for n in (1, 1, 3))
        self.projected = floats(3, batch, width)
        self.channel = floats(batch * (config.ffn_width + width))
        self.hidden = self.channel[: batch * config.ffn_width].view(1, batch, config.ffn_width)
        self.receptance = self.channel[batch * config.ffn_width :].view(batch, width)


def step(weights: GpuWeights, to: Buffers, tiles: Tiles) -> None:
    """Read `to.tokens`, move `to.state` on by them, write `to.features`."""
    x = to.x[0]
    kernels.embed(weights.embedding, to.tokens, weights.ln0, x)
    for i, layer in enumerate(weights.layers):
        att_last, ffn_last, *wkv = to.state[:, i].unbind(0)
        kernels.mix(x, layer.ln1, att_last, layer.att_shares, to.mixed)
        time_mix(layer, tuple(wkv), to, tiles)
        multiply(layer.output, to.gated, x, "add", tiles=tiles)
        kernels.mix(x, layer.ln2, ffn_last, layer.ffn_shares, to.mixed)
        multiply(layer.channel, to.mixed, to.channel, "activate", tiles=tiles)
        multiply(layer.value, to.hidden, x, "gate", gate=to.receptance, tiles=tiles)
    kernels.mix(x, weights.ln_out, x, to.mixed[:0], to.features)


def time_mix(layer: GpuLayer, wkv: tuple[Tensor, ...], to: Buffers, tiles: Tiles) -> None:
    """Projections, WKV and gate: `to.mixed` and the state [B,C] to `to.gated` and the state."""
    vectors = layer.log_decay, layer.bonus
    if to.mixed.shape[1] <= tiles.most(layer.projections.kind):
        kernels.time_mix(layer.projections, to.mixed, *vectors, wkv, to.gated, tiles=tiles)
        return
    multiply(layer.projections, to.mixed, to.projected, tiles=tiles)
    kernels.average(to.projected, *vectors, wkv, to.gated)


def multiply(
    weights: Weights,
    x: Tensor,
    out: Tensor,
    epilogue: Epilogue = "store",
    *,
    gate: Tensor | None = None,
    tiles: Tiles,
) -> None:
    """`triton_products.product` for few rows, the same with torch's products for many."""
    if x.shape[-2] <= tiles.most(weights.kind):
        product(weights, x, out, epilogue, gate=gate, tiles=tiles)
        return
    start, flat = 0, out.view(-1)
    for i in range(weights.matrices):
        stop = start + (weights.rest if i else weights.first)
        y = times(weights, slice(start, stop), x[i])
        piece = flat[start * len(y) : stop * len(y)].view_as(y)
        start = stop
        if epilogue == "activate":
            y = y.sigmoid_() if i else y.relu_().square_()
        if gate is not None:
            y *= gate
        piece.copy_(y if epilogue in ("store", "activate") else piece + y)
