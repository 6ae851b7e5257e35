"""What the versions of RWKV share: token shift, and layers with an explicit policy on dtypes.

Activations have the compute dtype, parameters may be wider (float32 masters while training in
bfloat16); every layer casts what it needs to the dtype of its input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# With fewer rows than this a product is bound by reading the weights, and narrow ones win.
_FEW_ROWS = 8

# Of a product in a wider type, at a time.
_WIDE_ROWS = 512


def _cpu_multiplies_bfloat16() -> bool:
    """Whether torch's products of bfloat16 are faster than those of float32.

    Without instructions for it they take 5 times as long. AVX512-BF16 alone is half as fast as
    float32 on Intel's processors (measured on Emerald Rapids), and by the documentation twice as
    fast on AMD's.
    """
    if torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2", "AVX512"):
        return True  # not x86, and more than the least
    if torch.cpu._is_amx_tile_supported():
        return True
    named = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.cpu._is_avx512_bf16_supported() and "AMD" in str(named.get("cpu_name"))


# A constant, because torch.compile follows no cached function.
CPU_MULTIPLIES_BFLOAT16 = _cpu_multiplies_bfloat16()


class Linear(nn.Module):
    """A matrix without bias, weight [out,in] as in the official files."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in x's dtype."""
        weight = self.weight
        slow = x.dtype == torch.bfloat16 and x.is_cpu and not CPU_MULTIPLIES_BFLOAT16
        few_rows = weight.dtype == x.dtype and x.numel() <= _FEW_ROWS * x.shape[-1]
        if slow and not few_rows:
            return _WideProduct.apply(x, weight)  # type: ignore[no-any-return]
        return F.linear(x, weight.to(x.dtype))

    def orthogonal_(self, scale: float, generator: torch.Generator) -> None:
        """Orthogonal start; a matrix that widens keeps the scale of its output (RWKV-LM)."""
        outputs, inputs = self.weight.shape
        gain = scale * max(1.0, outputs / inputs) ** 0.5
        nn.init.orthogonal_(self.weight, gain=gain, generator=generator)


class _WideProduct(torch.autograd.Function):
    """x W^T computed in float32, [..., in] and [out,in] -> [..., out] in x's narrower dtype.

    Some rows at a time: what is wide stays in the cache, and is never much of the memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _by_rows(x, weight.float().T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (x, weight), grad = ctx.saved_tensors, grads[0]
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _by_rows(grad, weight.float())
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
            rows = grad.flatten(0, -2).split(_WIDE_ROWS), x.flatten(0, -2).split(_WIDE_ROWS)
            for some_grad, some_x in zip(*rows, strict=True):
                grad_weight.addmm_(some_grad.float().T, some_x.float())
            grad_weight = grad_weight.to(weight.dtype)
        return grad_x, grad_weight


def _by_rows(x: Tensor, matrix: Tensor) -> Tensor:
    """x times a float32 matrix, in x's dtype: [..., in] and [in,out] -> [..., out]."""
    product = x.new_empty(*x.shape[:-1], matrix.shape[1])
    rows = x.flatten(0, -2).split(_WIDE_ROWS), product.flatten(0, -2).split(_WIDE_ROWS)
    for some, out in zip(*rows, strict=True):
        out.copy_(some.float() @ matrix)
    return product


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


class Reading(NamedTuple):
    """How every layer reads a batch."""

    resets: Tensor | None  # [B,T] bool: positions at which a row begins afresh
    lengths: Tensor | None  # [B]: how many positions of a row are real
    backend: str | None  # of WKV
    spare: bool  # cheap products of elements are made again for the gradient, not kept


def token_shift(x: Tensor, last: Tensor, reading: Reading) -> tuple[Tensor, Tensor, Tensor]:
    """Predecessors, x itself, and each row's last one: [B,T,C], [B,C] -> [B,T,C] twice, [B,C].

    A reset position has no predecessor: it sees zero (equations 11 to 15, x_0 = 0). x comes back
    as a view of what the predecessors are a view of, so that one of them is kept, not two.
    """
    extended = torch.cat([last.to(x.dtype)[:, None], x], dim=1)
    previous, x = extended[:, :-1], extended[:, 1:]
    if reading.resets is not None:
        previous = previous.masked_fill(reading.resets[..., None], 0)
    if reading.lengths is None:
        # A copy, because FSDP warns of views in what a block returns.
        return previous, x, extended[:, -1].clone()
    rows = torch.arange(x.shape[0], device=x.device)
    return previous, x, extended[rows, reading.lengths]


def mix(previous: Tensor, x: Tensor, share: Tensor) -> Tensor:
    """share of x and 1 - share of its predecessor: [B,T,C], [B,T,C], [1,1,C] -> [B,T,C]."""
    return torch.lerp(previous, x, share.to(x.dtype))


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2, elementwise."""
    if torch.compiler.is_compiling():  # which fuses better
        return x.relu().square()
    return _SquaredReLU.apply(x)  # type: ignore[no-any-return]


class _SquaredReLU(torch.autograd.Function):
    """Its gradient, 2 max(x, 0), in two passes over memory where autograd's takes five."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.relu().square_()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x.relu().mul_(grads[0]).mul_(2)  # type: ignore[no-any-return]


def apply(layer: Linear, reading: Reading, make: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """layer(make(*inputs)), where the gradient makes the layer's input again instead of keeping it.

    Half of what training would remember of a block are such inputs: sums and products of elements
    of tensors that are remembered anyway.
    """
    made = make(*inputs)
    if not (reading.spare and made.requires_grad) or torch.compiler.is_compiling():
        return cast(Tensor, layer(made))
    place, size = made.data_ptr(), made.numel()

    def pack(saved: Tensor) -> Tensor | tuple[int, ...]:
        is_made = saved.data_ptr() == place and saved.numel() == size
        return tuple(saved.shape) if is_made else saved

    def unpack(packed: Tensor | tuple[int, ...]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return make(*inputs).view(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return cast(Tensor, layer(made))
