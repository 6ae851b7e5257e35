"""Operations on states: parts and layers exchanged, emptied, or mixed between two texts.

A state is a value. Each function returns a new one and leaves its arguments as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from receptance.model import Model
from receptance.state import State


def transplant(
    model: Model,
    state: State,
    donor: State,
    *,
    layers: Sequence[int] | None = None,
    parts: Sequence[str] | None = None,
) -> State:
    """The state in which some layers, or some parts of them, come from another state.

    parts are names from `parts(model)`: fields of the state, or groups of fields that mean
    something only together. None means all. Both states have the same rows. ValueError for a layer
    or part that there is not, and for states that do not fit each other or the model.
    """
    chosen = _layers(model, layers)
    fields = _fields(model, parts)
    _check(model, state, donor)
    tensors = {}
    for name, tensor in state.tensors.items():
        if name in fields:
            tensor = tensor.clone()
            tensor[chosen] = donor.tensors[name][chosen].to(tensor.dtype)
        tensors[name] = tensor
    return State(tensors, state.tokens)


def ablate(
    model: Model,
    state: State,
    *,
    layers: Sequence[int] | None = None,
    parts: Sequence[str] | None = None,
) -> State:
    """The state in which some layers, or parts of them, have read nothing; see `transplant`."""
    dtype = state.tensors[model.config.architecture.state_fields[0]].dtype
    empty = model.empty_state(state.batch, dtype=dtype).to(state.tokens.device)
    return transplant(model, state, empty, layers=layers, parts=parts)


def interpolate(model: Model, one: State, other: State, share: float) -> State:
    """The state between two: `one` at share 0, `other` at share 1. It counts the tokens of `one`.

    What the recurrence has summed is mixed linearly, however the version stores its sums.
    """
    _check(model, one, other)
    architecture = model.config.architecture
    fields = architecture.state_fields
    first, second = (
        architecture.layer_state(*(state.tensors[name] for name in fields))
        for state in (one, other)
    )
    mixed = architecture.interpolate(first, second, share)
    return State(dict(zip(fields, mixed, strict=True)), one.tokens)


def parts(model: Model) -> dict[str, tuple[str, ...]]:
    """The parts of this model's state that mean something alone, and the fields in each."""
    return dict(model.config.architecture.state_parts)


def _layers(model: Model, layers: Sequence[int] | None) -> Tensor:
    number = model.config.num_layers
    if layers is None:
        return torch.arange(number, device=model.device)
    if wrong := [layer for layer in layers if not -number <= layer < number]:
        raise ValueError(f"there is no layer {wrong[0]} in a model of {number} layers")
    return torch.tensor([layer % number for layer in layers], device=model.device).long()


def _fields(model: Model, names: Sequence[str] | None) -> set[str]:
    known = parts(model)
    chosen = list(known) if names is None else [names] if isinstance(names, str) else list(names)
    single = {field: (field,) for fields in known.values() for field in fields}
    if wrong := [name for name in chosen if name not in known and name not in single]:
        raise ValueError(
            f"the state of RWKV-{model.config.version} has no part {wrong[0]!r}; it has "
            f"{', '.join(known)}"
        )
    return {field for name in chosen for field in known.get(name, (name,))}


def _check(model: Model, *states: State) -> None:
    config = model.config
    shapes = config.architecture.state_shapes(config)
    wanted = {n: (config.num_layers, states[0].batch, *s) for n, s in shapes.items()}
    for state in states:
        found = {name: tuple(x.shape) for name, x in state.tensors.items()}
        if found != wanted:
            raise ValueError(f"a state is {found}; wanted {wanted}, as of the other and the model")
