"""A Transformer to compare with: the same inputs, head and budget, attention instead of RWKV.

A block is that of GPT-NeoX with sequential sums: layer norm, rotary attention, layer norm, a
feed-forward network with GELU, biases everywhere. Starting values are GPT-2's.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from receptance.model.heads import Affine, Answering, SequenceConfig
from receptance.model.parts import LayerNorm
from receptance.model.sequences import SequenceModel

_EPSILON = 1e-5
_ROTARY_BASE = 10_000
_SPREAD = 0.02  # the standard deviation of starting values (GPT-2)
_HEAD_SIZE = 64


class Transformer(Answering):
    """Attention blocks with a head for classes or numbers, causal unless config is bidirectional.

    Its width and layers are those of config. Its feed-forward width is solved for, so that the
    blocks have as many parameters as those of the RWKV stack of the same config.
    """

    def __init__(
        self,
        config: SequenceConfig,
        *,
        seed: int = 0,
        dropout: float = 0.0,
        heads: int | None = None,
        ffn_width: int | None = None,
    ) -> None:
        """heads of attention: by default one for every 64 channels, at least one."""
        generator, width = torch.Generator().manual_seed(seed), config.stack.width
        super().__init__(config, width, generator, dropout=dropout, embedding_bound=_SPREAD)
        heads = heads or max(1, width // _HEAD_SIZE)
        if width % (2 * heads):
            raise ValueError(
                f"the width {width} cannot be divided into {heads} heads of even size; take a "
                f"multiple of {2 * heads}"
            )
        hidden = ffn_width or matched_ffn_width(config)
        layers = config.stack.num_layers
        self.blocks = nn.ModuleList(_Block(width, hidden, heads) for _ in range(layers))
        self.ln_out = LayerNorm(width, _EPSILON)
        for block in self._blocks:
            block.initialize(generator, layers)

    @property
    def _blocks(self) -> list[_Block]:
        return cast(list[_Block], list(self.blocks))

    def state_size(self, length: int) -> int:
        """The keys and values of all positions, in all layers: the cache of a decoder."""
        return 2 * length * self.config.stack.width * len(self.blocks)

    def is_weight_decayed(self, name: str, shape: torch.Size) -> bool:
        """Whether weight decay acts on a parameter, as it does on matrices."""
        return len(shape) >= 2

    def _read(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        visible = self._visible(x, lengths)
        for block in self._blocks:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, visible, self.dropout, use_reentrant=False)
            else:
                x = block(x, visible, self.dropout)
        return cast(Tensor, self.ln_out(x))

    def _visible(self, x: Tensor, lengths: Tensor | None) -> Tensor | None:
        """Which positions each position sees, [B,1,T,T] bool; None stands for all before it."""
        if not self.config.bidirectional:
            return None  # Padding stands behind what a causal model reads.
        count = x.shape[1]
        places = torch.arange(count, device=x.device)
        if lengths is None:
            return torch.ones(1, 1, count, count, dtype=torch.bool, device=x.device)
        return (places < lengths[:, None])[:, None, None].expand(-1, 1, count, -1)


class _Block(nn.Module):
    """x + attention, then x + feed-forward, each after its own layer norm."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = LayerNorm(width, _EPSILON), LayerNorm(width, _EPSILON)
        self.projections = Affine(width, 3 * width)  # query, key and value, each [C]
        self.output = Affine(width, width)
        self.up, self.down = Affine(width, hidden), Affine(hidden, width)

    def forward(self, x: Tensor, visible: Tensor | None, dropout: float) -> Tensor:
        """[B,T,C] -> [B,T,C]."""
        split = self.projections(self.ln1(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each [B,H,T,C/H]
        mixed = F.scaled_dot_product_attention(
            rotated(query), rotated(key), value, attn_mask=visible, is_causal=visible is None
        )
        mixed = self.output(mixed.transpose(1, 2).flatten(2))
        x = x + F.dropout(mixed, dropout, self.training)
        mixed = self.down(F.gelu(self.up(self.ln2(x))))
        return cast(Tensor, x + F.dropout(mixed, dropout, self.training))

    @torch.no_grad()
    def initialize(self, generator: torch.Generator, layers: int) -> None:
        """Draw GPT-2's starting values: smaller ones for what is added to the residual stream."""
        for part in (self.projections, self.up, self.output, self.down):
            residual = part in (self.output, self.down)
            spread = _SPREAD / (2 * layers) ** 0.5 if residual else _SPREAD
            part.weight.normal_(0, spread, generator=generator)


def rotated(x: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864), in halves as GPT-NeoX has them: [B,H,T,D] -> same."""
    half = x.shape[-1] // 2
    rates = _ROTARY_BASE ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = torch.arange(x.shape[-2], device=x.device)[:, None] * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    one, other = x[..., :half], x[..., half:]
    return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1)


def matched_ffn_width(config: SequenceConfig) -> int:
    """The feed-forward width with which the Transformer has as many parameters in its blocks.

    ValueError if the attention alone has more.
    """
    with torch.device("meta"):
        model = SequenceModel(config)
    parts = (x for name, x in model.named_parameters() if "blocks." in name)
    width, layers = config.stack.width, config.stack.num_layers
    budget = sum(x.numel() for x in parts) / layers
    attention = 4 * width * width + 4 * width
    norms, bias = 4 * width, width
    hidden = round((budget - attention - norms - bias) / (2 * width + 1))
    if hidden < 1:
        raise ValueError(f"no Transformer of width {width} is as small as this RWKV stack")
    return hidden
