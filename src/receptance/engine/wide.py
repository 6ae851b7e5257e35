"""Faster products of bfloat16 for CPUs without instructions for them: computed in float32."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from receptance.model.parts import Linear

# With at most this many rows, reading the weights takes the time, and bfloat16 has fewer bytes.
_FEW_ROWS = 8
# This many rows are widened to float32 at a time, so that they stay in the cache.
_WIDE_ROWS = 512


@functools.cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether torch's products of bfloat16 are faster than those of float32 on this CPU.

    Without instructions for bfloat16 its products take 5 times as long. With AVX512-BF16 alone they
    are half as fast as float32 on Intel's processors (measured on Emerald Rapids), and twice as
    fast on AMD's according to AMD's documentation.
    """
    if torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2", "AVX512"):
        return True  # All other names belong to processors that are not x86.
    # Older releases of torch have no public function that tells the capabilities.
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    on_amd = "AMD" in str(found.get("cpu_name"))
    return bool(found.get("amx_tile") or (found.get("avx512_bf16") and on_amd))


def widen(model: nn.Module) -> None:
    """Let every `Linear` of a model multiply bfloat16 in the way that is fastest on this CPU.

    Parameters, their names and the type of results stay as they are, and so do products on other
    devices.
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
