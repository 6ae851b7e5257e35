"""What the kernels take: many tensors, which travel by name and not by position."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """What a forward pass of WKV-4 takes."""

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
"""A forward pass of WKV-4 returns the output [B,T,C], the numerator, denominator and exponent [B,C]
of the state after the last token, and the states [B,N,3,C] that the backward pass starts from."""


class BackwardInputs(NamedTuple):
    """What its backward pass takes: gradients of results, and what the forward pass saved."""

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
"""A backward pass of WKV-4 returns those of log_decay, bonus, key, value, numerator, denominator,
each shaped like its tensor. The exponent has none: it cancels wherever a state is used."""


class Wkv6Inputs(NamedTuple):
    """What a forward pass of WKV-6 takes; H heads of N channels each."""

    receptance: Tensor  # [B,T,H,N], as the next three
    log_decay: Tensor  # in the state's dtype, whatever that of the others is
    key: Tensor
    value: Tensor
    bonus: Tensor  # [H,N], in the state's dtype
    state: Tensor  # [B,H,N,N] before the first token: rows belong to keys, columns to values
    resets: Tensor | None = None  # [B,T] bool
    lengths: Tensor | None = None  # [B] integers


Wkv6Results = tuple[Tensor, Tensor, Tensor]
"""A forward pass of WKV-6 returns the output [B,T,H,N], the state [B,H,N,N] after the last token,
and the states [K,B,H,N,N] that the backward pass starts from."""


class Wkv6BackwardInputs(NamedTuple):
    """What its backward pass takes: gradients of results, and what the forward pass saved."""

    grad_out: Tensor  # [B,T,H,N]
    grad_state: Tensor  # [B,H,N,N], of the state after the last token
    receptance: Tensor  # [B,T,H,N], as the next three
    log_decay: Tensor
    key: Tensor
    value: Tensor
    bonus: Tensor  # [H,N]
    starts: Tensor  # [K,B,H,N,N], as in Wkv6Results
    resets: Tensor | None = None  # [B,T] bool
    lengths: Tensor | None = None  # [B] integers


Wkv6Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""A backward pass of WKV-6 returns those of receptance, log_decay, key, value, bonus and the state,
each with the shape and dtype of its tensor."""


class Wkv7Inputs(NamedTuple):
    """What a forward pass of WKV-7 takes; H heads of N channels each."""

    receptance: Tensor  # [B,T,H,N], as the next five
    log_decay: Tensor  # in the state's dtype, whatever that of the others is
    key: Tensor
    value: Tensor
    removal: Tensor
    replacement: Tensor
    state: Tensor  # [B,H,N,N] before the first token: rows belong to values, columns to keys
    resets: Tensor | None = None  # [B,T] bool
    lengths: Tensor | None = None  # [B] integers


Wkv7Results = tuple[Tensor, Tensor, Tensor]
"""A forward pass of WKV-7 returns the output [B,T,H,N], the state [B,H,N,N] after the last token,
and the states [K,B,H,N,N] that the backward pass starts from."""


class Wkv7BackwardInputs(NamedTuple):
    """What its backward pass takes: gradients of results, and what the forward pass saved."""

    grad_out: Tensor  # [B,T,H,N]
    grad_state: Tensor  # [B,H,N,N], of the state after the last token
    receptance: Tensor  # [B,T,H,N], as the next five
    log_decay: Tensor
    key: Tensor
    value: Tensor
    removal: Tensor
    replacement: Tensor
    starts: Tensor  # [K,B,H,N,N], as in Wkv7Results
    resets: Tensor | None = None  # [B,T] bool
    lengths: Tensor | None = None  # [B] integers


Wkv7Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""A backward pass of WKV-7 returns those of receptance, log_decay, key, value, removal,
replacement and the state, each with the shape and dtype of its tensor."""


def check_masks(resets: Tensor | None, lengths: Tensor | None) -> None:
    """ValueError unless resets are bools and lengths integers."""
    if resets is not None and resets.dtype != torch.bool:
        raise ValueError(f"resets is {resets.dtype}; it must be torch.bool")
    if lengths is not None and (lengths.is_floating_point() or lengths.dtype == torch.bool):
        raise ValueError(f"lengths is {lengths.dtype}; it must hold integers")
