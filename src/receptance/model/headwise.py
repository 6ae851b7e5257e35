"""What RWKV-5, 6 and 7 share as architectures: heads, whose memory is a square matrix for each.

The last tensor in the state of a layer holds these matrices, and its name says which axis is which.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from receptance.model.architecture import Architecture, Shape, Sizes

HEAD_SIZE = 64
"""The channels of a head in the published models."""
GROUP_NORM_EPSILON = 64e-5
"""The epsilon of the norm of what a head has read, at every head size.

In the official code of RWKV-5 and 6 it is 1e-5 times the square of head_size_divisor, 8.
"""


class Headwise(Architecture):
    """A version whose time mixing has heads."""

    residual_outputs = ("att.output", "ffn.value")
    time_state = "value_by_key"
    native_extras = ("head_size", "group_norm_epsilon")

    def default_extras(self, width: int) -> dict[str, float]:
        """The sizes of the published models; a narrower one has one head."""
        return {"head_size": min(HEAD_SIZE, width), "group_norm_epsilon": GROUP_NORM_EPSILON}

    def check(self, sizes: Sizes) -> None:
        """The width is a number of whole heads."""
        head_size = sizes.extras["head_size"]
        if sizes.width % head_size:
            raise ValueError(
                f"the width is {sizes.width}; it must be a multiple of the head size, {head_size}"
            )

    def is_weight_decayed(self, name: str, shape: torch.Size | Shape) -> bool:
        """Whole matrices are decayed; those of low rank, decays and bonuses are not."""
        return super().is_weight_decayed(name, shape) and name.endswith(".weight")

    def state_shapes(self, sizes: Sizes) -> dict[str, Shape]:
        """Two vectors of C, and a square matrix for each head."""
        head_size = int(sizes.extras["head_size"])
        vector, matrices = (sizes.width,), (sizes.width // head_size, head_size, head_size)
        return dict(zip(self.state_fields, (vector, vector, matrices), strict=True))

    def empty_layer(self, sizes: Sizes, batch: int, like: Tensor) -> Any:
        """Everything is zero: the shifts in the dtype of `like`, the matrices in float32."""
        *_, matrices = self.state_shapes(sizes).values()
        shift = torch.zeros(batch, sizes.width, device=like.device, dtype=like.dtype)
        dtype = torch.promote_types(like.dtype, torch.float32)
        memory = torch.zeros(batch, *matrices, device=like.device, dtype=dtype)
        return self.layer_state(shift, shift, memory)

    def learnable_state(self, sizes: Sizes, strength: float) -> dict[str, Tensor]:
        """The matrices alone, with the axes of the official files of learned states: [L,H,N,N]."""
        *_, matrices = self.state_shapes(sizes).values()
        return {"value_by_key": torch.zeros(sizes.num_layers, *matrices)}

    def learned_state(self, learned: Mapping[str, Tensor], like: Tensor) -> dict[str, Tensor]:
        """The learned matrices behind a text of which no last token is known."""
        matrices = learned["value_by_key"]
        layers, heads, size, _ = matrices.shape
        time_shift, channel_shift, memory = self.state_fields
        if memory == "key_by_value":
            matrices = matrices.mT
        shift = matrices.new_zeros(layers, heads * size, dtype=like.dtype)
        matrices = matrices.to(torch.promote_types(like.dtype, torch.float32))
        return {time_shift: shift, channel_shift: shift, memory: matrices}
