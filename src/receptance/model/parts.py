"""What the versions of RWKV share: token shift, and layers with an explicit policy on dtypes.

Activations have the compute dtype, parameters may be wider (float32 masters while training in
bfloat16); every layer casts what it needs to the dtype of its input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# With fewer rows than this a product is bound by reading the weights, and narrow ones win.
_FEW_ROWS = 8

# Without bf16 instructions torch multiplies 5 times slower than in float32. A constant, because
# torch.compile follows no cached function.
_CPU_MULTIPLIES_BFLOAT16 = bool(torch.cpu._is_avx512_bf16_supported()) or (
    torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2", "AVX512")
)


class Linear(nn.Module):
    """A matrix without bias, weight [out,in] as in the official files."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in x's dtype."""
        weight = self.weight
        slow = x.dtype == torch.bfloat16 and x.is_cpu and not _CPU_MULTIPLIES_BFLOAT16
        few_rows = weight.dtype == x.dtype and x.numel() <= _FEW_ROWS * x.shape[-1]
        if slow and not few_rows:
            return F.linear(x.float(), weight.float()).to(x.dtype)
        return F.linear(x, weight.to(x.dtype))

    def orthogonal_(self, scale: float, generator: torch.Generator) -> None:
        """Orthogonal start; a matrix that widens keeps the scale of its output (RWKV-LM)."""
        outputs, inputs = self.weight.shape
        gain = scale * max(1.0, outputs / inputs) ** 0.5
        nn.init.orthogonal_(self.weight, gain=gain, generator=generator)


class LayerNorm(nn.Module):
    """Layer norm with weight and bias, starting as the identity."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C], in x's dtype."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, weight.shape, weight, bias, self.epsilon)


def token_shift(
    x: Tensor, last: Tensor, resets: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Each position's predecessor, and the row's last one: [B,T,C], [B,C] -> [B,T,C], [B,C].

    A position with resets [B,T] has no predecessor: it sees zero (equations 11 to 15, x_0 = 0).
    """
    extended = torch.cat([last.to(x.dtype)[:, None], x], dim=1)
    previous = extended[:, :-1]
    if resets is not None:
        previous = previous.masked_fill(resets[..., None], 0)
    if lengths is None:
        return previous, extended[:, -1]
    rows = torch.arange(x.shape[0], device=x.device)
    return previous, extended[rows, lengths]


def mix(previous: Tensor, x: Tensor, share: Tensor) -> Tensor:
    """share of x and 1 - share of its predecessor: [B,T,C], [B,T,C], [1,1,C] -> [B,T,C]."""
    return torch.lerp(previous, x, share.to(x.dtype))
