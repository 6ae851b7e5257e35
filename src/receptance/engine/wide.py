"""Products of bfloat16 on CPUs that multiply float32 faster: the same layers, another kernel."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from receptance.model.parts import Linear

# With fewer rows than this a product is bound by reading the weights, and narrow weights win.
_FEW_ROWS = 8
# Rows that are widened at a time: what is wide stays in the cache and is never much of the memory.
_WIDE_ROWS = 512


@functools.cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether torch's products of bfloat16 are faster than those of float32 on this CPU.

    Without instructions for them they take 5 times as long. AVX512-BF16 alone is half as fast as
    float32 on Intel's processors (measured on Emerald Rapids), and by the documentation twice as
    fast on AMD's.
    """
    if torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2", "AVX512"):
        return True  # The processor is not an x86, and has more than the least.
    # Releases of torch before this function have no public way to ask.
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    on_amd = "AMD" in str(found.get("cpu_name"))
    return bool(found.get("amx_tile") or (found.get("avx512_bf16") and on_amd))


def widen(model: nn.Module) -> None:
    """Let every `Linear` of a model multiply bfloat16 in the way that is fastest on this CPU.

    Parameters, names and the results' type stay as they are; elsewhere nothing changes.
    """
    if cpu_multiplies_bfloat16():
        return
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = WideLinear


class WideLinear(Linear):
    """A `Linear` whose products of bfloat16 on a CPU are computed in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in x's dtype."""
        weight = self.weight
        few_rows = weight.dtype == x.dtype and x.numel() <= _FEW_ROWS * x.shape[-1]
        if x.dtype != torch.bfloat16 or not x.is_cpu or few_rows:
            return F.linear(x, weight.to(x.dtype))
        return _WideProduct.apply(x, weight)


class _WideProduct(torch.autograd.Function):
    """x W^T computed in float32, [..., in] and [out,in] -> [..., out] in x's narrower dtype."""

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
