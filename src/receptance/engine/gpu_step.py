"""A decoding step for every row of a batch, on fixed buffers so that a CUDA graph can record it."""

from __future__ import annotations

import torch
from torch import Tensor

from receptance.config import ModelConfig
from receptance.engine.gpu_weights import GpuLayer, GpuWeights, times
from receptance.ops import triton_steps as kernels
from receptance.ops.triton_products import Epilogue, Tiles, product
from receptance.ops.triton_weights import Weights


class Buffers:
    """The memory that a step over B rows reads and writes: its addresses never change."""

    def __init__(self, config: ModelConfig, batch: int, device: torch.device) -> None:
        width, parts = config.width, len(config.architecture.state_fields)

        def floats(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device)

        self.tokens = torch.zeros(batch, device=device, dtype=torch.int64)
        self.state = floats(parts, config.num_layers, batch, width)
        """[parts,L,B,C], with the parts in the order of Architecture.state_fields."""
        self.features = floats(batch, width)
        self.x, self.gated, self.mixed = (floats(n, batch, width) for n in (1, 1, 3))
        self.projected = floats(3, batch, width)
        self.channel = floats(batch * (config.ffn_width + width))
        self.hidden = self.channel[: batch * config.ffn_width].view(1, batch, config.ffn_width)
        self.receptance = self.channel[batch * config.ffn_width :].view(batch, width)


def step(weights: GpuWeights, buffers: Buffers, tiles: Tiles) -> None:
    """Read one token per row from the buffers, advance their state and write their features."""
    x = buffers.x[0]
    kernels.embed(weights.embedding, buffers.tokens, weights.ln0, x)
    for i, layer in enumerate(weights.layers):
        att_last, ffn_last, *wkv = buffers.state[:, i].unbind(0)
        kernels.mix(x, layer.ln1, att_last, layer.att_shares, buffers.mixed)
        time_mix(layer, tuple(wkv), buffers, tiles)
        multiply(layer.output, buffers.gated, x, "add", tiles=tiles)
        kernels.mix(x, layer.ln2, ffn_last, layer.ffn_shares, buffers.mixed)
        multiply(layer.channel, buffers.mixed, buffers.channel, "activate", tiles=tiles)
        multiply(layer.value, buffers.hidden, x, "gate", gate=buffers.receptance, tiles=tiles)
    kernels.mix(x, weights.ln_out, x, buffers.mixed[:0], buffers.features)


def time_mix(layer: GpuLayer, wkv: tuple[Tensor, ...], buffers: Buffers, tiles: Tiles) -> None:
    """Compute the projections, WKV and the gate: mixed [3,B,C], wkv [B,C] -> gated [1,B,C], wkv."""
    vectors = layer.log_decay, layer.bonus
    if buffers.mixed.shape[1] <= tiles.most(layer.projections.kind):
        kernels.time_mix(
            layer.projections, buffers.mixed, *vectors, wkv, buffers.gated, tiles=tiles
        )
        return
    multiply(layer.projections, buffers.mixed, buffers.projected, tiles=tiles)
    kernels.average(buffers.projected, *vectors, wkv, buffers.gated)


def multiply(
    weights: Weights,
    x: Tensor,
    out: Tensor,
    epilogue: Epilogue = "store",
    *,
    gate: Tensor | None = None,
    tiles: Tiles,
) -> None:
    """Write what `triton_products.product` does: its kernel for few rows, torch for many."""
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
