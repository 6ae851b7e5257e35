"""What a model accepts: checked in one place for every engine."""

from __future__ import annotations

import torch
from torch import Tensor

from receptance.config import ModelConfig
from receptance.state import State


def check_inputs(
    config: ModelConfig,
    tokens: Tensor,
    state: State | None,
    lengths: Tensor | None,
    resets: Tensor | None,
) -> None:
    """ValueError says which argument of a call does not fit the others or the model."""
    if tokens.dim() != 2 or tokens.is_floating_point():
        raise ValueError(f"tokens are {tokens.dtype} {list(tokens.shape)}; wanted ids [B,T]")
    if state is not None:
        _check_state(config, tokens, state)
    if lengths is not None and (
        lengths.shape != tokens.shape[:1] or lengths.dtype not in (torch.int64, torch.int32)
    ):
        raise ValueError(
            f"lengths are {lengths.dtype} {list(lengths.shape)}; tokens {list(tokens.shape)} "
            "want one integer a row"
        )
    if resets is not None and (resets.shape != tokens.shape or resets.dtype != torch.bool):
        raise ValueError(
            f"resets are {resets.dtype} {list(resets.shape)}; tokens {list(tokens.shape)} "
            "want one bool each"
        )
    # On other devices a look at the ids would wait, and a compiled graph has none to look at.
    if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(config, tokens, lengths)


def _check_state(config: ModelConfig, tokens: Tensor, state: State) -> None:
    layers, batch, width = state.tensors["time_shift"].shape
    if (layers, width) != (config.num_layers, config.width):
        raise ValueError(
            f"this state belongs to a model of {layers} layers and width {width}; this one has "
            f"{config.num_layers} layers and width {config.width}"
        )
    if batch != tokens.shape[0]:
        raise ValueError(
            f"the state holds {batch} rows and tokens {tokens.shape[0]}; select rows with "
            "State.rows()"
        )


def _check_values(config: ModelConfig, tokens: Tensor, lengths: Tensor | None) -> None:
    if tokens.numel():
        low, high = (int(x) for x in tokens.aminmax())
        if low < 0 or high >= config.vocab_size:
            found = low if low < 0 else high
            raise ValueError(
                f"token id {found} is out of range; this model knows 0 to {config.vocab_size - 1}"
            )
    if lengths is not None and lengths.numel():
        low, high = (int(x) for x in lengths.aminmax())
        if low < 0 or high > tokens.shape[1]:
            raise ValueError(
                f"lengths run from {low} to {high}; tokens have {tokens.shape[1]} positions"
            )
