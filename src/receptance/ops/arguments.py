"""What the kernels of WKV-4 take: many tensors, which travel by name and not by position."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """What a forward pass takes."""

    log_decay: Tensor  # [C]
    bonus: Tensor  # [C]
    key: Tensor  # [B,T,C]
    value: Tensor  # [B,T,C]
    numerator: Tensor  # [B,C], with the two below the state before the first token
    denominator: Tensor  # [B,C]
    exponent: Tensor  # [B,C]
    resets: Tensor | None = None  # [B,T] bool
    lengths: Tensor | None = None  # [B] integers


Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""A forward pass returns the output [B,T,C], the numerator, denominator and exponent [B,C] of the
state after the last token, and the states [B,N,3,C] that the backward pass starts from."""


class BackwardInputs(NamedTuple):
    """What a backward pass takes: gradients of results, and what the forward pass saved."""

    grad_out: Tensor  # [B,T,C]
    grad_numerator: Tensor  # [B,C], of the state after the last token
    grad_denominator: Tensor  # [B,C]
    log_decay: Tensor  # [C]
    bonus: Tensor  # [C]
    key: Tensor  # [B,T,C]
    value: Tensor  # [B,T,C]
    starts: Tensor  # [B,N,3,C], as in Results
    resets: Tensor | None = None  # [B,T] bool
    lengths: Tensor | None = None  # [B] integers


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""A backward pass returns those of log_decay, bonus, key, value, numerator and denominator, each
shaped like its tensor. The exponent has none, because it cancels wherever a state is used."""
