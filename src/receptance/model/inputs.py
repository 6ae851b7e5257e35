"""The checks of a call's arguments, which all engines share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from receptance.model.config import ModelConfig
from receptance.state import State

_INTEGERS = (torch.int64, torch.int32)


def check_inputs(
    config: ModelConfig,
    tokens: Tensor,
    state: State | None,
    lengths: Tensor | None,
    resets: Tensor | None,
) -> None:
    """ValueError says which argument of a call does not fit the others or the model."""
    for name, given in (("tokens", tokens), ("lengths", lengths), ("resets", resets)):
        if given is not None and not isinstance(given, Tensor):
            raise ValueError(f"{name} are a {type(given).__name__}; wanted a tensor")
    if tokens.dim() != 2 or tokens.dtype not in _INTEGERS:
        raise ValueError(
            f"tokens are {tokens.dtype} {list(tokens.shape)}; wanted ids [B,T], int64 or int32"
        )
    if state is not None:
        _check_state(config, tokens, state)
    if lengths is not None and (
        lengths.shape != tokens.shape[:1] or lengths.dtype not in _INTEGERS
    ):
        raise ValueError(
            f"lengths are {lengths.dtype} {list(lengths.shape)}; tokens {list(tokens.shape)} "
            "want one integer per row"
        )
    if resets is not None and (resets.shape != tokens.shape or resets.dtype != torch.bool):
        raise ValueError(
            f"resets are {resets.dtype} {list(resets.shape)}; tokens {list(tokens.shape)} "
            "want one bool each"
        )
    # Reading values would synchronize with another device, and a compiled graph has no values yet.
    if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(config, tokens, lengths)


def check_features(features: Tensor, width: int, device: torch.device) -> None:
    """ValueError unless these are features [...,C] on the device of the head."""
    if features.shape[-1:] != (width,) or features.device != device:
        raise ValueError(
            f"features are {list(features.shape)} on {features.device}; wanted [...,{width}] on "
            f"{device}"
        )


def check_ids(tokens: Tensor, known: int) -> None:
    """ValueError unless all ids, of any shape, are 0 to known - 1."""
    if not tokens.numel():
        return
    low, high = (int(x) for x in tokens.aminmax())
    if low < 0 or high >= known:
        found = low if low < 0 else high
        raise ValueError(f"token id {found} is out of range; this model knows 0 to {known - 1}")


def _check_state(config: ModelConfig, tokens: Tensor, state: State) -> None:
    """ValueError if a tensor does not fit: kernels would read past the end of its memory."""
    for name, shape in config.architecture.state_shapes(config).items():
        part = state.tensors.get(name)
        wanted = (config.num_layers, tokens.shape[0], *shape)
        if part is None or part.shape != wanted or part.device != tokens.device:
            raise ValueError(_misfit(tokens, name, part, wanted))


def _misfit(tokens: Tensor, name: str, part: Tensor | None, wanted: tuple[int, ...]) -> str:
    """The message about a tensor of a state that does not fit."""
    if part is None or part.dim() != len(wanted):
        found = "none" if part is None else list(part.shape)
        return f"{name} of the state is {found}; wanted {list(wanted)}, so the state is damaged"
    layers, batch, *shape = part.shape
    if (layers, *shape) != (wanted[0], *wanted[2:]):
        return (
            f"this state belongs to a model of {layers} layers and width {_width(shape)}; this one "
            f"has {wanted[0]} layers and width {_width(wanted[2:])}"
        )
    if batch != wanted[1]:
        return f"the state holds {batch} rows and tokens {wanted[1]}; select rows with State.rows()"
    return f"the state is on {part.device} and tokens on {tokens.device}; move it with State.to()"


def _width(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _check_values(config: ModelConfig, tokens: Tensor, lengths: Tensor | None) -> None:
    check_ids(tokens, config.vocab_size)
    if lengths is not None and lengths.numel():
        low, high = (int(x) for x in lengths.aminmax())
        if low < 0 or high > tokens.shape[1]:
            raise ValueError(
                f"lengths run from {low} to {high}; tokens have {tokens.shape[1]} positions"
            )
